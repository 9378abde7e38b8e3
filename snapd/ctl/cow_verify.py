"""`snapctl cow verify`: can a COW file be used, by which merge, and is its content right."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.cow_end import end_text
from snapd.ctl.cow_options import IgnoreDigestsOption, LabelOption, LenientOption
from snapd.ctl.errors import FAILED
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    cow: Annotated[Path, typer.Argument(help="The COW file.")],
    base: Annotated[
        Path | None, typer.Option(help="The image it applies to: checks sizes and, by digests, every block.")
    ] = None,
    label: LabelOption = None,
    lenient: LenientOption = False,
    payloads: Annotated[bool, typer.Option("--payloads", help="Decode every payload.")] = False,
    ignore_digests: IgnoreDigestsOption = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Check structure, merge order and content of a COW file; exit code 1 if anything is wrong."""
    from snapd.cow.verbs.verify import verify_cow

    with progress_bar("verifying") as progress:
        report = verify_cow(
            cow, base, progress, label=label, lenient=lenient, payloads=payloads, ignore_digests=ignore_digests
        )
    record = asdict(report)
    if output is Format.TABLE:
        record["end"] = end_text(report.end, label=label, final_digests=report.digests == "final")
    show(record, output)
    if not report.ok:
        raise typer.Exit(FAILED)

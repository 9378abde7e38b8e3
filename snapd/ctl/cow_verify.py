"""`snapctl cow verify`: is every byte of a COW file usable, and by which merge."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.errors import FAILED
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    cow: Annotated[Path, typer.Argument(help="The COW file.")],
    base: Annotated[Path | None, typer.Option(help="The image it applies to: checks the sizes too.")] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Check structure, merge order and every payload of a COW file; exit code 1 if anything is wrong."""
    from snapd.cow.verify import verify_cow

    with progress_bar("verifying") as progress:
        report = verify_cow(cow, base, progress)
    show(asdict(report), output)
    if not report.ok:
        raise typer.Exit(FAILED)

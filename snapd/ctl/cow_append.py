"""`snapctl cow append`: go on with a COW file until it makes the target."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.cow_options import LabelOption
from snapd.ctl.create_options import JobsOption, SourceOption, TargetOption
from snapd.ctl.errors import usage
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar


def register(app: typer.Typer) -> None:
    app.command("append")(append)


def append(
    cow: Annotated[Path, typer.Argument(help="The COW file; changed in place.")],
    source: SourceOption,
    target: TargetOption,
    label: LabelOption = None,
    compress: Annotated[
        str | None, typer.Option(metavar="ALGO[,LEVEL]", help="The file's own algorithm, maybe with another level.")
    ] = None,
    jobs: JobsOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Keep what a COW file has before a label (default: all) and add what is missing to make the target."""
    from snapd.cow.compress import CompressOption
    from snapd.cow.verbs.append import append_cow

    with usage("--compress"):
        option = None if compress is None else CompressOption.parse(compress)
    with progress_bar("appending") as progress:
        report = append_cow(cow, source, target, progress, label=label, compression=option, jobs=jobs)
    show(asdict(report), output)

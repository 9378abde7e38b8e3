"""`snapctl cow create`: the difference of two images as a COW file."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.cow.diff.xormode import XorMode
from snapd.ctl.create_options import (
    CompressionOption,
    FileFormat,
    FormatOption,
    JobsOption,
    SourceOption,
    TargetOption,
    UnitOption,
    XorOption,
    create_options,
)
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(
    source: SourceOption,
    target: TargetOption,
    out: Annotated[Path, typer.Option(help="The COW file to write; an existing one is replaced as a whole.")],
    compress: CompressionOption = "zstd",
    unit: UnitOption = None,
    file_format: FormatOption = FileFormat.V3,
    xor: XorOption = XorMode.SAME,
    jobs: JobsOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Write a COW file that turns one image into another, and its digests table beside it."""
    from snapd.cow.verbs.create import create_cow

    options = create_options(compress, unit, file_format, xor, jobs)
    with progress_bar("creating") as progress:
        report = create_cow(source, target, out, options, progress)
    show(asdict(report), output)

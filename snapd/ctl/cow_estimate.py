"""`snapctl cow estimate`: how large a COW file will be."""

from dataclasses import asdict

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
    app.command("estimate")(estimate)


def estimate(
    source: SourceOption,
    target: TargetOption,
    compress: CompressionOption = "zstd",
    unit: UnitOption = None,
    file_format: FormatOption = FileFormat.V3,
    xor: XorOption = XorMode.SAME,
    jobs: JobsOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Tell exactly how large the files will be that `create` writes with the same options; writes nothing."""
    from snapd.cow.verbs.estimate import estimate_cow

    options = create_options(compress, unit, file_format, xor, jobs)
    with progress_bar("estimating") as progress:
        report = estimate_cow(source, target, options, progress)
    show(asdict(report), output)

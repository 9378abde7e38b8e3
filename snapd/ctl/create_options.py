"""The options that say how to make a COW, for the verbs that make one or tell how large it will be."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapd.cow.diff.xormode import XorMode
from snapd.ctl.errors import usage
from snapd.ctl.sizes import parse_size

if TYPE_CHECKING:
    from snapd.cow.diff.createoptions import CreateOptions


class FileFormat(StrEnum):
    """What `--format` takes."""

    V3 = "v3"
    V2 = "v2"


SourceOption = Annotated[Path, typer.Option("--source", help="The old image.")]
TargetOption = Annotated[Path, typer.Option("--target", help="The new image.")]
CompressionOption = Annotated[
    str, typer.Option("--compress", metavar="ALGO[,LEVEL]", help="zstd, lz4, gz, brotli or none.")
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        "--unit", metavar="SIZE", help="The most that one compressed unit covers; default: 64KiB, with v2 4KiB."
    ),
]
FormatOption = Annotated[FileFormat, typer.Option("--format", help="The version of the file format.")]
XorOption = Annotated[
    XorMode,
    typer.Option(
        "--xor",
        help="Store changed blocks as differences from the old image: at the same place, moved data too, or not.",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", min=1, max=64, help="Threads, which change nothing but the time; default: one a CPU."),
]


def create_options(
    compress: str, unit: str | None, file_format: FileFormat, xor: XorMode, jobs: int | None
) -> "CreateOptions":
    """What the options ask for together; what cannot be is an error of usage."""
    from snapd.cow.compress import CompressOption
    from snapd.cow.diff.createoptions import CreateOptions, usable_cpus

    with usage("--compress"):
        options = CreateOptions(
            compression=CompressOption.parse(compress),
            version=int(file_format.removeprefix("v")),
            xor=xor,
            jobs=usable_cpus() if jobs is None else jobs,
        )
    with usage("--unit"):
        return options if unit is None else replace(options, unit=parse_size(unit))

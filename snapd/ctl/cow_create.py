"""`snapctl cow create`: the difference of two images as a COW file."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.errors import usage
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar
from snapd.ctl.sizes import parse_size


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(
    source: Annotated[Path, typer.Option(help="The old image.")],
    target: Annotated[Path, typer.Option(help="The new image.")],
    out: Annotated[Path, typer.Option(help="The COW file to write; an existing one is replaced as a whole.")],
    compress: Annotated[str, typer.Option(metavar="ALGO[,LEVEL]", help="zstd, lz4 or none.")] = "zstd",
    unit: Annotated[str, typer.Option(metavar="SIZE", help="The most that one compressed unit covers.")] = "64KiB",
    output: OutputOption = Format.TABLE,
) -> None:
    """Write a COW file that turns one image into another."""
    from snapd.cow.compress import CompressOption
    from snapd.cow.create import create_cow
    from snapd.cow.writer import check_unit_size

    with usage("--compress"):
        option = CompressOption.parse(compress)
    with usage("--unit"):
        unit_bytes = parse_size(unit)
        check_unit_size(unit_bytes)
    with progress_bar("creating") as progress:
        report = create_cow(source, target, out, option, unit_bytes, progress)
    show(asdict(report), output)

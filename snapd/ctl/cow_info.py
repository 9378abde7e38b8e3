"""`snapctl cow info`: what a COW file holds."""

from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    cow: Annotated[Path, typer.Argument(help="The COW file.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Show the header and the op counts of a COW file."""
    from dataclasses import asdict

    from snapd.cow.info import cow_info

    show(asdict(cow_info(cow)), output)

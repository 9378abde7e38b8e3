"""`snapctl demo`: an over-the-air update on two real file systems, from two images to a proved result."""

from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    directory: Annotated[
        str | None, typer.Option("--directory", help="Where to work; needs about 1.5 GiB, nothing is left there.")
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Make two ext4 images and a COW, serve the new one, merge it under a reader, kill the worker, prove the result."""
    from dataclasses import asdict

    from snapd.ctl.demo_run import run

    show(asdict(run(directory)), output)

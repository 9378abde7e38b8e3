"""`snapctl cow merge`: make an image the new one, in place."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    cow: Annotated[Path, typer.Argument(help="The COW file.")],
    base: Annotated[Path, typer.Option(help="The old image; it becomes the new one.")],
    ignore_digests: Annotated[
        bool, typer.Option("--ignore-digests", help="Do not compare with the digests beside the COW.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Merge a COW file into its base. Interrupted, it goes on where it was when called again."""
    from snapd.merge.offline import merge_offline

    with progress_bar("merging") as progress:
        report = merge_offline(str(cow), str(base), progress, ignore_digests=ignore_digests)
    show(asdict(report), output)

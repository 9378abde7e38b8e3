"""`snapctl cow extract`: the image that a COW file over its base stands for.

A COW file is locked with its base while it is read. An undo store is not: the old image can be had from it at any
moment until confirm, also while the merge that fills it is running.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.cow_options import IgnoreDigestsOption, LabelOption, LenientOption
from snapd.ctl.errors import usage
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar
from snapd.ctl.sizes import parse_size


def register(app: typer.Typer) -> None:
    app.command("extract")(extract)


def extract(
    cow: Annotated[Path, typer.Argument(help="The COW file, or the undo store of a merge.")],
    base: Annotated[Path, typer.Option(help="The image it applies to.")],
    out: Annotated[Path, typer.Option(help="The file to write; an existing one is replaced as a whole.")],
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="The image's size in bytes.")] = None,
    label: LabelOption = None,
    lenient: LenientOption = False,
    ignore_digests: IgnoreDigestsOption = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Write the new image (from an undo store: the old image) to a file."""
    from snapd.cow.verbs.extract import extract_image
    from snapd.merge.extract_old import extract_old, is_undo_store

    with usage("--size"):
        size_bytes = None if size is None else parse_size(size)
    is_undo = is_undo_store(cow)
    if is_undo and (label is not None or lenient or ignore_digests):
        raise typer.BadParameter(f"{cow} is an undo store: it has no label, and no fault of it is overlooked")
    with progress_bar("extracting") as progress:
        if is_undo:
            report = extract_old(cow, base, out, size_bytes, progress)
        else:
            report = extract_image(
                *(cow, base, out, size_bytes, progress), label=label, lenient=lenient, ignore_digests=ignore_digests
            )
    show(asdict(report), output)

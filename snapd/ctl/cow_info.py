"""`snapctl cow info`: what a COW file holds, and a picture of the image it makes."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapd.ctl.cow_end import end_text
from snapd.ctl.cow_options import LabelOption, LenientOption
from snapd.ctl.output import Format, OutputOption, show

if TYPE_CHECKING:
    from snapd.cow.verbs.info import CowInfo

_SHOWN_LABELS = 8


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    cow: Annotated[Path, typer.Argument(help="The COW file.")],
    label: LabelOption = None,
    lenient: LenientOption = False,
    map_path: Annotated[
        Path | None, typer.Option("--map", metavar="OUT.PNG", help="Write the picture of the image here, too.")
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Show what a COW file holds, and as a table also a picture of the image."""
    from snapd.block.newfile import new_file
    from snapd.cow.digests import table_path
    from snapd.cow.verbs.info import cow_info
    from snapd.ctl.blockpicture import png_picture, text_picture

    found, extent_map = cow_info(cow, label=label, lenient=lenient)
    if map_path is not None:
        with new_file(str(map_path), inputs=[str(cow), table_path(cow)]) as file:
            file.write(png_picture(extent_map), 0)
    if output is Format.JSON:
        labels = [{"label": point.label, "ops": point.op_count} for point in found.labels]
        show(asdict(found) | {"labels": labels}, output)
        return
    show(_for_people(found, label), output)
    if extent_map.block_count:
        print(f"\n{text_picture(extent_map, sys.stdout)}")


def _for_people(found: "CowInfo", label: int | None) -> dict[str, object]:
    """The record without what this version does not have, and with what the words mean."""
    end = end_text(found.end, label=label, final_digests=found.digests == "final")
    shown = [f"{point.label}, after {point.op_count} ops" for point in found.labels[-_SHOWN_LABELS:]]
    if more := len(found.labels) - len(shown):
        shown.insert(0, f"{more} more")
    record = asdict(found) | {"end": end, "labels": shown}
    return {key: value for key, value in record.items() if value is not None}

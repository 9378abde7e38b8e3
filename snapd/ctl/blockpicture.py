"""How the picture of an image looks: as characters in a terminal, and as a PNG.

Characters read without colour: a capital where at least half of the blocks are changed, a small letter where less are.
In the PNG the latter are paler. What lies behind the end of the image is blank, or white.
"""

import os
import shutil
from itertools import groupby
from typing import NamedTuple, TextIO

from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.verbs.picture import THIN, Cell, Picture, draw
from snapd.ctl.png import encode_png
from snapd.ctl.sizes import format_size

_MAX_COLUMNS = 160
_MAX_ROWS = 16
_MAX_PIXELS = 1024


class _Look(NamedTuple):
    name: str
    letter: str
    terminal_colour: int
    rgb: tuple[int, int, int]


_LOOKS = {
    Cell.UNCHANGED: _Look("unchanged", ".", 90, (208, 208, 208)),
    Cell.ZERO: _Look("zero", "Z", 32, (44, 160, 44)),
    Cell.COPY: _Look("copy", "C", 34, (31, 119, 180)),
    Cell.XOR: _Look("XOR", "X", 35, (148, 60, 189)),
    Cell.REPLACE: _Look("replace", "R", 31, (214, 39, 40)),
}
_WHITE = (255, 255, 255)


def text_picture(extent_map: ExtentMap, out: TextIO) -> str:
    """The picture as wide as the terminal, with its legend; coloured if `out` is one and NO_COLOR is not set."""
    columns = min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
    picture = draw(extent_map, columns=columns, max_rows=_MAX_ROWS)
    coloured = out.isatty() and not os.environ.get("NO_COLOR")
    rows = [
        "".join(_characters(code, len(list(cells)), coloured) for code, cells in groupby(row))
        for row in picture.cells.tolist()
    ]
    changes = (look for look in _LOOKS.values() if look.letter.isupper())
    letters = "  ".join(f"{look.letter}{look.letter.lower()} {look.name}" for look in changes)
    scale = f"a character is {_extent(extent_map, picture)}"
    if picture.cell_blocks > 1:
        scale += ", a small letter means less than half of it"
    return "\n".join([*(row.rstrip() for row in rows), f". unchanged  {letters}", scale])


def png_picture(extent_map: ExtentMap) -> bytes:
    """The picture as a PNG file of at most 1024 by 1024 pixels; a small image's blocks are squares of several."""
    blocks = max(1, extent_map.block_count)
    columns = min(_MAX_PIXELS, 1 << -(-(blocks - 1).bit_length() // 2))
    picture = draw(extent_map, columns=columns, max_rows=_MAX_PIXELS)
    magnified = max(1, _MAX_PIXELS // 2 // columns)
    pixels = picture.cells.repeat(magnified, axis=0).repeat(magnified, axis=1)
    legend = ", ".join(f"{look.name} #{bytes(look.rgb).hex()}" for look in _LOOKS.values())
    square = f"{magnified}x{magnified} pixels are" if magnified > 1 else "a pixel is"
    text = f"{square} {_extent(extent_map, picture)}; {legend}; paler: less than half of it is changed"
    return encode_png(pixels, _palette(), text)


def _extent(extent_map: ExtentMap, picture: Picture) -> str:
    blocks = picture.cell_blocks
    return f"{blocks} block{'s' if blocks > 1 else ''} ({format_size(blocks * extent_map.block_size)})"


def _characters(code: int, count: int, coloured: bool) -> str:
    if code == Cell.OUTSIDE:
        return " " * count
    look = _LOOKS[Cell(code - THIN if code > Cell.REPLACE else code)]
    text = (look.letter.lower() if code > Cell.REPLACE else look.letter) * count
    return f"\x1b[{look.terminal_colour}m{text}\x1b[0m" if coloured else text


def _palette() -> list[tuple[int, int, int]]:
    """A colour for every code a cell can have."""
    full = [_LOOKS[cell].rgb for cell in Cell if cell is not Cell.OUTSIDE]
    pale = [((r + 255) // 2, (g + 255) // 2, (b + 255) // 2) for r, g, b in full[1:]]
    return [_WHITE, *full, *pale]

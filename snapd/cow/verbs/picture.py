"""The picture of an image: a grid of cells, each the kind of change of a few consecutive blocks.

Blocks run from left to right, then down; every cell stands for the same number of blocks, the least that makes the
grid fit. A cell shows "unchanged" only if no block of it is changed: else the kind that most of its changed blocks have
(of two equal ones the one that costs more to apply), *thin* when less than half of its blocks are changed.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from snapd.cow.format import OpType
from snapd.cow.image.extentmap import ExtentMap

_RUNS_AT_ONCE = 1 << 20


class Cell(IntEnum):
    """What a cell shows; a thin one of a kind is `THIN` more than the kind."""

    OUTSIDE = 0
    UNCHANGED = 1
    ZERO = 2
    COPY = 3
    XOR = 4
    REPLACE = 5


THIN = 4
# From cheap to costly, as in `Cell`.
_CHANGES = (OpType.ZERO, OpType.COPY, OpType.XOR, OpType.REPLACE)


@dataclass(frozen=True, slots=True)
class Picture:
    """`cells` are codes of `Cell`, one row of the grid a row; each is `cell_blocks` blocks of the image."""

    cells: npt.NDArray[np.uint8]
    cell_blocks: int


def draw(extent_map: ExtentMap, *, columns: int, max_rows: int) -> Picture:
    """The picture of a whole image in at most `max_rows` rows of `columns` cells; no rows for an empty one."""
    blocks = extent_map.block_count
    cell_blocks = max(1, -(-blocks // (columns * max_rows)))
    cells = -(-blocks // cell_blocks)
    edges = np.minimum(np.arange(cells + 1) * cell_blocks, blocks)
    changed = _changed_blocks(extent_map, edges, cell_blocks)
    total = changed.sum(axis=0)
    # The last of the largest: of equal kinds the most costly.
    codes = Cell.REPLACE - np.argmax(changed[::-1], axis=0)
    codes += np.where(2 * total < np.diff(edges), THIN, 0)
    codes[total == 0] = Cell.UNCHANGED
    grid = np.full(-(-cells // columns) * columns, Cell.OUTSIDE, dtype=np.uint8)
    grid[:cells] = codes
    return Picture(grid.reshape(-1, columns), cell_blocks)


def _changed_blocks(extent_map: ExtentMap, edges: npt.NDArray[np.int64], cell_blocks: int) -> npt.NDArray[np.int64]:
    """How many blocks of each of `_CHANGES` (rows) every cell between two `edges` has (columns)."""
    starts = np.frombuffer(extent_map.starts, dtype="<u4")
    whats = np.frombuffer(extent_map.whats, dtype="<u8")
    changed = np.zeros((len(_CHANGES), len(edges) - 1), dtype=np.int64)
    for first in range(0, len(whats), _RUNS_AT_ONCE):
        bounds = starts[first : first + _RUNS_AT_ONCE + 1].astype(np.int64)
        kinds = whats[first : first + _RUNS_AT_ONCE] >> np.uint64(60)
        low, high = int(bounds[0]) // cell_blocks, -(-int(bounds[-1]) // cell_blocks)
        for row, kind in zip(changed, _CHANGES, strict=True):
            # How many blocks of a kind lie below an edge is linear from one end of a run to the other.
            below = np.append(0, np.cumsum(np.where(kinds == kind, np.diff(bounds), 0)))
            row[low:high] += np.diff(np.interp(edges[low : high + 1], bounds, below)).astype(np.int64)
    return changed

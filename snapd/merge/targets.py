"""T: the target blocks that have an op in C, as runs and as pieces of work, in ascending order."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from snapd.block.extent import Extent
from snapd.cow.image.extentmap import ExtentMap

_GAP_BYTES = 64 << 10


class Targets:
    """T of one extent map; a piece has at most `piece_bytes`."""

    def __init__(self, extent_map: ExtentMap, piece_bytes: int) -> None:
        extents = np.array(list(extent_map.changed_extents(0, extent_map.block_count)), dtype=np.int64).reshape(-1, 2)
        self._starts = extents[:, 0]
        self._ends = self._starts + extents[:, 1]
        # How many blocks of T lie before each run.
        self._before = np.append(0, np.cumsum(extents[:, 1]))
        self._piece_blocks = max(1, piece_bytes // extent_map.block_size)
        self._gap_blocks = _GAP_BYTES // extent_map.block_size

    def count(self, start: int, end: int) -> int:
        """How many blocks of [start, end) are in T."""
        return self._count_below(end) - self._count_below(start)

    def mask(self, extent: Extent) -> npt.NDArray[np.bool_]:
        """Which blocks of the extent are in T."""
        mask = np.zeros(extent.length, dtype=np.bool_)
        for run in self.runs(extent.start):
            if run.start >= extent.end:
                break
            mask[run.start - extent.start : run.end - extent.start] = True
        return mask

    def runs(self, block: int) -> Iterator[Extent]:
        """The runs of T from `block` on."""
        for i in range(int(np.searchsorted(self._ends, block, side="right")), len(self._ends)):
            start = max(int(self._starts[i]), block)
            yield Extent(start, int(self._ends[i]) - start)

    def pieces(self, block: int) -> Iterator[Extent]:
        """T from `block` on in pieces that begin and end with a block of T; short gaps are read over."""
        piece = Extent(block, 0)
        for run in self.runs(block):
            joined = run.end - piece.start
            if piece.length and run.start - piece.end <= self._gap_blocks and joined <= self._piece_blocks:
                piece = Extent(piece.start, joined)
                continue
            if piece.length:
                yield piece
            start = run.start
            while run.end - start > self._piece_blocks:
                yield Extent(start, self._piece_blocks)
                start += self._piece_blocks
            piece = Extent(start, run.end - start)
        if piece.length:
            yield piece

    def _count_below(self, block: int) -> int:
        """How many blocks of T lie before `block`."""
        i = int(np.searchsorted(self._starts, block))
        if not i:
            return 0
        return int(self._before[i]) - max(0, int(self._ends[i - 1]) - block)


def true_runs(mask: npt.NDArray[np.bool_]) -> Iterator[Extent]:
    """The runs of set entries."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield Extent(start, end - start)

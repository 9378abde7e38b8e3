"""T: the target blocks that have an op in C, as runs and as pieces of work, in ascending order."""

from collections.abc import Iterator

import numpy as np

from snapd.block.extent import Extent
from snapd.cow.blockmap import BlockMap

_WINDOW_BLOCKS = 1 << 20
_GAP_BYTES = 64 << 10


class Targets:
    """T of one block map; a piece has at most `piece_bytes`."""

    def __init__(self, block_map: BlockMap, piece_bytes: int) -> None:
        self._op_of_block = np.frombuffer(block_map.op_of_block, dtype=np.int32)
        self._piece_blocks = max(1, piece_bytes // block_map.block_size)
        self._gap_blocks = _GAP_BYTES // block_map.block_size

    def count(self, start: int, end: int) -> int:
        """How many blocks of [start, end) are in T."""
        return int(np.count_nonzero(self._op_of_block[start:end] >= 0))

    def mask(self, extent: Extent) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which blocks of the extent are in T."""
        return self._op_of_block[extent.start : extent.end] >= 0

    def runs(self, block: int) -> Iterator[Extent]:
        """The runs of T from `block` on."""
        while block < len(self._op_of_block):
            window = self._op_of_block[block : block + _WINDOW_BLOCKS] >= 0
            for run in true_runs(window):
                yield Extent(block + run.start, run.length)
            block += len(window)

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


def true_runs(mask: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Iterator[Extent]:
    """The runs of set entries."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield Extent(start, end - start)

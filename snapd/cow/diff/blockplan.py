"""What each target block shall become, as far as it is decided: one entry a block, a few bytes each."""

from collections.abc import Callable, Iterator

import numpy as np

from snapd.block.extent import Extent
from snapd.cow.diff.blockrows import NONE, Flags, Ints
from snapd.cow.diff.blockscan import CHANGED, UNCHANGED, ZERO, BlockScan
from snapd.cow.diff.copyfind import NO_SOURCE, Blocks
from snapd.cow.diff.copyorder import CopyOrder
from snapd.cow.diff.unitcoder import SourceOf
from snapd.cow.format import BLOCK_SIZE

_PIECE_BLOCKS = 1 << 20


class BlockPlan:
    """Begins with every changed block that is neither zero nor a copy as `stored`.

    An op that reads another block than its own has that in `reads` (else `NO_SOURCE`) and in `reads_next` whether it
    reads the block behind it, too; it is a copy unless `is_xor`.
    """

    def __init__(self, scan: BlockScan, copy_of: Blocks, moved: Ints | None) -> None:
        """`copy_of` as from `find_copies`, `moved` as from `find_moved`."""
        self.reads = copy_of
        self.reads_next = np.zeros(len(copy_of), dtype=np.bool_)
        self.is_xor = np.zeros(len(copy_of), dtype=np.bool_)
        self.stored: Flags = (scan.kind == CHANGED) & (copy_of == NO_SOURCE)
        self.zero: Flags = scan.kind == ZERO
        self.unchanged_blocks = int(np.count_nonzero(scan.kind == UNCHANGED))
        self.similar = scan.similar
        self._moved = moved

    @property
    def has_moved(self) -> Flags | None:
        """The blocks for which a moved source was found; None when none was looked for."""
        return None if self._moved is None else self._moved != NONE

    def same_place(self, blocks: Ints) -> Ints:
        """For each of these blocks the source byte at its own place, or NONE where what is there is too different."""
        return np.where(self.similar[blocks], blocks * BLOCK_SIZE, NONE)

    def closest(self, blocks: Ints) -> Ints:
        """The source byte, moved or not, from which each of these blocks differs least, or NONE."""
        same = self.same_place(blocks)
        return same if self._moved is None else np.where(self._moved[blocks] == NONE, same, self._moved[blocks])

    def moved_xor(self, blocks: Ints) -> Ints:
        """The source byte of each of these blocks that is decided to be the XOR of a moved one, or NONE."""
        if self._moved is None:
            return np.full(len(blocks), NONE)
        return np.where(self.is_xor[blocks], self._moved[blocks], NONE)

    def make_moved_xor(self, block: int, source: int) -> None:
        """Decide that a stored block is the XOR of the source from this byte on."""
        self.stored[block] = False
        self.is_xor[block] = True
        self.reads[block] = source // BLOCK_SIZE
        self.reads_next[block] = source % BLOCK_SIZE != 0

    def in_merge_order(self, weigh: Callable[[Ints, SourceOf, SourceOf], Ints]) -> Iterator[int]:
        """The blocks whose ops read other blocks than their own, so that they merge as they come.

        What must be given up for that is stored again; `weigh` is that of a `UnitCoder`.
        """
        given_up = self.reads != NO_SOURCE
        order = CopyOrder(self.reads, self.reads_next, self.is_xor)
        for run in order.emit(lambda blocks: weigh(blocks, self.same_place, self.moved_xor)):
            yield from range(run.block, run.block + run.step * run.length, run.step)
        given_up &= self.reads == NO_SOURCE
        self.stored |= given_up
        self.is_xor &= ~given_up


def extents(flags: Flags, *, limit: int, having: Flags | None = None) -> Iterator[Extent]:
    """The runs of blocks with a flag, ascending, cut to at most `limit`; only those that have one of the other flags.

    The flags must not change before the last extent was taken.
    """
    for start in range(0, len(flags), _PIECE_BLOCKS):
        blocks = np.flatnonzero(flags[start : start + _PIECE_BLOCKS]) + start
        if not len(blocks):
            continue
        first = 0
        for end in np.append(np.flatnonzero(np.diff(blocks) != 1) + 1, len(blocks)).tolist():
            while first < end:
                piece = min(first + limit, end)
                extent = Extent(int(blocks[first]), piece - first)
                if having is None or having[extent.start : extent.end].any():
                    yield extent
                first = piece

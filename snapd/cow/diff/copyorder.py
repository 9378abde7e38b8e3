"""The order in which ops that read the source are written, so that an ordered merge takes them as they come.

An ordered merge overwrites the image it reads from. So an op that reads a block comes before any other op that
overwrites it (COW-75); it may overwrite what it reads itself. A reversible merge needs none of this (UNDO-6); files
are written in such an order so that both kinds of merge take them.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from snapd.cow.diff.blockrows import NONE, Flags, Ints
from snapd.cow.diff.copyfind import NO_SOURCE, Blocks
from snapd.cow.diff.cycles import Weigh, give_up

_PIECE_BLOCKS = 1 << 20


class OrderedRun(NamedTuple):
    """`length` target blocks from `block`, going up or down by `step`."""

    block: int
    length: int
    step: int


class CopyOrder:
    """Puts ops into an order that merges, and picks those that must be given up (COW-79, COW-157).

    `reads[t]` is the source block that the op of target block t reads, or `NO_SOURCE`; where `reads_next[t]` it reads
    the one behind, too. `is_xor` tells what is no copy. No copy reads its own block.
    """

    def __init__(self, reads: Blocks, reads_next: Flags, is_xor: Flags) -> None:
        self._reads_array, self._next_array, self._is_xor = reads, reads_next, is_xor
        self._reads, self._reads_next = reads.data, reads_next.data
        self._readers_array = readers = np.zeros(len(reads), dtype=np.uint32)
        self._readers = readers.data
        self._free = bytearray(len(reads))
        for start in range(0, len(reads), _PIECE_BLOCKS):
            ops = np.flatnonzero(reads[start : start + _PIECE_BLOCKS] != NO_SOURCE) + start
            for read in self._read_by(ops):
                np.add.at(readers, read[read >= 0], 1)
        np.frombuffer(self._free, dtype=np.bool_)[:] = (reads != NO_SOURCE) & (readers == 0)
        # Free blocks from the cursor on are found by scanning, those that get free behind it are kept here.
        self._cursor = 0
        self._behind = array("I")

    def emit(self, weigh: Weigh) -> Iterator[OrderedRun]:
        """The ops in an order that merges; for one that is given up, `reads` becomes `NO_SOURCE`.

        `weigh` gets target blocks and tells how many bytes it costs to give up the op of each.
        """
        yield from self._drain()
        self._open_cycles(weigh)
        yield from self._drain()

    def _open_cycles(self, weigh: Weigh) -> None:
        """Give up what must be, all of it before anything goes on, so that runs stay runs."""
        stuck = np.flatnonzero((self._readers_array > 0) & (self._reads_array != NO_SOURCE))
        if not len(stuck):
            return
        first, second = (_positions(stuck, read) for read in self._read_by(stuck))
        first, second = np.where(first < 0, second, first), np.where(first < 0, NONE, second)
        given_up = stuck[give_up(first, second, self._is_xor[stuck], lambda ops: weigh(stuck[ops]))]
        freed = np.concatenate(self._read_by(given_up))
        self._reads_array[given_up] = NO_SOURCE
        for block in freed[freed >= 0].tolist():
            self._release(block)

    def _drain(self) -> Iterator[OrderedRun]:
        free, reads, reads_next = self._free, self._reads, self._reads_next
        while (block := self._next_free()) >= 0:
            # What moved up frees the blocks below it, what moved down those above (COW-77).
            step = 1 if reads[block] + reads_next[block] > block else -1
            while 0 <= block - step < len(free) and free[block - step]:
                block -= step
            first = block
            while 0 <= block < len(free) and free[block]:
                free[block] = 0
                self._release_reads(block)
                block += step
            yield OrderedRun(first, abs(block - first), step)

    def _next_free(self) -> int:
        while self._behind:
            block = self._behind.pop()
            if self._free[block]:
                return block
        found = self._free.find(1, self._cursor)
        self._cursor = len(self._free) if found < 0 else found
        return found

    def _release_reads(self, block: int) -> None:
        """The op of this block does not stand before those that overwrite what it reads any more."""
        read = self._reads[block]
        if read != block and read < len(self._free):
            self._release(read)
        if self._reads_next[block] and read + 1 != block and read + 1 < len(self._free):
            self._release(read + 1)

    def _release(self, block: int) -> None:
        self._readers[block] -= 1
        if not self._readers[block] and self._reads[block] != NO_SOURCE:
            self._free[block] = 1
            if block < self._cursor:
                self._behind.append(block)

    def _read_by(self, blocks: Ints) -> tuple[Ints, Ints]:
        """The blocks that the ops of `blocks` read and other ops could overwrite: two each, or NONE."""
        read = self._reads_array[blocks].astype(np.int64)
        behind = np.where(self._next_array[blocks], read + 1, NONE)
        return self._overwritten(blocks, read), self._overwritten(blocks, behind)

    def _overwritten(self, blocks: Ints, read: Ints) -> Ints:
        return np.where((read != blocks) & (read < len(self._free)), read, NONE)


def _positions(blocks: Ints, wanted: Ints) -> Ints:
    """Where each of the `wanted` is among the ascending `blocks`, or NONE."""
    place = np.searchsorted(blocks, wanted).clip(max=len(blocks) - 1)
    return np.where(blocks[place] == wanted, place, NONE)

"""The order in which an ordered merge may take the ops of a COW: how to make one, and how to check one.

An ordered merge overwrites the image it copies from. So an op that reads a block comes before any other op that
overwrites it (COW-75), and ops that read nothing come last (COW-74). A reversible merge needs none of this
(UNDO-6); files are written in such an order so that both kinds of merge take them.
"""

import heapq
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from snapd.cow.format import OpType
from snapd.cow.reader import CowFile

_Int = npt.NDArray[np.int64]
NO_SOURCE = -1


def merge_list(cow: CowFile) -> _Int:
    """Op indices in merge order (COW-69, COW-70): the sequence, then the rest by block; without one, the stream."""
    if not len(cow.sequence):
        return np.arange(len(cow.type))
    by_block = np.argsort(cow.new_block, kind="stable")
    listed = by_block[np.searchsorted(cow.new_block, cow.sequence, sorter=by_block)]
    rest = by_block[~np.isin(by_block, listed)]
    return np.concatenate([listed, rest])


def order_fault(cow: CowFile) -> str:
    """Why an ordered merge must refuse this file (COW-76); empty when it need not."""
    order = merge_list(cow)
    ordered = cow.type[order] == OpType.COPY
    late = np.flatnonzero(ordered & (np.cumsum(~ordered) > 0))
    if len(late):
        return f"op {order[late[0]]}: a copy after an op that reads nothing (COW-74)"
    copies = order[ordered]
    by_block = np.argsort(cow.new_block[copies], kind="stable")
    targets = cow.new_block[copies][by_block]
    sources = cow.source[copies]
    place = np.searchsorted(targets, sources).clip(max=max(len(targets) - 1, 0))
    # Position in the merge at which the block that is read gets overwritten; itself is allowed.
    early = (targets[place] == sources) & (by_block[place] < np.arange(len(copies))) if len(copies) else ordered[:0]
    if early.any():
        i = int(early.argmax())
        return f"op {copies[i]}: reads block {sources[i]}, which an op before it overwrites (COW-75)"
    return ""


class CopyOrder:
    """Puts copies into an order that merges, and picks what must not be a copy (COW-79, COW-157).

    `source[t]` is the block that target t copies, or `NO_SOURCE`; no block copies itself. Every target reads one
    block, so what is left when nothing is free any more are plain cycles, and one block less opens each.
    """

    def __init__(self, source: _Int) -> None:
        count = len(source)
        self._copies = np.flatnonzero(source >= 0)
        read = source[self._copies]
        readers = np.bincount(read[read < count], minlength=count).astype(np.int32)
        self._source = source.data
        self._readers = readers.data
        self._free = bytearray(((source >= 0) & (readers == 0)).tobytes())
        # Free blocks from the cursor on are found by scanning, those that get free behind it are kept here.
        self._cursor = 0
        self._behind: list[int] = []

    def emit(self, copy: Callable[[int, int], None]) -> None:
        """Call `copy(target, source)` in merge order, in runs; a target that opens a cycle becomes `NO_SOURCE`."""
        self._drain(copy)
        self._open_cycles()
        self._drain(copy)

    def _open_cycles(self) -> None:
        """Give up the lowest block of every cycle; all of them before anything goes on, so that runs stay runs."""
        source, seen = self._source, bytearray(len(self._free))
        for block in self._copies.data:
            if not self._readers[block] or source[block] < 0 or seen[block]:
                continue
            member = block
            while not seen[member]:
                seen[member] = 1
                member = source[member]
            freed = source[block]
            source[block] = NO_SOURCE
            self._release(freed)

    def _drain(self, copy: Callable[[int, int], None]) -> None:
        free, source = self._free, self._source
        while (block := self._next_free()) >= 0:
            # What moved up frees the blocks below it, what moved down those above (COW-77).
            step = 1
            if source[block] < block:
                step = -1
                while block + 1 < len(free) and free[block + 1]:
                    block += 1
            while 0 <= block < len(free) and free[block]:
                free[block] = 0
                copy(block, source[block])
                self._release(source[block])
                block += step

    def _next_free(self) -> int:
        while self._behind:
            block = heapq.heappop(self._behind)
            if self._free[block]:
                return block
        found = self._free.find(1, self._cursor)
        self._cursor = len(self._free) if found < 0 else found
        return found

    def _release(self, block: int) -> None:
        if block >= len(self._free):
            return
        self._readers[block] -= 1
        if not self._readers[block] and self._source[block] >= 0:
            self._free[block] = 1
            if block < self._cursor:
                heapq.heappush(self._behind, block)

"""Moved data: for target blocks the bytes of the source, at any offset, from which they differ least (COW-187).

Each anchor of a target block that the source has, too, says by how far the content moved, and most of them decide.
Content moves in stretches, so a block also tries the distances of the nearest blocks before and behind it that have
one, copies included. Whatever is tried is compared byte by byte, and only what is closer than the block's own place
counts.

Whether the difference is worth an XOR op is not decided here.
"""

from collections.abc import Callable, Iterator

import numpy as np

from snapd.block.store import Store
from snapd.cow.diff.anchors import AnchorIndex, Picker
from snapd.cow.diff.blockrows import NONE, Flags, Ints, RowComparer, as_words, read_rows
from snapd.cow.diff.blockscan import SIMILAR_BYTES, UNCHANGED, ZERO, BlockScan
from snapd.cow.diff.copyfind import NO_SOURCE, Blocks
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Meter

_Starts = tuple[Ints, Ints]

_TASK_BLOCKS = 256
_SLICE_BLOCKS = 1 << 16


def find_moved(
    source: Store, target: Store, scan: BlockScan, copy_of: Blocks, options: CreateOptions, meter: Meter
) -> Ints:
    """For every target block the byte of the source where what it should be the XOR of begins, or NONE.

    Looked for are sources for the changed blocks that are no copies, anywhere but at their own place. The meter gets
    the bytes of both images.
    """
    search = _Search(source, target, scan, options, AnchorIndex(source, options.jobs, meter))
    moved = np.full(len(copy_of), NONE, dtype=np.int64)
    wanted = (scan.kind != UNCHANGED) & (scan.kind != ZERO) & (copy_of == NO_SOURCE)
    search.vote(moved, wanted)
    search.settle(moved, wanted, copy_of, meter)
    return moved


class _Search:
    """The two steps of a search, each on threads."""

    def __init__(
        self, source: Store, target: Store, scan: BlockScan, options: CreateOptions, index: AnchorIndex
    ) -> None:
        self._source = source
        self._target = target
        self._scan = scan
        self._jobs = options.jobs
        self._index = index
        self._last_start = source.size() - BLOCK_SIZE

    def vote(self, moved: Ints, wanted: Flags) -> None:
        """Put where the anchors of each wanted block say that it comes from."""
        for blocks, starts in self._pool().run(map(self._count_votes, _pieces(np.flatnonzero(wanted)))):
            moved[blocks] = starts

    def settle(self, moved: Ints, wanted: Flags, copy_of: Blocks, meter: Meter) -> None:
        """Of the places that the votes of a block and its neighbours name, keep the closest."""
        for blocks, starts in self._pool().run(map(self._pick_closest, self._tries(moved, wanted, copy_of, meter))):
            moved[blocks] = starts

    def _count_votes(self, blocks: Ints) -> Callable[["_Workbench"], _Starts]:
        def work(bench: _Workbench) -> _Starts:
            read_rows(self._target, (blocks * BLOCK_SIZE).tolist(), bench.new)
            places, keys = bench.picker.pick(bench.new[: len(blocks) * BLOCK_SIZE])
            found = self._index.find(keys)
            places, found = places[found != NONE], found[found != NONE]
            row, within = np.divmod(places, BLOCK_SIZE)
            start = found - within
            # Together are now the equal votes of a row; the most frequent one comes first in its row, then the lowest.
            order = np.lexsort((start, row))
            row, start = row[order], start[order]
            first = np.flatnonzero((np.diff(row, prepend=NONE) != 0) | (np.diff(start, prepend=NONE) != 0))
            votes = np.diff(first, append=len(row))
            order = np.lexsort((start[first], -votes, row[first]))
            rows, at = np.unique(row[first][order], return_index=True)
            return blocks[rows], self._inside(start[first][order][at])

        return work

    def _tries(self, moved: Ints, wanted: Flags, copy_of: Blocks, meter: Meter) -> Iterator[tuple[Ints, Ints]]:
        """The wanted blocks in pieces, and the places to try: as the block before, as voted, as the block behind."""
        carried = 0
        for start in range(0, len(moved), _SLICE_BLOCKS):
            blocks = np.arange(start, min(start + _SLICE_BLOCKS, len(moved)))
            places = np.where(self._scan.kind[blocks] == UNCHANGED, blocks * BLOCK_SIZE, moved[blocks])
            copies = copy_of[blocks] != NO_SOURCE
            places[copies] = copy_of[blocks[copies]].astype(np.int64) * BLOCK_SIZE
            distance, known = places - blocks * BLOCK_SIZE, np.flatnonzero(places != NONE)
            distances = np.concatenate([[carried], distance[known], [0]])
            carried = int(distances[len(known)])
            rows = np.flatnonzero(wanted[blocks])
            before = np.searchsorted(known, rows, side="left")
            behind = np.searchsorted(known, rows, side="right") + 1
            own = rows * BLOCK_SIZE + start * BLOCK_SIZE
            tries = np.stack(
                [self._inside(own + distances[before]), moved[blocks[rows]], self._inside(own + distances[behind])]
            )
            # Its own place is compared anyway, and no place is worth a second look.
            tries[tries == own] = NONE
            tries[1][tries[1] == tries[0]] = NONE
            tries[2][(tries[2] == tries[0]) | (tries[2] == tries[1])] = NONE
            for at in range(0, len(rows), _TASK_BLOCKS):
                yield blocks[rows[at : at + _TASK_BLOCKS]], tries[:, at : at + _TASK_BLOCKS]
            meter.add(len(blocks) * BLOCK_SIZE)

    def _pick_closest(self, task: tuple[Ints, Ints]) -> Callable[["_Workbench"], _Starts]:
        blocks, tries = task

        def work(bench: _Workbench) -> _Starts:
            own = blocks * BLOCK_SIZE
            read_rows(self._target, own.tolist(), bench.new)
            new = as_words(bench.new, len(blocks))
            closest = np.full(len(blocks), NONE, dtype=np.int64)
            most = np.full(len(blocks), SIMILAR_BYTES - 1)
            for starts in (np.where(self._scan.similar[blocks], own, NONE), *tries):
                rows = np.flatnonzero(starts != NONE)
                read_rows(self._source, starts[rows].tolist(), bench.old)
                old = as_words(bench.old, len(rows))
                equal = bench.comparer.equal_bytes(new, rows, old, np.arange(len(rows)))
                rows, equal = rows[equal > most[rows]], equal[equal > most[rows]]
                most[rows], closest[rows] = equal, starts[rows]
            closest[closest == own] = NONE
            return blocks, closest

        return work

    def _inside(self, starts: Ints) -> Ints:
        """Those of the places where the source has a whole block, NONE for the others."""
        return np.where((starts >= 0) & (starts <= self._last_start), starts, NONE)

    def _pool(self) -> "OrderedPool[_Workbench, _Starts]":
        return OrderedPool(self._jobs, in_flight=2 * self._jobs, make_state=lambda: _Workbench(self._index.bits))


class _Workbench:
    """What one thread works with: room for the blocks of a task, and for looking at them."""

    def __init__(self, bits: int) -> None:
        self.new = memoryview(bytearray(_TASK_BLOCKS * BLOCK_SIZE))
        self.old = memoryview(bytearray(_TASK_BLOCKS * BLOCK_SIZE))
        self.picker = Picker(bits, len(self.new))
        self.comparer = RowComparer(_TASK_BLOCKS)


def _pieces(blocks: Ints) -> Iterator[Ints]:
    for start in range(0, len(blocks), _TASK_BLOCKS):
        yield blocks[start : start + _TASK_BLOCKS]

"""Which changed target blocks the source has as they are, and where.

A block is found by its hash, and a find counts only after both blocks were compared byte for byte. Of several equal
source blocks the one that goes on where the last copy was is taken, else the lowest (COW-157). Blocks are looked up by
one part of the hash space after the other, so that the index never has more than a few million entries.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from snapd.block.store import Store
from snapd.cow.diff.blockrows import Ints, RowComparer, as_words, read_rows
from snapd.cow.diff.blockscan import CHANGED, BlockScan, Hashes
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.pool import OrderedPool

Blocks = npt.NDArray[np.uint32]

NO_SOURCE = (1 << 32) - 1
"""In place of a source block where there is none."""

_INDEX_BLOCKS = 1 << 20
_PIECE_BLOCKS = 1 << 20
_COMPARED_BLOCKS = 256


def find_copies(source: Store, target: Store, scan: BlockScan, jobs: int) -> Blocks:
    """For every target block the source block that it is a copy of, or `NO_SOURCE`."""
    copy_of = np.full(len(scan.kind), NO_SOURCE, dtype=np.uint32)
    _find_lowest(scan, copy_of)
    _prefer_runs(scan, copy_of)
    _drop_unequal(source, target, copy_of, jobs)
    return copy_of


def _find_lowest(scan: BlockScan, copy_of: Blocks) -> None:
    """Put the lowest source block with the same hash."""
    parts = -(-len(scan.source_hash) // _INDEX_BLOCKS)
    for part in range(parts):
        rows = np.concatenate([rows for rows, _ in _part_of(scan.source_hash, part, parts)])
        hashes = scan.source_hash[rows]
        order = np.argsort(hashes, kind="stable")
        rows, hashes = rows[order], hashes[order]
        if not len(rows):
            continue
        for blocks, wanted in _part_of(scan.target_hash, part, parts):
            changed = scan.kind[blocks] == CHANGED
            blocks, wanted = blocks[changed], wanted[changed]
            place = np.searchsorted(hashes, wanted).clip(max=len(rows) - 1)
            hit = hashes[place] == wanted
            copy_of[blocks[hit]] = rows[place[hit]]


def _part_of(hashes: Hashes, part: int, parts: int) -> Iterator[tuple[Ints, Hashes]]:
    """The entries that fall into one of `parts` equal parts of the hash space, with their hashes, piece by piece."""
    for start in range(0, len(hashes), _PIECE_BLOCKS):
        piece = hashes[start : start + _PIECE_BLOCKS]
        rows = np.flatnonzero(piece % np.uint64(parts) == part)
        yield rows + start, piece[rows]


def _prefer_runs(scan: BlockScan, copy_of: Blocks) -> None:
    """Where a run of copies ends, let it go on as long as the source blocks behind it are equal, too."""
    source_hash, target_hash, distance = scan.source_hash.data, scan.target_hash.data, 0
    for start in range(0, len(copy_of), _PIECE_BLOCKS):
        copies = np.flatnonzero(copy_of[start : start + _PIECE_BLOCKS] != NO_SOURCE) + start
        shifts = copy_of[copies].astype(np.int64) - copies
        breaks = np.flatnonzero(np.diff(shifts, prepend=distance))
        block, shift, settled = copies.data, shifts.data, 0
        for i in breaks.data:
            if i < settled:
                continue
            distance = shift[i - 1] if i else distance
            while i < len(block) and shift[i] != distance:
                near = block[i] + distance
                if not 0 <= near < len(source_hash) or source_hash[near] != target_hash[block[i]]:
                    break
                shift[i] = distance
                i += 1
            settled = i
        copy_of[copies] = copies + shifts
        distance = int(shifts[-1]) if len(shifts) else distance


def _drop_unequal(source: Store, target: Store, copy_of: Blocks, jobs: int) -> None:
    """Give up the copies whose bytes differ: equal hashes are not equal blocks."""

    def compare(blocks: Ints) -> Callable[[_Buffers], Ints]:
        def work(buffers: _Buffers) -> Ints:
            read_rows(target, (blocks * BLOCK_SIZE).tolist(), buffers.new)
            read_rows(source, (copy_of[blocks].astype(np.int64) * BLOCK_SIZE).tolist(), buffers.old)
            new, old = as_words(buffers.new, len(blocks)), as_words(buffers.old, len(blocks))
            return blocks[buffers.comparer.differ(new, old)]

        return work

    pool: OrderedPool[_Buffers, Ints] = OrderedPool(jobs, in_flight=2 * jobs, make_state=_Buffers)
    for unequal in pool.run(compare(blocks) for blocks in _pieces(copy_of)):
        copy_of[unequal] = NO_SOURCE


def _pieces(copy_of: Blocks) -> Iterator[Ints]:
    """The target blocks that are copies, ascending, in pieces that fill the buffers at most."""
    for start in range(0, len(copy_of), _PIECE_BLOCKS):
        copies = np.flatnonzero(copy_of[start : start + _PIECE_BLOCKS] != NO_SOURCE) + start
        for at in range(0, len(copies), _COMPARED_BLOCKS):
            yield copies[at : at + _COMPARED_BLOCKS]


class _Buffers:
    """What one thread reads blocks of each image into, and compares with."""

    def __init__(self) -> None:
        self.new = memoryview(bytearray(_COMPARED_BLOCKS * BLOCK_SIZE))
        self.old = memoryview(bytearray(_COMPARED_BLOCKS * BLOCK_SIZE))
        self.comparer = RowComparer(_COMPARED_BLOCKS)

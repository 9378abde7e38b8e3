"""The first look at two images: what of the target is unchanged, zero, or changed, and what every block hashes to.

Each image is read once, in chunks, on threads. What is kept is 8 bytes a block of each image and 2 a target block.
The hashes find blocks again and are the digests of the target's blocks (COW-216); equal hashes alone prove nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from snapd.block.holes import SparseReader
from snapd.block.store import Store
from snapd.cow.diff.blockrows import Flags, RowComparer, are_data, as_words
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.digests import block_digest
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Meter

Hashes = npt.NDArray[np.uint64]

UNCHANGED, ZERO, CHANGED = 0, 1, 2

_CHUNK_BLOCKS = 256
_CHUNK_BYTES = _CHUNK_BLOCKS * BLOCK_SIZE
_ZEROS = bytes(_CHUNK_BYTES)
_ZERO_HASH = block_digest(_ZEROS[:BLOCK_SIZE])
SIMILAR_BYTES = BLOCK_SIZE * 3 // 8
"""Of blocks that have fewer bytes in common the difference hardly ever compresses better than the block."""


@dataclass(frozen=True, slots=True)
class BlockScan:
    """One entry a block: xxh3-64 (never 0) of source and target; of the target also UNCHANGED, ZERO or CHANGED.

    `similar` says of a changed block that many of its bytes are those of the source at the same place.
    """

    source_hash: Hashes
    target_hash: Hashes
    kind: npt.NDArray[np.uint8]
    similar: Flags


def scan_images(source: Store, target: Store, options: CreateOptions, meter: Meter) -> BlockScan:
    """Compare and hash two images of whole blocks; the meter gets the bytes of the longer one."""
    source_blocks, target_blocks = source.size() // BLOCK_SIZE, target.size() // BLOCK_SIZE
    scan = BlockScan(
        source_hash=np.zeros(source_blocks, dtype=np.uint64),
        target_hash=np.zeros(target_blocks, dtype=np.uint64),
        kind=np.zeros(target_blocks, dtype=np.uint8),
        similar=np.zeros(target_blocks, dtype=np.bool_),
    )
    scanner = _Scanner(source, target, scan, with_similar=options.has_xor)
    blocks = max(source_blocks, target_blocks)
    chunks = (scanner.chunk(start, min(start + _CHUNK_BLOCKS, blocks)) for start in range(0, blocks, _CHUNK_BLOCKS))
    pool: OrderedPool[_Buffers, int] = OrderedPool(options.jobs, in_flight=2 * options.jobs, make_state=_Buffers)
    for done in pool.run(chunks):
        meter.add(done)
    return scan


class _Buffers:
    """What one thread reads into, and compares with."""

    def __init__(self) -> None:
        self.old = memoryview(bytearray(_CHUNK_BYTES))
        self.new = memoryview(bytearray(_CHUNK_BYTES))
        self.comparer = RowComparer(_CHUNK_BLOCKS)


class _Chunk:
    """The blocks of one image in a chunk: `raw`, and the same as rows of 64-bit words."""

    def __init__(self, image: SparseReader, buffer: memoryview, start: int, end: int) -> None:
        length = max(0, end - start) * BLOCK_SIZE
        self.is_hole = length > 0 and not image.read(buffer[:length], start * BLOCK_SIZE)
        self.raw = memoryview(_ZEROS)[:length] if self.is_hole else buffer[:length]
        self.rows = as_words(self.raw, len(self.raw) // BLOCK_SIZE)

    def hash_rows(self, rows: range | list[int]) -> Hashes:
        """The hash of each of these rows."""
        if self.is_hole:
            return np.full(len(rows), _ZERO_HASH, dtype=np.uint64)
        blocks = [self.raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE] for row in rows]
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, blocks), dtype=np.uint64, count=len(blocks))
        hashes[hashes == 0] = 1
        return hashes


class _Scanner:
    """Fills in a scan; every chunk writes entries of its own."""

    def __init__(self, source: Store, target: Store, scan: BlockScan, *, with_similar: bool) -> None:
        self._source = SparseReader(source)
        self._target = SparseReader(target)
        self._scan = scan
        self._with_similar = with_similar

    def chunk(self, start: int, end: int) -> Callable[[_Buffers], int]:
        """The work on blocks [start, end) of both images; it returns their bytes."""

        def work(buffers: _Buffers) -> int:
            scan = self._scan
            old = _Chunk(self._source, buffers.old, start, min(end, len(scan.source_hash)))
            new = _Chunk(self._target, buffers.new, start, min(end, len(scan.target_hash)))
            scan.source_hash[start : start + len(old.rows)] = old.hash_rows(range(len(old.rows)))
            self._compare(start, old, new, buffers.comparer)
            return (end - start) * BLOCK_SIZE

        return work

    def _compare(self, start: int, old: _Chunk, new: _Chunk, comparer: RowComparer) -> None:
        scan, both = self._scan, min(len(old.rows), len(new.rows))
        target_hash = scan.target_hash[start : start + len(new.rows)]
        target_hash[:both] = scan.source_hash[start : start + both]
        changed = np.ones(len(new.rows), dtype=np.bool_)
        if old.is_hole and new.is_hole:
            changed[:both] = False
        else:
            changed[:both] = comparer.differ(old.rows[:both], new.rows[:both])
        rows = np.flatnonzero(changed)
        if not len(rows):
            return
        is_data = are_data(new.rows, rows)
        scan.kind[start + rows] = np.where(is_data, CHANGED, ZERO)
        target_hash[rows[~is_data]] = _ZERO_HASH
        rows = rows[is_data]
        target_hash[rows] = new.hash_rows(rows.tolist())
        if self._with_similar and not old.is_hole:
            rows = rows[rows < both]
            scan.similar[start + rows] = comparer.equal_bytes(old.rows, rows, new.rows, rows) >= SIMILAR_BYTES

"""The difference of two images as ops: what makes the source the target, in an order that any merge takes.

Every target block is, in this priority, unchanged (no op), zero, a copy of a source block, or stored (COW-157).
Blocks are found again by xxh3-64, and a hit counts only after its bytes were compared. Two passes: the first
reads both images once and keeps 8 bytes a block, the second reads what is copied or stored. Memory is bounded by
that index and a few MiB. The result depends on the images and options only, never on threads.
"""

import concurrent.futures
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.block.store import Readable, Store, read_bytes
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.mergeorder import NO_SOURCE, CopyOrder
from snapd.cow.writer import CowWriter, unit_lengths

_Int = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]

_CHUNK_BLOCKS = 1024
# A multiple of every unit, so that cutting a run here never shortens a unit.
_TASK_BLOCKS = 256
_THREADS = 2
_TASKS_IN_FLIGHT = 8

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class DiffCounts:
    """How many target blocks became what."""

    unchanged_blocks: int
    zero_blocks: int
    copy_blocks: int
    replace_blocks: int


class Diff:
    """The ops between two images, whose sizes are multiples of 4096 and not zero (EINVAL else).

    The images must not change meanwhile.
    """

    def __init__(self, source: Store, target: Store, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._source_blocks = _block_count(source, "source")
        self.target_blocks = _block_count(target, "target")
        self._progress = progress
        self._changed = np.zeros(self.target_blocks, dtype=np.bool_)
        self._zero = np.zeros(self.target_blocks, dtype=np.bool_)
        self._source_hash = np.zeros(self._source_blocks, dtype=np.uint64)
        self._target_hash = np.zeros(self.target_blocks, dtype=np.uint64)

    def write(self, writer: CowWriter, option: CompressOption, unit: int) -> DiffCounts:
        """Append the ops to `writer`: copies, then zeros, then what is stored (COW-74, COW-154)."""
        self._scan()
        copy_of = self._find_copies()
        self._check_copies(copy_of)
        CopyOrder(copy_of).emit(writer.copy)
        for block in np.flatnonzero(self._zero).data:
            writer.zero(block)
        stored = self._changed & ~self._zero & (copy_of == NO_SOURCE)
        counts = DiffCounts(
            unchanged_blocks=int((~self._changed).sum()),
            zero_blocks=int(self._zero.sum()),
            copy_blocks=int((copy_of != NO_SOURCE).sum()),
            replace_blocks=int(stored.sum()),
        )
        self._store_blocks(stored, writer, option, unit // BLOCK_SIZE)
        return counts

    def _scan(self) -> None:
        """Hash the source, and of the target what is neither unchanged nor zero."""
        for start in range(0, max(self._source_blocks, self.target_blocks), _CHUNK_BLOCKS):
            old = _read_blocks(self._source, start, min(self._source_blocks, start + _CHUNK_BLOCKS))
            new = _read_blocks(self._target, start, min(self.target_blocks, start + _CHUNK_BLOCKS))
            _hash_blocks(old, range(len(old)), self._source_hash[start:])
            both = min(len(old), len(new))
            changed = np.ones(len(new), dtype=np.bool_)
            changed[:both] = (old[:both] != new[:both]).any(axis=1)
            zero = changed & ~new.any(axis=1)
            self._changed[start : start + len(new)] = changed
            self._zero[start : start + len(new)] = zero
            _hash_blocks(new, np.flatnonzero(changed & ~zero).tolist(), self._target_hash[start:])
            done = min(start + _CHUNK_BLOCKS, self.target_blocks)
            self._progress(done * BLOCK_SIZE, 2 * self.target_blocks * BLOCK_SIZE)

    def _find_copies(self) -> _Int:
        """For every target block a source block of the same hash, or `NO_SOURCE`; runs stay runs."""
        copy_of = np.full(self.target_blocks, NO_SOURCE, dtype=np.int64)
        wanted = np.flatnonzero(self._changed & ~self._zero)
        order = np.argsort(self._source_hash, kind="stable")
        ordered = self._source_hash[order]
        # In pieces: the lookups of a whole image at once would need several times the index.
        for start in range(0, len(wanted), 1 << 20):
            blocks = wanted[start : start + (1 << 20)]
            hashes = self._target_hash[blocks]
            place = np.searchsorted(ordered, hashes).clip(max=self._source_blocks - 1)
            hit = ordered[place] == hashes
            self._choose(copy_of, blocks[hit], hashes[hit], order[place[hit]])
        return copy_of

    def _choose(self, copy_of: _Int, blocks: _Int, hashes: _Hashes, lowest: _Int) -> None:
        """Among equal source blocks take the one that goes on where the last copy was, else the lowest."""
        source_hash, chosen = self._source_hash.data, copy_of.data
        shift = 0
        for block, value, source in zip(blocks.data, hashes.data, lowest.data, strict=True):
            near = block + shift
            if 0 <= near < self._source_blocks and source_hash[near] == value:
                source = near
            chosen[block] = source
            shift = source - block

    def _check_copies(self, copy_of: _Int) -> None:
        """Drop the copies whose bytes differ: equal hashes are not equal blocks."""
        for targets, sources in _runs(copy_of):
            old = _read_blocks(self._source, sources.start, sources.end)
            new = _read_blocks(self._target, targets.start, targets.end)
            copy_of[targets.start : targets.end][(old != new).any(axis=1)] = NO_SOURCE

    def _store_blocks(
        self, stored: npt.NDArray[np.bool_], writer: CowWriter, option: CompressOption, unit_blocks: int
    ) -> None:
        total = 2 * self.target_blocks * BLOCK_SIZE
        done = total - int(stored.sum()) * BLOCK_SIZE
        self._progress(done, total)
        for extent, payloads in self._compressed(_extents(np.flatnonzero(stored)), option, unit_blocks):
            block = extent.start
            for blocks, payload in zip(unit_lengths(extent.length, unit_blocks), payloads, strict=True):
                writer.replace(block, blocks, payload)
                block += blocks
            done += extent.length * BLOCK_SIZE
            self._progress(done, total)

    def _compressed(
        self, extents: Iterator[Extent], option: CompressOption, unit_blocks: int
    ) -> Iterator[tuple[Extent, list[bytes]]]:
        """Each extent with the payloads of its units, in order, whichever thread made them."""
        local = threading.local()

        def start_thread() -> None:
            local.encoder = Encoder(option)

        def compress(extent: Extent) -> list[bytes]:
            data = memoryview(read_bytes(self._target, extent.start * BLOCK_SIZE, extent.length * BLOCK_SIZE))
            payloads = []
            for blocks in unit_lengths(extent.length, unit_blocks):
                payloads.append(local.encoder.encode(data[: blocks * BLOCK_SIZE]))
                data = data[blocks * BLOCK_SIZE :]
            return payloads

        tasks: deque[tuple[Extent, concurrent.futures.Future[list[bytes]]]] = deque()
        with concurrent.futures.ThreadPoolExecutor(_THREADS, initializer=start_thread) as pool:
            try:
                for extent in extents:
                    tasks.append((extent, pool.submit(compress, extent)))
                    if len(tasks) == _TASKS_IN_FLIGHT:
                        first, task = tasks.popleft()
                        yield first, task.result()
                while tasks:
                    first, task = tasks.popleft()
                    yield first, task.result()
            finally:
                for _, task in tasks:
                    task.cancel()


def _block_count(image: Store, name: str) -> int:
    """Blocks of an image; EINVAL when it is empty or no multiple of the block size (COW-149)."""
    size = image.size()
    if not size or size % BLOCK_SIZE:
        raise SnapdError(errno.EINVAL, f"{name} of {size} bytes: not a multiple of {BLOCK_SIZE}, or empty (COW-149)")
    return size // BLOCK_SIZE


def _read_blocks(image: Readable, start: int, end: int) -> _Hashes:
    """Blocks [start, end) as rows of 64-bit words; no rows when there are none."""
    raw = bytearray(max(0, end - start) * BLOCK_SIZE)
    if raw:
        image.read_into(raw, start * BLOCK_SIZE)
    return np.frombuffer(raw, dtype=np.uint64).reshape(-1, BLOCK_SIZE // 8)


def _hash_blocks(blocks: _Hashes, rows: range | list[int], out: _Hashes) -> None:
    """Put the hash of each of the `rows` into `out` at the same index."""
    raw = blocks.data.cast("B") if len(blocks) else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest
    hashes = (digest(raw[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE]) for row in rows)
    out[rows] = np.fromiter(hashes, dtype=np.uint64, count=len(rows))


def _runs(copy_of: _Int) -> Iterator[tuple[Extent, Extent]]:
    """The copies as (target extent, source extent), each at most a chunk long."""
    blocks = np.flatnonzero(copy_of >= 0)
    sources = copy_of[blocks]
    breaks = (np.diff(blocks) != 1) | (np.diff(sources) != 1)
    for first, end in _pieces(breaks, len(blocks), _CHUNK_BLOCKS):
        yield Extent(int(blocks[first]), end - first), Extent(int(sources[first]), end - first)


def _extents(blocks: _Int) -> Iterator[Extent]:
    """Ascending block numbers as extents of at most `_TASK_BLOCKS`."""
    for first, end in _pieces(np.diff(blocks) != 1, len(blocks), _TASK_BLOCKS):
        yield Extent(int(blocks[first]), end - first)


def _pieces(breaks: npt.NDArray[np.bool_], count: int, limit: int) -> Iterator[tuple[int, int]]:
    """Index ranges [first, end) between breaks (`breaks[i]`: between i and i + 1), none longer than `limit`."""
    if not count:
        return
    first = 0
    for end in np.append(np.flatnonzero(breaks) + 1, count).data:
        while first < end:
            piece = min(first + limit, end)
            yield first, piece
            first = piece

"""Anchors: places in an image that are picked by their content, so that the same content is found wherever it moved.

Every byte offset is looked at: a place is an anchor when the hash of the eight bytes there is among the highest, and it
is known by a hash of 32. How many there are follows the size of the source, so that the index never has more than about
a million entries: of a small image one place in 64 is an anchor, of a large one fewer.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from snapd.block.holes import SparseReader
from snapd.block.store import Store
from snapd.cow.diff.blockrows import NONE, Ints
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Meter

Keys = npt.NDArray[np.uint64]
_Found = tuple[Ints, Keys]

_CHUNK_BYTES = 1 << 20
_WINDOW_BYTES = 32
_INDEX_ENTRIES = 1 << 20
_MIN_BITS = 6
_PICK = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.array([0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5, 0x85EBCA77C2B2AE63], dtype=np.uint64)
_FOLD = np.uint64(32)


class Picker:
    """Finds the anchors of pieces of at most `size` bytes, about one of `1 << bits` places. For one thread."""

    def __init__(self, bits: int, size: int) -> None:
        # The highest, as zeros hash to zero: an empty range must not be full of anchors.
        self._least = np.uint64((1 << 64) - (1 << (64 - bits)))
        self._most = 16 + (size >> bits) // 4
        self._hashes = np.empty(size // 8, dtype=np.uint64)
        self._picked = np.empty(size // 8, dtype=np.bool_)

    def pick(self, raw: memoryview) -> _Found:
        """Where in `raw` the anchors begin, ascending, and the key of each."""
        found = [np.zeros(0, dtype=np.int64)]
        for shift in range(min(8, len(raw) - _WINDOW_BYTES + 1)):
            count = (len(raw) - _WINDOW_BYTES - shift) // 8 + 1
            hashes, picked = self._hashes[:count], self._picked[:count]
            np.multiply(np.frombuffer(raw, dtype=np.uint64, count=count, offset=shift), _PICK, out=hashes)
            np.greater_equal(hashes, self._least, out=picked)
            words = np.flatnonzero(picked)
            # Of a stretch that repeats itself one is enough; and however many there are, the work is bounded.
            words = words[np.diff(hashes[words], prepend=np.uint64(0)) != 0][: self._most]
            found.append(words * 8 + shift)
        places = np.sort(np.concatenate(found))
        windows = np.frombuffer(raw, dtype=np.uint8)[places[:, None] + np.arange(_WINDOW_BYTES)]
        mixed = (windows.view(np.uint64) * _MIX).sum(axis=1, dtype=np.uint64)
        return places, (mixed ^ mixed >> _FOLD) * _PICK


class AnchorIndex:
    """Where the anchors of an image are; of several with one key the first."""

    def __init__(self, image: Store, jobs: int, meter: Meter) -> None:
        """Read the image once; the meter gets its bytes."""
        size, reader = image.size(), SparseReader(image)
        self.bits = max(_MIN_BITS, (size // _INDEX_ENTRIES).bit_length())
        pool: OrderedPool[_Reader, _Found] = OrderedPool(
            jobs, in_flight=2 * jobs, make_state=lambda: _Reader(reader, size, self.bits)
        )
        places, keys = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
        starts, held = range(0, size, _CHUNK_BYTES), 0
        for start, (found, found_keys) in zip(starts, pool.run(map(_at, starts)), strict=True):
            meter.add(min(_CHUNK_BYTES, size - start))
            held += len(found)
            if held <= 2 * _INDEX_ENTRIES:
                places.append(found)
                keys.append(found_keys)
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def find(self, keys: Keys) -> Ints:
        """Where in the image each of these keys is, or NONE."""
        if not len(self._keys):
            return np.full(len(keys), NONE, dtype=np.int64)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._places[at], NONE)


class _Reader:
    """What one thread reads and picks with."""

    def __init__(self, image: SparseReader, size: int, bits: int) -> None:
        self._image = image
        self._size = size
        # The window of the last place reaches into the next chunk.
        self._buffer = memoryview(bytearray(_CHUNK_BYTES + _WINDOW_BYTES - 1))
        self._picker = Picker(bits, len(self._buffer))

    def pick(self, start: int) -> _Found:
        raw = self._buffer[: self._size - start]
        if not self._image.read(raw, start):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
        places, keys = self._picker.pick(raw)
        return places + start, keys


def _at(start: int) -> Callable[[_Reader], _Found]:
    return lambda reader: reader.pick(start)

"""The cache of decoded units: bounded, shared by threads, and no place for damage."""

import contextlib
import threading
from pathlib import Path
from random import Random
from types import TracebackType

import pytest
from workerimages import WorkerImages

from snapd.block.file import FileStore
from snapd.block.lock import locked_store
from snapd.block.store import Buffer
from snapd.cow.compress import Decoder
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.image.units import UnitCache
from snapd.cow.image.view import CowView


class CountingLock:
    """A lock that tells how often it was given back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.released = threading.Semaphore(0)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        self._lock.release()
        self.released.release()


def never() -> Buffer:
    raise AssertionError("decoded again")


def test_bytes_are_bounded_and_the_least_recently_used_go() -> None:
    """Design 5.5: so many bytes, not so many units; a unit that was looked at stays."""
    cache = UnitCache(100)
    for index in range(4):
        cache.load(index, lambda: bytes(25))
    assert cache.get(0) is not None
    cache.load(4, lambda: bytes(50))
    assert [index for index in range(5) if cache.get(index) is not None] == [0, 3, 4]
    assert cache.held_bytes == 100


def test_one_unit_may_be_larger_than_the_cache() -> None:
    """The unit read last is there, so that reading it in parts decodes it once."""
    cache = UnitCache(10)
    cache.load(1, lambda: bytes(5))
    cache.load(2, lambda: bytes(500))
    assert cache.get(1) is None
    assert bytes(cache.load(2, never)) == bytes(500)


def test_damage_is_not_kept() -> None:
    """COW-120: a unit that failed to decode is tried again by the next, and fails or serves by itself."""
    cache = UnitCache()

    def fail() -> Buffer:
        raise CowError("damaged", statement="COW-120")

    for _ in range(2):
        with pytest.raises(CowError):
            cache.load(1, fail)
    assert cache.get(1) is None
    assert cache.held_bytes == 0
    assert bytes(cache.load(1, lambda: b"healed")) == b"healed"


@pytest.mark.parametrize("first_fails", [False, True])
def test_two_threads_that_want_one_unit_decode_it_once(first_fails: bool) -> None:
    """The second waits for the first; only when that one fails it decodes for itself."""
    cache = UnitCache()
    lock = CountingLock()
    cache._lock = lock  # type: ignore[assignment]
    decoded: list[str] = []
    found: list[bytes] = []

    def decode_second() -> Buffer:
        decoded.append("second")
        return b"second"

    def second() -> None:
        found.append(bytes(cache.load(1, decode_second)))

    other = threading.Thread(target=second)

    def first() -> Buffer:
        decoded.append("first")
        # Our own look, before this; then the other's, which finds that we are at it.
        assert lock.released.acquire(timeout=30)
        other.start()
        assert lock.released.acquire(timeout=30)
        if first_fails:
            raise CowError("damaged", statement="COW-120")
        return b"first"

    with contextlib.suppress(CowError):
        found.append(bytes(cache.load(1, first)))
    other.join(30)
    assert decoded == (["first", "second"] if first_fails else ["first"])
    assert found == ([b"second"] if first_fails else [b"first", b"first"])


class CountedViews:
    """Views of one COW with a common cache; `decoded` has the op index of every unit that was decoded."""

    def __init__(self, images: WorkerImages, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        self.decoded: list[int] = []
        self.cache = UnitCache(1 << 20)
        self._images = images
        self._payloads = stack.enter_context(locked_store(images.cow))
        self._base: FileStore = stack.enter_context(locked_store(images.base))
        decode = Decoder.decode

        def counted(decoder: Decoder, payload: Buffer, size: int, *, op_index: int) -> Buffer:
            self.decoded.append(op_index)
            return decode(decoder, payload, size, op_index=op_index)

        monkeypatch.setattr(Decoder, "decode", counted)

    def open(self) -> CowView:
        extent_map = self._images.extent_map()
        return CowView(extent_map, self._payloads, source=self._base, base=self._base, units=self.cache)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_blocks_of_a_large_unit_decode_it_once(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SNAP-71: 4 KiB reads of 64 KiB units, in any order, from two views in turn."""
    images = WorkerImages(tmp_path, 1)
    index = images.packed_op(16)
    with contextlib.ExitStack() as stack:
        views = CountedViews(images, monkeypatch, stack)
        both = [views.open(), views.open()]
        first = images.extent_map().op(index).new_block
        blocks = list(range(first, first + 16))
        if order == "descending":
            blocks.reverse()
        elif order == "random":
            Random(3).shuffle(blocks)
        for turn, block in enumerate(blocks):
            content = bytearray(BLOCK_SIZE)
            both[turn % 2].read_into(content, block * BLOCK_SIZE)
            assert content == images.new[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        assert views.decoded == [index]


def test_threads_with_a_common_cache_read_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four views at once over a cache that is far too small: every byte is right, and the bound holds."""
    images = WorkerImages(tmp_path, 2)
    with contextlib.ExitStack() as stack:
        views = CountedViews(images, monkeypatch, stack)
        views.cache = UnitCache(256 << 10)
        wrong: list[str] = []

        def read(view: CowView, seed: int) -> None:
            random = Random(seed)
            for _ in range(400):
                start = random.randrange(len(images.new))
                length = min(random.choice([1, 512, 4096, 4096, 70_000]), len(images.new) - start)
                content = bytearray(length)
                view.read_into(content, start)
                if content != images.new[start : start + length]:
                    wrong.append(f"seed {seed}: {length} bytes at {start}")

        threads = [threading.Thread(target=read, args=(views.open(), seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert 0 < views.cache.held_bytes <= 256 << 10

"""The read path: any slice of the image, and never data from a damaged unit."""

import errno
from random import Random

import pytest
from cowfiles import block, block_map, content, diff, image, store, view, written
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView

RANDOM = Random(11)
OLD = b"".join(RANDOM.choice([block(0), block(1), RANDOM.randbytes(BLOCK_SIZE)]) for _ in range(64))
NEW = bytearray(OLD[20 * BLOCK_SIZE :] + OLD[: 10 * BLOCK_SIZE] + bytes(5 * BLOCK_SIZE) + image(range(30, 51)))
NEW[9 * BLOCK_SIZE : 21 * BLOCK_SIZE] = RANDOM.randbytes(100) * 491 + bytes(52)
COW, _ = diff(OLD, bytes(NEW))


@given(start=st.integers(0, len(NEW)), length=st.integers(0, 40 * BLOCK_SIZE))
@settings(max_examples=200, deadline=None)
def test_any_slice_equals(start: int, length: int) -> None:
    """COW-117, COW-118, COW-121, COW-122: every byte range, also none, across every kind of op."""
    end = min(start + length, len(NEW))
    assert read_bytes(view(COW, OLD, len(NEW)), start, end - start) == NEW[start:end]


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (len(NEW), 1), (len(NEW) - 1, 2), (0, len(NEW) + 1)])
def test_reads_outside_the_image_fail(start: int, length: int) -> None:
    """EIO, nothing short."""
    with pytest.raises(SnapdError) as caught:
        view(COW, OLD, len(NEW)).read_into(bytearray(length), start)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("compress", ["lz4", "zstd"])
def test_a_damaged_unit_is_an_error_and_its_neighbours_are_served(compress: str) -> None:
    """COW-120: every byte of a payload cut short in turn: an error or the exact content, never anything else."""
    first, second = (Random(value).randbytes(64) * 256 for value in (1, 2))
    cow = written(("replace", 0, first), ("replace", 4, second), compress=compress)
    op = block_map(cow, b"", 8 * BLOCK_SIZE).op(0)
    for at in range(op.source, op.source + op.data_length):
        healthy = read_bytes(cow, at, 1)
        cow.write(bytes([healthy[0] ^ 0xFF]), at)
        new = view(cow, b"", 8 * BLOCK_SIZE)
        assert read_bytes(new, 4 * BLOCK_SIZE, len(second)) == second
        buffer = bytearray(b"\xcc" * len(first))
        try:
            new.read_into(buffer, 0)
        except CowError:
            assert buffer == b"\xcc" * len(first)
        cow.write(healthy, at)
    assert content(cow, b"", 8 * BLOCK_SIZE) == first + second


def test_a_refused_unit_is_not_served_nor_kept() -> None:
    """The check of a unit comes before its first use, and again at every try."""
    cow = written(("replace", 0, block(5)))
    calls = []

    def refuse(index: int, unit: bytes) -> None:
        calls.append((index, len(unit)))
        raise SnapdError(errno.EBADMSG, "refused")

    base = store(block(9))
    new = CowView(block_map(cow, block(9)), cow, source=base, base=base, check_unit=refuse)
    for _ in range(2):
        buffer = bytearray(10)
        with pytest.raises(SnapdError, match="refused"):
            new.read_into(buffer, 0)
        assert buffer == bytes(10)
    assert calls == [(0, BLOCK_SIZE)] * 2


def test_a_sequential_reader_decodes_each_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-119: block by block through units of 16 blocks costs one decode a unit."""
    new_image = b"".join(bytes([value, value + 1]) * 2048 for value in range(64))
    cow, _ = diff(bytes(64 * BLOCK_SIZE), new_image)
    new = view(cow, bytes(64 * BLOCK_SIZE))
    decoded = []
    decode = new._decoder.decode

    def counted(payload: bytes, size: int, *, op_index: int) -> bytes:
        decoded.append(op_index)
        return decode(payload, size, op_index=op_index)

    monkeypatch.setattr(new._decoder, "decode", counted)
    for number in range(64):
        read_bytes(new, number * BLOCK_SIZE, BLOCK_SIZE)
    assert decoded == [0, 1, 2, 3]


def test_the_cache_is_bounded() -> None:
    """At most 4 MiB of decoded units are kept, whatever is read."""
    random = Random(4)
    new_image = b"".join(random.randbytes(16) * 256 for _ in range(2048))
    cow, _ = diff(bytes(len(new_image)), new_image, compress="lz4")
    new = view(cow, bytes(len(new_image)))
    for number in range(0, 2048, 8):
        read_bytes(new, number * BLOCK_SIZE, BLOCK_SIZE)
    assert sum(map(len, new._cache.values())) == 4 << 20


def test_copies_come_from_the_source_and_the_rest_from_the_base() -> None:
    """UNDO-4: with a base that a merge has begun to overwrite, copies still read the old image."""
    old, new_image = image([1, 2, 3, 4]), image([2, 1, 3, 4])
    cow = written(("copy", 0, 1), ("copy", 1, 0))
    mixed = store(image([2, 2, 3, 4]))
    assert CowFile.parse(cow).type.tolist() == [OpType.COPY, OpType.COPY]
    new = CowView(block_map(cow, old), cow, source=store(old), base=mixed)
    assert read_bytes(new, 0, len(old)) == new_image


def test_units_of_every_size_come_back() -> None:
    """COW-112: 4 to 256 KiB, compressed and raw."""
    random = Random(8)
    new_image = random.randbytes(80 * BLOCK_SIZE) + bytes(BLOCK_SIZE) + random.randbytes(32) * 128 * 99
    for unit in (4, 8, 16, 32, 64, 128, 256):
        for name in ("none", "lz4", "zstd"):
            assert CompressOption.parse(name)
            cow, _ = diff(bytes(BLOCK_SIZE), new_image, compress=name, unit=unit << 10)
            assert content(cow, bytes(BLOCK_SIZE)) == new_image

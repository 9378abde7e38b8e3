"""The read path: any slice of the image, and never data from a damaged unit."""

import contextlib
import errno
from random import Random

import pytest
from cowfiles import block, content, diff, extent_map, image, store, view, written
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimStore
from snapd.block.store import Buffer, read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.digests import DigestLog, DigestTable, block_digest
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile

RANDOM = Random(11)


def digests_of(cow: SimStore, new_image: bytes) -> DigestTable:
    """The table of a COW that stands for `new_image`."""
    parsed, table = CowFile.parse(cow), store()
    log = DigestLog.create(table, block_size=BLOCK_SIZE)
    blocks = [new_image[at : at + BLOCK_SIZE] for at in range(0, len(new_image), BLOCK_SIZE)]
    log.put(0, [block_digest(content) for content in blocks])
    log.finish(op_count=parsed.op_count, ops_digest=parsed.ops_digest, target_blocks=len(blocks))
    return DigestTable.load(table, op_count=parsed.op_count, ops_digest=parsed.ops_digest)


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


@pytest.mark.parametrize("compress", ["none", "gz", "brotli", "lz4", "zstd"])
def test_with_digests_every_changed_bit_of_a_payload_is_an_error(compress: str) -> None:
    """COW-120, COW-216: what the codec notices and what it does not; the neighbours are served."""
    first, second = (Random(value).randbytes(64) * 256 for value in (1, 2))
    cow = written(("replace", 0, first), ("replace", 4, second), compress=compress)
    digests = digests_of(cow, first + second)
    op = extent_map(cow, b"", 8 * BLOCK_SIZE).op(0)
    step = max(1, op.data_length // 200)
    for at in range(op.source, op.source + op.data_length, step):
        healthy = read_bytes(cow, at, 1)
        cow.write(bytes([healthy[0] ^ 1 << at % 8]), at)
        new = CowView(CowFile.parse(cow).extent_map(0, digests=digests), cow, source=store(), base=store())
        assert read_bytes(new, 4 * BLOCK_SIZE, len(second)) == second
        with contextlib.suppress(CowError):
            assert read_bytes(new, 0, len(first)) == first
        cow.write(healthy, at)
    assert content(cow, b"", 8 * BLOCK_SIZE) == first + second


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("skip", "length"), [(0, BLOCK_SIZE), (700, 100), (0, 5), (4095, 1)])
def test_with_digests_a_changed_bit_of_the_base_is_an_error_in_every_kind_of_block(
    start: int, skip: int, length: int
) -> None:
    """COW-216: unchanged, copied and XOR blocks are compared as wholes, also where a part of them is read."""
    old = bytearray(b"".join(Random(value).randbytes(BLOCK_SIZE) for value in range(4)))
    shifted = bytes(one ^ other for one, other in zip(old[100 : 100 + BLOCK_SIZE], block(7), strict=True))
    xor = written(("copy", 1, 3), ("xor", 2, shifted, 100), ("zero", 3, 0), ("replace", 4, block(9)))
    new_image = bytes(old[:BLOCK_SIZE] + old[3 * BLOCK_SIZE :] + block(7) + bytes(BLOCK_SIZE) + block(9))
    digests = digests_of(xor, new_image)
    made = CowFile.parse(xor).extent_map(len(old), digests=digests)
    read_from = {0: [5], 1: [3 * BLOCK_SIZE + 5], 2: [101, BLOCK_SIZE + 99], 3: [], 4: []}[start]
    for at in read_from:
        damaged = store(bytes(old[:at] + bytes([old[at] ^ 4]) + old[at + 1 :]))
        view = CowView(made, xor, source=damaged, base=damaged)
        with pytest.raises(CowError, match=f"block {start} of the image does not match its digest"):
            read_bytes(view, start * BLOCK_SIZE + skip, length)
    good = store(bytes(old))
    at = start * BLOCK_SIZE + skip
    assert read_bytes(CowView(made, xor, source=good, base=good), at, length) == new_image[at : at + length]


def test_a_sequential_reader_decodes_each_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-119: block by block through units of 16 blocks costs one decode a unit."""
    new_image = b"".join(bytes([value, value + 1]) * 2048 for value in range(64))
    cow, _ = diff(bytes(64 * BLOCK_SIZE), new_image)
    new = view(cow, bytes(64 * BLOCK_SIZE))
    decoded = []
    decode = new._decoder.decode

    def counted(payload: Buffer, size: int, *, op_index: int) -> Buffer:
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
    assert new._units._cache.held_bytes == 4 << 20


def test_copies_come_from_the_source_and_the_rest_from_the_base() -> None:
    """UNDO-4: with a base that a merge has begun to overwrite, copies still read the old image."""
    old, new_image = image([1, 2, 3, 4]), image([2, 1, 3, 4])
    cow = written(("copy", 0, 1), ("copy", 1, 0))
    mixed = store(image([2, 2, 3, 4]))
    assert CowFile.parse(cow).ops.type.tolist() == [OpType.COPY, OpType.COPY]
    new = CowView(extent_map(cow, old), cow, source=store(old), base=mixed)
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

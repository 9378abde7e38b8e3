"""The version 3 layout, byte by byte (sections 1 to 6 and appendix A of the format)."""

import hashlib
import struct

import pytest
from rawcow import COPY, REPLACE, ZERO, data_start, op, raw_cow, store

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.errors import CowError
from snapd.cow.format import MAX_OP_COUNT, PROGRESS_OFFSET, Header, Op, OpType
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView
from snapd.cow.writer import CowWriter, check_unit_size, unit_lengths

BLOCK = b"\x41" * 4096
NONE = CompressOption.parse("none")
EXAMPLE_SHA256 = "b89488221531d344bec3bd479b204546185a3d01709c28b0fd47ca3408de88c5"


def example(op_count_max: int = 3, unit: int = 4096, *, scratch: bool = False) -> tuple[SimStore, CowWriter]:
    """Copy 3 <- 7, replace 5, zero 6, finished."""
    file = store(b"")
    writer = CowWriter(file, op_count_max=op_count_max, option=NONE, unit=unit, scratch=scratch)
    writer.copy(3, 7)
    writer.replace(5, 1, BLOCK)
    writer.zero(6)
    writer.finalize()
    return file, writer


def content(file: SimStore) -> bytes:
    """All bytes."""
    return read_bytes(file, 0, file.size())


def test_worked_example_is_byte_exact() -> None:
    """A.3: COW-1, COW-2, COW-12, COW-41, COW-45 in one file, known by its SHA-256."""
    file, writer = example()
    raw = content(file)
    assert len(raw) == writer.size == 4286
    assert hashlib.sha256(raw).hexdigest() == EXAMPLE_SHA256
    assert raw[:8] == b"!!WOcwoC"


def test_independent_bytes_are_the_same_file() -> None:
    """COW-204: the tables alone give the worked example, and the reader takes it."""
    ops = [op(COPY, 3, 7), op(REPLACE, 5, 0xBE, 4096), op(ZERO, 6)]
    raw = raw_cow(ops, BLOCK, max_compression_size=4096)
    assert hashlib.sha256(raw).hexdigest() == EXAMPLE_SHA256
    cow = CowFile.parse(store(raw))
    assert cow.new_block.tolist() == [3, 5, 6]
    assert cow.source.tolist() == [7, 0xBE, 0]


def test_record_of_sixteen_blocks() -> None:
    """A.5: replace, 16 blocks from 100, 293 bytes at 0x106ce (COW-20 to COW-22, COW-57, COW-115)."""
    record = Op(OpType.REPLACE, 100, 16, 0x106CE, 293)
    assert record.pack() == bytes.fromhex("25010000 64000000 ce06010000000028")
    assert Op.unpack(record.pack(), 0) == record


def test_regions_with_scratch() -> None:
    """COW-42: with 2 MiB of scratch the ops start at 0x20008e and the data 16 bytes a slot behind."""
    file, _ = example(op_count_max=10, scratch=True)
    header = Header.unpack(read_bytes(file, 0, 78))
    assert header.ops_start == 0x20008E
    assert header.data_start == 0x20008E + 160
    assert read_bytes(file, 78, 2 << 20) == bytes(2 << 20)


def test_unused_slots_say_nothing() -> None:
    """COW-44, COW-45: what lies in the slots behind op_count is not read; the data starts behind all slots."""
    file, _ = example(op_count_max=5)
    file.write(b"\xff" * 32, 78 + 64 + 48)
    cow = CowFile.parse(file)
    assert cow.new_block.tolist() == [3, 5, 6]
    assert cow.source[1] == data_start(5)


def test_file_may_end_before_the_data() -> None:
    """COW-48: few ops and no payload end before the data region."""
    file = store(b"")
    writer = CowWriter(file, op_count_max=100, option=NONE, scratch=False)
    writer.zero(1)
    writer.finalize()
    assert file.size() < data_start(100)
    assert CowFile.parse(file).new_block.tolist() == [1]


def test_empty_file_is_its_base() -> None:
    """COW-6, COW-212: no op means that the target is the base."""
    base = store(BLOCK * 3)
    file = store(raw_cow([]))
    block_map = CowFile.parse(file).block_map(base.size())
    view = CowView(block_map, file, source=base, base=base)
    assert read_bytes(view, 0, view.size) == BLOCK * 3


def test_nothing_counts_before_the_header_says_so() -> None:
    """COW-15, COW-43, COW-95, COW-96: until finalize the file on disk is a valid file without ops."""
    file = store(b"")
    writer = CowWriter(file, op_count_max=600, option=NONE, unit=4096)
    for number in range(600):
        writer.replace(number, 1, BLOCK)
        assert CowFile.parse(file).header.op_count == 0
    writer.finalize()
    assert CowFile.parse(file).header.op_count == 600


@pytest.mark.parametrize("unit", [4096, 8192, 16384, 32768, 65536, 131072, 262144])
def test_legal_units(unit: int) -> None:
    """COW-112: seven sizes, stored as max_compression_size, each readable."""
    check_unit_size(unit)
    file, _ = example(unit=unit)
    assert CowFile.parse(file).header.max_compression_size == unit


@pytest.mark.parametrize("unit", [0, 512, 2048, 4095, 12288, 524288, -4096])
def test_illegal_units(unit: int) -> None:
    """COW-112: anything else fails."""
    with pytest.raises(SnapdError, match="COW-112"):
        check_unit_size(unit)


@pytest.mark.parametrize(
    ("blocks", "unit_blocks", "expected"),
    [
        (259, 16, [16] * 16 + [2, 1]),
        (200, 64, [64] * 3 + [8]),
        (59, 64, [32, 16, 8, 2, 1]),
        (5, 1, [1] * 5),
        (0, 16, []),
        (16, 16, [16]),
    ],
)
def test_runs_are_cut_greedily(blocks: int, unit_blocks: int, expected: list[int]) -> None:
    """COW-113, COW-114: the largest power of two that fits, again and again."""
    assert unit_lengths(blocks, unit_blocks) == expected


@pytest.mark.parametrize("algorithm", ["none", "lz4", "zstd"])
def test_incompressible_unit_is_one_raw_op(algorithm: str) -> None:
    """COW-200, COW-106: 16 incompressible blocks at 64 KiB are one op with exponent 4 and 65536 raw bytes."""
    noise = b"".join(hashlib.sha256(bytes([i, j])).digest() for i in range(16) for j in range(128))
    file = store(b"")
    writer = CowWriter(file, op_count_max=16, option=CompressOption.parse(algorithm), unit=65536, scratch=False)
    writer.replace(100, 16, Encoder(CompressOption.parse(algorithm)).encode(noise))
    writer.finalize()
    length, new_block, info = struct.unpack("<IIQ", read_bytes(file, 78 + 64, 16))
    assert (length, new_block, info >> 57 & 7) == (65536, 100, 4)
    assert read_bytes(file, data_start(16), 65536) == noise


def test_one_op_more_than_slots() -> None:
    """COW-127, COW-202: the call that finds no slot adds nothing, and the file can still be finished."""
    file = store(b"")
    writer = CowWriter(file, op_count_max=20, option=NONE, scratch=False)
    for number in range(20):
        writer.zero(number)
    with pytest.raises(CowError, match="COW-127"):
        writer.zero(20)
    with pytest.raises(CowError, match="COW-127"):
        writer.copy(20, 1)
    with pytest.raises(CowError, match="COW-127"):
        writer.replace(20, 1, BLOCK)
    writer.finalize()
    assert CowFile.parse(file).header.op_count == 20
    assert writer.size == data_start(20)


def test_slot_numbers_stay_below_32_bits() -> None:
    """COW-49: a file has at most 2^32 - 1 slots."""
    with pytest.raises(SnapdError, match="COW-49"):
        CowWriter(store(b""), op_count_max=MAX_OP_COUNT + 1, option=NONE, scratch=False)


@pytest.mark.parametrize(
    ("bad", "statement"),
    [
        (Op(OpType.ZERO, 1 << 32, 1, 0, 0), "COW-23"),
        (Op(OpType.COPY, 1, 1, 1 << 48, 0), "COW-23"),
        (Op(OpType.REPLACE, 1, 3, 0, 10), "COW-21"),
        (Op(OpType.REPLACE, 1, 128, 0, 10), "COW-21"),
    ],
)
def test_fields_that_do_not_fit_are_errors(bad: Op, statement: str) -> None:
    """COW-21, COW-23: never cut off silently."""
    with pytest.raises(CowError) as caught:
        bad.pack()
    assert caught.value.statement == statement


def test_progress_lies_at_byte_26() -> None:
    """COW-146: the one field that changes after the writer is done."""
    file, _ = example()
    file.write(struct.pack("<Q", 3), PROGRESS_OFFSET)
    assert CowFile.parse(file).is_merged


def test_lookup_goes_through_the_nearest_unit() -> None:
    """COW-52, COW-53, COW-57, COW-63: a block inside a unit is that unit's, its neighbours are the base's."""
    unit = b"".join(bytes([value]) * 4096 for value in range(1, 5))
    base = store(b"".join(bytes([100 + value]) * 4096 for value in range(12)))
    ops = [op(COPY, 9, 0), op(REPLACE, 4, data_start(3), 16384, 2), op(ZERO, 2)]
    file = store(raw_cow(ops, unit))
    view = CowView(CowFile.parse(file).block_map(base.size()), file, source=base, base=base)
    seen = [read_bytes(view, number * 4096 + 17, 1)[0] for number in range(12)]
    assert seen == [100, 101, 0, 103, 1, 2, 3, 4, 108, 100, 110, 111]


def test_target_size_is_never_the_slot_count() -> None:
    """COW-66, COW-213: base or highest op, whichever is longer; op_count_max says nothing."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 5)], op_count_max=1)))
    assert cow.target_size(20 * 4096) == 20 * 4096
    assert cow.target_size(5 * 4096) == 6 * 4096
    assert CowFile.parse(store(raw_cow([], op_count_max=77))).target_size(4096) == 4096


def test_another_block_size_is_honoured() -> None:
    """COW-4, COW-5: blocks are the header's, in target, source and units alike."""
    base = store(b"".join(bytes([value]) * 1024 for value in range(8)))
    ops = [op(COPY, 1, 6), op(REPLACE, 4, data_start(2), 2048, 1)]
    file = store(raw_cow(ops, b"\xaa" * 1024 + b"\xbb" * 1024, block_size=1024))
    view = CowView(CowFile.parse(file).block_map(base.size()), file, source=base, base=base)
    assert [read_bytes(view, 1024 * number, 1)[0] for number in range(8)] == [0, 6, 2, 3, 0xAA, 0xBB, 6, 7]

"""The validation table for the header of every version, and for version 3, with a corrupt file a row (COW-97)."""

import errno
import struct

import pytest
from rawcow import (
    COPY,
    LABEL,
    LZ4,
    NONE,
    REPLACE,
    XOR,
    ZERO,
    ZSTD,
    RawOp,
    data_start,
    header,
    op,
    patched,
    raw_cow,
    raw_stream,
    store,
    stream_header,
)

from snapd.cow.errors import CowError
from snapd.cow.parse.mergeorder import order_fault
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
ONE = data_start(1)
TWO = data_start(2)
OPS = 78 + 64
VERSIONS = (1, 2, 3)
HEADER_SIZES = {1: 34, 2: 38, 3: 78}


def refused(raw: bytes, statement: str, *, label: int | None = None) -> CowError:
    """The error that parsing `raw` gives, which names the statement."""
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(raw), label=label)
    error = caught.value
    assert error.statement == statement
    assert error.errno == errno.EBADMSG
    assert statement in str(error)
    return error


def at_op(error: CowError, index: int) -> None:
    """The error is about this op of a file without scratch and sequence, and says where its record lies."""
    assert (error.op_index, error.offset) == (index, OPS + 16 * index)


def empty(version: int, **changed: int) -> bytes:
    """A good file without ops, but for the header fields that are changed."""
    if version == 3:
        return header(**changed) + bytes(64)
    return stream_header(version, **changed) + raw_stream([], version).raw[HEADER_SIZES[version] :]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_uncorrupted_files_parse(version: int) -> None:
    """Guards the rows below: what they corrupt is good."""
    cow = CowFile.parse(store(empty(version)))
    assert (cow.header.version, cow.op_count) == (version, 0)
    cow = CowFile.parse(store(raw_cow([op(COPY, 3, 7), op(REPLACE, 5, TWO, 4096)], BLOCK)))
    assert cow.ops.new_block.tolist() == [3, 5]


@pytest.mark.parametrize("version", VERSIONS)
def test_v1_too_short(version: int) -> None:
    """V1: shorter than the prefix, or than the header."""
    for length in (0, 13, 14, HEADER_SIZES[version] - 1):
        refused(empty(version)[:length], "V1")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("changed", "statement", "offset"),
    [
        ({"magic": 0x436F77634F572120}, "V2", 0),
        ({"header_size": 79}, "V3", 12),
        ({"header_size": 65535}, "V3", 12),
        ({"header_size": 26}, "V4", 12),
        ({"header_size": 0}, "V4", 12),
        ({"major": 0}, "V5", 8),
        ({"major": 4}, "V5", 8),
        ({"minor": 1}, "V6", 10),
        ({"footer_size": 20}, "V7", 14),
        ({"op_size": 24}, "V8", 16),
        ({"cluster_ops": 1}, "V9", 22),
        ({"block_size": 0}, "V10", 18),
        ({"block_size": 256}, "V10", 18),
        ({"block_size": 5000}, "V10", 18),
        ({"block_size": 65536}, "V10", 18),
        ({"num_merge_ops": 1}, "V25", 26),
        ({"num_merge_ops": (1 << 64) - 1}, "V25", 26),
    ],
)
def test_header_rows(version: int, changed: dict[str, int], statement: str, offset: int) -> None:
    """V2 to V10 and V25: one header field each, in every version."""
    assert refused(empty(version, **changed), statement).offset == offset


@pytest.mark.parametrize(
    ("changed", "statement", "offset"),
    [
        ({"header_size": 38}, "V4", 12),
        ({"footer_size": 84}, "V7", 14),
        ({"op_size": 20}, "V8", 16),
        ({"cluster_ops": 1024}, "V9", 22),
        ({"op_count": 2, "op_count_max": 1}, "V21", 54),
        ({"op_count": 1 << 33, "op_count_max": 1 << 34}, "V21", 54),
        ({"op_count_max": 1 << 32}, "V21", 54),
        ({"compression": 5}, "V24", 70),
        ({"compression": 1 << 31}, "V24", 70),
        ({"max_compression_size": 0}, "V29", 74),
        ({"max_compression_size": 2048}, "V29", 74),
        ({"max_compression_size": 12288}, "V29", 74),
        ({"max_compression_size": 524288}, "V29", 74),
    ],
)
def test_header_rows_of_version_3(changed: dict[str, int], statement: str, offset: int) -> None:
    """V4, V7, V8, V9, V21 (COW-49), V24, V29: what only version 3 has, or has otherwise."""
    assert refused(empty(3, **changed), statement).offset == offset


@pytest.mark.parametrize(("version", "size"), [(1, 38), (1, 78), (2, 34), (2, 78)])
def test_v4_the_header_of_another_version(version: int, size: int) -> None:
    """V4 (COW-10): each version has a header of its own size."""
    assert refused(empty(version, header_size=size) + bytes(64), "V4").offset == 12


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("size", [1 << 10, (1 << 32) - 1])
def test_v11_truncated_scratch(version: int, size: int) -> None:
    """V11: the file ends inside its scratch space, before any op."""
    assert refused(empty(version, buffer_size=size), "V11").offset == 34


@pytest.mark.parametrize("missing", [1, 16, 33])
def test_v11_truncated_ops(missing: int) -> None:
    """V11: the op region is not whole."""
    assert refused(raw_cow([op(COPY, 3, 7), op(ZERO, 5)])[:-missing], "V11").offset == OPS


@pytest.mark.parametrize("count", [100, 1 << 40, (1 << 64) - 1])
def test_v11_truncated_sequence(count: int) -> None:
    """V11: the sequence is not whole; a header that claims more than there is costs nothing."""
    assert refused(raw_cow([], sequence_data_count=count), "V11").offset == 78


@pytest.mark.parametrize("slots", [5, 1 << 20, (1 << 32) - 1])
def test_v11_resume_points_that_push_the_ops_out(slots: int) -> None:
    """V11: the ops lie behind all resume slots there are said to be, here behind the end of the file."""
    refused(raw_cow([op(ZERO, 5)], resume_point_max=slots, resume_point_count=slots), "V11")


def test_v15_label_absent() -> None:
    """V15: a label that no resume point has; those there are get named."""
    raw = raw_cow([op(ZERO, 1), op(ZERO, 2)], points=((7, 1), (9, 2)))
    error = refused(raw, "V15", label=8)
    assert "7, 9" in str(error)
    assert error.offset == 78
    assert "no label" in str(refused(raw_cow([op(ZERO, 1)]), "V15", label=0))


def test_v16_target_blocks_leave_32_bits() -> None:
    """V16: an op that covers blocks behind 2^32."""
    ops = [op(ZERO, 1), op(REPLACE, (1 << 32) - 1, TWO, 8192, 1)]
    at_op(refused(raw_cow(ops, BLOCK * 2), "V16"), 1)


@pytest.mark.parametrize("offset", [-1, 1, 4096])
def test_v18_payload_elsewhere(offset: int) -> None:
    """V18 (COW-46): a payload must lie where the lengths before it say, to the byte."""
    ops = [op(REPLACE, 1, TWO, 4096), op(REPLACE, 2, TWO + 4096 + offset, 4096)]
    at_op(refused(raw_cow(ops, BLOCK * 3), "V18"), 1)


def test_v18_counts_every_length() -> None:
    """V18 (COW-45): XOR payloads lie between those of replace ops, and unused slots before them all."""
    start = data_start(4)
    ops = [op(REPLACE, 1, start, 4096), op(XOR, 2, 5, 4096), op(REPLACE, 3, start + 8192, 4096)]
    cow = CowFile.parse(store(raw_cow(ops, BLOCK * 3, op_count_max=4)))
    assert cow.ops.payload.tolist() == [start, start + 4096, start + 8192]
    ops[2] = op(REPLACE, 3, start + 4096, 4096)
    at_op(refused(raw_cow(ops, BLOCK * 3, op_count_max=4), "V18"), 2)


def test_v19_sequence_names_a_missing_block() -> None:
    """V19 (COW-73): every block of the sequence has an op that begins there."""
    error = refused(raw_cow([op(COPY, 3, 7), op(COPY, 4, 8)], sequence=(3, 5)), "V19")
    assert "block 5" in str(error)
    assert error.offset == 78 + 4
    start = data_start(1, sequence=1)
    refused(raw_cow([op(REPLACE, 4, start, 8192, 1)], BLOCK * 2, sequence=(5,)), "V19")


def test_sequence_names_a_block_twice() -> None:
    """COW-67: the merge list is a permutation, so no block is in it twice."""
    error = refused(raw_cow([op(COPY, 3, 7), op(COPY, 4, 8)], sequence=(3, 4, 3)), "COW-67")
    assert error.offset == 78 + 8


@pytest.mark.parametrize("cut", [1, 4096])
def test_v20_payload_leaves_the_file(cut: int) -> None:
    """V20: a payload that ends behind the file's end."""
    ops = [op(ZERO, 7), op(REPLACE, 1, TWO, 4096)]
    at_op(refused(raw_cow(ops, BLOCK)[:-cut], "V20"), 1)
    at_op(refused(raw_cow([op(XOR, 1, 0, 4096)], BLOCK)[:-cut], "V20"), 0)


@pytest.mark.parametrize("kind", [0, LABEL, 5, 7, 8, 15])
def test_v22_types_that_version_3_does_not_have(kind: int) -> None:
    """V22 (COW-9): only copy, replace, zero and XOR."""
    at_op(refused(raw_cow([op(ZERO, 2), op(kind, 1)]), "V22"), 1)


@pytest.mark.parametrize(
    ("record", "unit"),
    [
        (op(REPLACE, 0, ONE, 4096, 7), 262144),
        (op(REPLACE, 0, ONE, 4096, 2), 8192),
        (op(COPY, 3, 7, exponent=1), 65536),
        (op(ZERO, 3, exponent=3), 65536),
        (op(XOR, 3, 3, 4096, 1), 65536),
    ],
)
def test_v23_exponent(record: RawOp, unit: int) -> None:
    """V23 (COW-21, COW-56): exponent 7, above the file's unit, or on an op of one block."""
    at_op(refused(raw_cow([record], BLOCK, compression=ZSTD, max_compression_size=unit), "V23"), 0)


def test_v23_unit_below_the_block_size() -> None:
    """V23: where a block is larger than the largest unit, no replace op is possible."""
    raw = raw_cow([op(REPLACE, 0, ONE, 8192)], BLOCK * 2, block_size=8192, max_compression_size=4096)
    at_op(refused(raw, "V23"), 0)


@pytest.mark.parametrize("again", [3, 4, 5, 6])
def test_v27_overlap(again: int) -> None:
    """V27 (COW-61, COW-62, COW-209): no target block twice, a unit's inside included; both ops are named."""
    start = data_start(3)
    ops = [op(REPLACE, 3, start, 16384, 2), op(COPY, 90, 1), op(ZERO, again)]
    error = refused(raw_cow(ops, BLOCK * 4), "V27")
    at_op(error, 2)
    assert f"block {again} is already written by op 0" in str(error)


def test_v27_in_the_last_of_many_ops() -> None:
    """V27: found wherever it is, also across the pieces in which ops are checked."""
    count = 100_000
    ops = [op(COPY, 2 * number, 1) for number in range(count)]
    assert CowFile.parse(store(raw_cow(ops))).op_count == count
    ops[-1] = op(ZERO, 0)
    at_op(refused(raw_cow(ops), "V27"), count - 1)
    ops.reverse()
    assert "op 0" in str(refused(raw_cow(ops), "V27"))


@pytest.mark.parametrize(
    "record",
    [
        op(COPY, 3, 7, reserved=1),
        op(ZERO, 3, reserved=256),
        op(COPY, 3, 7, data_length=4096),
        op(ZERO, 3, data_length=1),
        op(ZERO, 3, source=5),
    ],
)
def test_v28_fields_that_must_be_zero(record: RawOp) -> None:
    """V28 (COW-47): reserved bits, payload on copy and zero, source on zero."""
    at_op(refused(raw_cow([op(COPY, 1, 1), record], BLOCK), "V28"), 1)


@pytest.mark.parametrize(
    ("record", "compression", "statement"),
    [
        (op(REPLACE, 0, ONE, 0), ZSTD, "COW-109"),
        (op(XOR, 0, 0, 0), ZSTD, "COW-109"),
        (op(REPLACE, 0, ONE, 4097), ZSTD, "COW-109"),
        (op(XOR, 0, 0, 4097), LZ4, "COW-109"),
        (op(REPLACE, 0, ONE, 8193, 1), ZSTD, "COW-109"),
        (op(REPLACE, 0, ONE, 4095), NONE, "COW-107"),
        (op(XOR, 0, 0, 4095), NONE, "COW-107"),
        (op(REPLACE, 0, ONE, 4096, 1), NONE, "COW-107"),
    ],
)
def test_payload_lengths(record: RawOp, compression: int, statement: str) -> None:
    """COW-107 and COW-109: never empty, never longer than the unit, and without compression exactly the unit."""
    at_op(refused(raw_cow([record], BLOCK * 3, compression=compression), statement), 0)


@pytest.mark.parametrize(
    ("record", "base_blocks", "target_blocks"),
    [
        (op(COPY, 3, 8), 8, 8),
        (op(COPY, 3, 1 << 47), 8, 8),
        (op(XOR, 3, 8 * 4096, 4096), 8, 8),
        (op(XOR, 3, 7 * 4096 + 1, 4096), 8, 8),
        (op(ZERO, 8), 8, 8),
        (op(REPLACE, 7, ONE, 8192, 1), 8, 8),
        (op(ZERO, 3), 8, 3),
    ],
)
def test_v30_blocks_outside_the_images(record: RawOp, base_blocks: int, target_blocks: int) -> None:
    """V30 (UNDO-23): a source behind the base, an XOR's second block too, or a target behind the image."""
    cow = CowFile.parse(store(raw_cow([record], BLOCK * 2)))
    with pytest.raises(CowError) as caught:
        cow.check_sizes(base_blocks, target_blocks)
    assert (caught.value.statement, caught.value.op_index) == ("V30", 0)
    with pytest.raises(CowError, match="V30"):
        cow.extent_map(base_blocks * 4096, target_blocks * 4096)


def test_v30_up_to_the_last_block() -> None:
    """V30: the last block of the base and of the target may be used, and the last byte by an XOR."""
    start = data_start(3)
    ops = [op(COPY, 1, 7), op(XOR, 2, 7 * 4096, 4096), op(REPLACE, 6, start + 4096, 8192, 1)]
    CowFile.parse(store(raw_cow(ops, BLOCK * 3))).check_sizes(8, 8)


def test_blocks_behind_the_base_need_an_op() -> None:
    """UNDO-23: an image longer than its base has an op for every block behind it."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 5)])))
    assert cow.extent_map(5 * 4096).block_count == 6
    with pytest.raises(CowError, match="UNDO-23"):
        cow.extent_map(4 * 4096)
    unit = CowFile.parse(store(raw_cow([op(REPLACE, 4, ONE, 16384, 2)], BLOCK * 4)))
    unit.check_sizes(6, 8)
    unit.check_sizes(4, 8)
    with pytest.raises(CowError, match="UNDO-23"):
        unit.check_sizes(3, 8)
    with pytest.raises(CowError, match="UNDO-23"):
        unit.check_sizes(6, 9)


def test_v31_order_that_does_not_merge() -> None:
    """V31 (COW-74, COW-76): the file parses, and what stops an ordered merge is said when it is asked for."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 1), op(COPY, 3, 7)])))
    assert order_fault(cow).startswith("op 1")
    assert order_fault(CowFile.parse(store(raw_cow([op(COPY, 3, 7), op(ZERO, 1)])))) == ""


def test_v32_a_point_of_more_ops_than_there_are() -> None:
    """V32: such a point is none; to ask for it is an error, and the rest of the file is as good as ever."""
    raw = raw_cow([op(ZERO, 5), op(ZERO, 6)], points=((8, 1), (9, 1000)))
    cow = CowFile.parse(store(raw))
    assert (cow.op_count, cow.labels) == (2, ((8, 1),))
    error = refused(raw, "V32", label=9)
    assert error.offset == 78 + 16
    assert "8" in str(refused(raw, "V15", label=10))


def test_progress_counts_ops_of_the_whole_file() -> None:
    """V25, COW-145: the progress may be more than the ops before a label, but never more than all."""
    ops, points = [op(COPY, 3, 7), op(ZERO, 4)], ((5, 1),)
    assert CowFile.parse(store(raw_cow(ops, points=points, num_merge_ops=2)), label=5).op_count == 1
    refused(raw_cow(ops, points=points, num_merge_ops=3), "V25", label=5)


@pytest.mark.parametrize("version", [2, 3])
def test_an_ordered_merge_that_stopped_in_a_window(version: int) -> None:
    """UNDO-28, COW-142, COW-217: a scratch state of 2 means that the base holds neither image."""
    raw = raw_cow([op(COPY, 3, 7)], buffer_size=2 << 20) if version == 3 else empty(2, buffer_size=0)
    if version == 2:
        head = stream_header(2, buffer_size=2 << 20)
        raw = head + bytes(2 << 20) + raw[38:]
    state = HEADER_SIZES[version]
    cow = CowFile.parse(store(patched(raw, state, b"\x02")))
    assert cow.window_done
    assert cow.has_begun
    with pytest.raises(CowError) as caught:
        cow.extent_map(8 * 4096)
    assert (caught.value.statement, caught.value.errno) == ("UNDO-28", errno.EBUSY)
    for byte in (b"\x00", b"\x01"):
        cow = CowFile.parse(store(patched(raw, state, byte)))
        assert not cow.window_done
        assert not cow.has_begun
        assert cow.extent_map(8 * 4096).block_count == 8


def test_no_state_byte_without_scratch() -> None:
    """COW-215: with buffer_size 0, or in version 1, the byte behind the header is not a state."""
    raw = raw_cow([op(COPY, 3, 7)], points=((2, 1),))
    assert raw[78] == 2
    assert not CowFile.parse(store(raw)).window_done
    for version in (1, 2):
        raw = raw_stream([], version).raw
        assert not CowFile.parse(store(raw)).window_done


@pytest.mark.parametrize("done", [False, True])
def test_a_half_merged_file_is_busy_and_a_merged_one_is_its_base(done: bool) -> None:
    """COW-145, COW-65, UNDO-28: merged ops are read from the base; half-way, an ordered merge must finish first."""
    cow = CowFile.parse(store(raw_cow([op(COPY, 3, 7), op(ZERO, 4)], num_merge_ops=1 + done)))
    assert (cow.is_merged, cow.has_begun) == (done, not done)
    if done:
        assert list(cow.extent_map(8 * 4096, merged=True).changed_extents(0, 8)) == []
    else:
        with pytest.raises(CowError, match="UNDO-28") as caught:
            cow.extent_map(8 * 4096)
        assert caught.value.errno == errno.EBUSY


def test_a_merged_count_does_not_hide_an_open_window() -> None:
    """COW-217: a window that is done is not over, whatever the counter says."""
    raw = raw_cow([op(COPY, 3, 7)], buffer_size=2 << 20, num_merge_ops=1)
    assert CowFile.parse(store(raw)).is_merged
    cow = CowFile.parse(store(patched(raw, 78, b"\x02")))
    assert (cow.is_merged, cow.has_begun) == (False, True)


def test_parsing_twice_gives_the_same() -> None:
    """COW-99: nothing is kept from one parse to the next."""
    file = store(raw_cow([op(COPY, 3, 7), op(ZERO, 5)], points=((1, 2),)))
    one, two = CowFile.parse(file), CowFile.parse(file)
    assert bytes(one.ops.records) == bytes(two.ops.records)
    assert one.labels == two.labels == ((1, 2),)


def test_sources_have_48_bits() -> None:
    """COW-12, COW-57: every bit of a record is read as its own field."""
    raw = raw_cow([op(COPY, (1 << 32) - 1, (1 << 48) - 1)])
    (source,), (block,) = (
        CowFile.parse(store(raw)).ops.source.tolist(),
        CowFile.parse(store(raw)).ops.new_block.tolist(),
    )
    assert (source, block) == ((1 << 48) - 1, (1 << 32) - 1)
    assert CowFile.parse(store(raw)).highest_target_block == (1 << 32) - 1
    assert struct.unpack_from("<Q", raw, OPS + 8)[0] >> 60 == COPY

"""Every row of the validation table that applies to a version 3 file, with one corrupt file each (COW-97)."""

import errno
import struct

import pytest
from rawcow import COPY, REPLACE, XOR, ZERO, RawOp, data_start, header, op, raw_cow, store

from snapd.cow.errors import CowError
from snapd.cow.reader import CowFile

BLOCK = b"\x41" * 4096
ONE = data_start(1)
TWO = data_start(2)


def refused(raw: bytes, statement: str, number: int = errno.EBADMSG) -> CowError:
    """The error that parsing `raw` gives, which names the statement."""
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(raw))
    assert caught.value.statement == statement
    assert caught.value.errno == number
    assert statement in str(caught.value)
    return caught.value


def test_the_uncorrupted_file_parses() -> None:
    """Guards the rows below: the file they corrupt is good."""
    cow = CowFile.parse(store(raw_cow([op(COPY, 3, 7), op(REPLACE, 5, TWO, 4096)], BLOCK)))
    assert cow.new_block.tolist() == [3, 5]


@pytest.mark.parametrize("length", [0, 13, 14, 37, 77])
def test_v1_too_short(length: int) -> None:
    """V1: shorter than the prefix, or than the header."""
    refused(header()[:length], "V1")


@pytest.mark.parametrize(
    ("changed", "statement"),
    [
        ({"magic": 0x436F77634F572120}, "V2"),
        ({"header_size": 79}, "V4"),
        ({"header_size": 38}, "V4"),
        ({"major": 0}, "V5"),
        ({"major": 4}, "V5"),
        ({"minor": 1}, "V6"),
        ({"footer_size": 84}, "V7"),
        ({"op_size": 20}, "V8"),
        ({"cluster_ops": 1}, "V9"),
        ({"cluster_ops": 1024}, "V9"),
        ({"block_size": 0}, "V10"),
        ({"block_size": 256}, "V10"),
        ({"block_size": 5000}, "V10"),
        ({"op_count": 2, "op_count_max": 1}, "V21"),
        ({"op_count_max": 1 << 32}, "V21"),
        ({"compression": 5}, "V24"),
        ({"max_compression_size": 0}, "V29"),
        ({"max_compression_size": 2048}, "V29"),
        ({"max_compression_size": 12288}, "V29"),
        ({"max_compression_size": 524288}, "V29"),
        ({"num_merge_ops": 1}, "V25"),
        ({"num_merge_ops": 1 << 63}, "V25"),
    ],
)
def test_header_rows(changed: dict[str, int], statement: str) -> None:
    """V2, V4 (V3 is part of it), V5, V6, V7, V8, V9, V10, V21, V24, V25, V29: one header field each."""
    error = refused(header(**changed) + bytes(64), statement)
    assert error.offset is not None


@pytest.mark.parametrize("major", [1, 2])
def test_older_versions_are_named_as_unsupported(major: int) -> None:
    """COW-3 as far as it is implemented: versions 1 and 2 are refused as such, not as damage."""
    refused(header(major=major, header_size=38), "COW-3", errno.EOPNOTSUPP)


@pytest.mark.parametrize(("code", "name"), [(1, "gz"), (2, "brotli")])
def test_other_compressions_are_named_as_unsupported(code: int, name: str) -> None:
    """COW-108 as far as it is implemented: gz and brotli are refused by name."""
    assert name in str(refused(raw_cow([], compression=code), "COW-108", errno.EOPNOTSUPP))


def test_xor_is_named_as_unsupported() -> None:
    """COW-54: an XOR op is refused as such, not as damage."""
    refused(raw_cow([op(XOR, 1, 4096, 4096)], BLOCK), "COW-54", errno.EOPNOTSUPP)


@pytest.mark.parametrize("missing", [1, 16, 33])
def test_v11_truncated_ops(missing: int) -> None:
    """V11: the op region is not whole."""
    refused(raw_cow([op(COPY, 3, 7), op(ZERO, 5)])[:-missing], "V11")


def test_v11_truncated_sequence() -> None:
    """V11: the sequence is not whole."""
    refused(raw_cow([], sequence_data_count=100), "V11")


def test_v16_target_blocks_leave_32_bits() -> None:
    """V16: an op that covers blocks behind 2^32."""
    refused(raw_cow([op(REPLACE, (1 << 32) - 1, ONE, 8192, 1)], BLOCK * 2), "V16")


@pytest.mark.parametrize("offset", [-1, 1, 4096])
def test_v18_payload_elsewhere(offset: int) -> None:
    """V18 (COW-46): a payload must lie where the lengths before it say, to the byte."""
    ops = [op(REPLACE, 1, TWO, 4096), op(REPLACE, 2, TWO + 4096 + offset, 4096)]
    assert refused(raw_cow(ops, BLOCK * 3), "V18").op_index == 1


def test_v19_sequence_names_a_missing_block() -> None:
    """V19 (COW-73): every block of the sequence has an op."""
    error = refused(raw_cow([op(COPY, 3, 7), op(COPY, 4, 8)], sequence=(3, 5)), "V19")
    assert "block 5" in str(error)


def test_sequence_names_a_block_twice() -> None:
    """COW-67: the merge list is a permutation, so no block is in it twice."""
    refused(raw_cow([op(COPY, 3, 7), op(COPY, 4, 8)], sequence=(3, 3)), "COW-67")


@pytest.mark.parametrize("cut", [1, 4096])
def test_v20_payload_leaves_the_file(cut: int) -> None:
    """V20: a payload that ends behind the file's end."""
    refused(raw_cow([op(REPLACE, 1, ONE, 4096)], BLOCK)[:-cut], "V20")


@pytest.mark.parametrize("kind", [0, 4, 5, 7, 15])
def test_v22_types_that_version_3_does_not_have(kind: int) -> None:
    """V22 (COW-9): only copy, replace, zero and XOR."""
    refused(raw_cow([op(kind, 1)]), "V22")


@pytest.mark.parametrize(
    ("record", "unit"),
    [
        (op(REPLACE, 0, ONE, 4096, 7), 262144),
        (op(REPLACE, 0, ONE, 4096, 2), 8192),
        (op(COPY, 3, 7, exponent=1), 65536),
        (op(ZERO, 3, exponent=3), 65536),
    ],
)
def test_v23_exponent(record: RawOp, unit: int) -> None:
    """V23 (COW-21): exponent 7, above the file's unit, or on an op of one block."""
    refused(raw_cow([record], BLOCK, compression=4, max_compression_size=unit), "V23")


@pytest.mark.parametrize("again", [3, 4, 5, 6])
def test_v27_overlap(again: int) -> None:
    """V27 (COW-61, COW-209): no target block twice, a unit's inside included; both ops are named."""
    start = data_start(2)
    ops = [op(REPLACE, 3, start, 16384, 2), op(ZERO, again)]
    error = refused(raw_cow(ops, BLOCK * 4), "V27")
    assert error.op_index == 1
    assert "op 0" in str(error)


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
    refused(raw_cow([record], BLOCK), "V28")


@pytest.mark.parametrize(
    ("record", "compression", "statement"),
    [
        (op(REPLACE, 0, ONE, 0), 4, "COW-109"),
        (op(REPLACE, 0, ONE, 4097), 4, "COW-109"),
        (op(REPLACE, 0, ONE, 4095), 0, "COW-107"),
    ],
)
def test_payload_lengths(record: RawOp, compression: int, statement: str) -> None:
    """COW-107 and COW-109: never empty, never longer than the unit, and without compression exactly the unit."""
    refused(raw_cow([record], BLOCK * 2, compression=compression), statement)


@pytest.mark.parametrize(
    ("record", "base_blocks", "target_blocks"),
    [(op(COPY, 3, 8), 8, 8), (op(ZERO, 8), 8, 8), (op(REPLACE, 7, ONE, 8192, 1), 8, 8), (op(ZERO, 3), 8, 3)],
)
def test_v30_blocks_outside_the_images(record: RawOp, base_blocks: int, target_blocks: int) -> None:
    """V30: a source behind the base, or a target behind the image, once the sizes are known."""
    cow = CowFile.parse(store(raw_cow([record], BLOCK * 2)))
    with pytest.raises(CowError, match="V30"):
        cow.block_map(base_blocks * 4096, target_blocks * 4096)


def test_blocks_behind_the_base_need_an_op() -> None:
    """UNDO-23: an image longer than its base has an op for every block behind it."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 5)])))
    assert cow.block_map(5 * 4096).block_count == 6
    with pytest.raises(CowError, match="UNDO-23"):
        cow.block_map(4 * 4096)


def test_v32_resume_points_never_count() -> None:
    """V32: a resume point that names more ops than there are changes nothing that is read."""
    good = raw_cow([op(ZERO, 5)])
    bad = bytearray(good)
    bad[78:94] = struct.pack("<QQ", 9, 1000)
    bad[46:50] = struct.pack("<I", 1)
    assert CowFile.parse(store(bytes(bad))).ops == CowFile.parse(store(good)).ops


def test_scratch_must_lie_in_the_file() -> None:
    """COW-41: a header torn off its scratch area is no empty COW."""
    refused(header(buffer_size=2 << 20), "COW-41")


def test_an_ordered_merge_that_stopped_in_a_window_is_refused() -> None:
    """UNDO-28, COW-142: a scratch state of 2 means that the base holds neither image."""
    raw = bytearray(raw_cow([op(COPY, 3, 7)], buffer_size=2 << 20))
    raw[78] = 2
    refused(bytes(raw), "UNDO-28", errno.EBUSY)
    raw[78] = 1
    assert CowFile.parse(store(bytes(raw))).header.op_count == 1


def test_no_state_byte_without_scratch() -> None:
    """COW-215: with buffer_size 0 the byte behind the header is not a state."""
    raw = bytearray(raw_cow([op(COPY, 3, 7)]))
    raw[78] = 2
    assert CowFile.parse(store(bytes(raw))).header.op_count == 1


def test_a_half_merged_file_is_refused_and_a_merged_one_is_its_base() -> None:
    """COW-145, COW-65, UNDO-28: merged ops are read from the base; half-way, an ordered merge must finish first."""
    ops = [op(COPY, 3, 7), op(ZERO, 4)]
    half = CowFile.parse(store(raw_cow(ops, num_merge_ops=1)))
    with pytest.raises(CowError, match="UNDO-28"):
        half.block_map(8 * 4096)
    done = CowFile.parse(store(raw_cow(ops, num_merge_ops=2)))
    assert done.is_merged
    assert set(done.block_map(8 * 4096, merged=True).op_of_block) == {-1}

"""The layout of all versions as the reader sees it, byte by byte (sections 1 to 6 and appendix A of the format)."""

import hashlib
import struct

import pytest
import xxhash
from rawcow import (
    COPY,
    GZ,
    HEADER,
    LABEL,
    NONE,
    REPLACE,
    XOR,
    ZERO,
    RawStream,
    Rec,
    data_start,
    op,
    patched,
    raw_cow,
    raw_stream,
    sequence_of,
    store,
    stream_header,
)

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.errors import CowError
from snapd.cow.format import OP_V2, PROGRESS_OFFSET, Compression, OpType
from snapd.cow.header import Header
from snapd.cow.image.view import CowView
from snapd.cow.op import Op
from snapd.cow.parse.mergeorder import merge_list
from snapd.cow.parse.parsed import End
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
EXAMPLE = [Rec(COPY, 3, 7), Rec(REPLACE, 5, payload=BLOCK), Rec(ZERO, 6)]
# What zlib made of a block of 0x41 at level 9, appendix A.4.
STREAM = bytes.fromhex("78daedc1010d000000c2a06cef5fca1e0e28000000e0dd00ffad103d")


def image(raw: bytes, base: bytes) -> bytes:
    """What a file reads as over a base."""
    below = store(base)
    view = CowView(CowFile.parse(store(raw)).extent_map(len(base)), store(raw), source=below, base=below)
    return read_bytes(view, 0, view.size)


def check_example(raw: bytes, size: int, sha256: str) -> CowFile:
    """The bytes are the worked example, and it parses to its three ops and reads as it must."""
    assert len(raw) == size
    assert hashlib.sha256(raw).hexdigest() == sha256
    cow = CowFile.parse(store(raw))
    assert cow.ops.type.tolist() == [COPY, REPLACE, ZERO]
    assert cow.ops.new_block.tolist() == [3, 5, 6]
    assert cow.ops.source.tolist()[::2] == [7, 0]
    base = b"".join(bytes([number]) * 4096 for number in range(8))
    blocks = image(raw, base)[::4096]
    assert list(blocks) == [0, 1, 2, 7, 4, 0x41, 0, 7]
    return cow


def test_a1_version_2_without_clusters() -> None:
    """A.1: COW-1, COW-2, COW-10, COW-11, COW-24, COW-25, COW-204: the tables alone give the file, and it is read."""
    raw = raw_stream(EXAMPLE).raw
    cow = check_example(raw, 4278, "84e8bdd7c4ce952a7b5cd1296de0d7468e87bd074bca4f85dcc3b7bab15a706f")
    assert (cow.header.version, cow.header.cluster_ops, cow.end) == (2, 0, End.FINISHED)
    assert raw[:8] == b"!!WOcwoC"
    assert cow.ops.payload[1] == 0x4E


def test_a2_version_2_with_clusters() -> None:
    """A.2: COW-27, COW-28, COW-29, COW-31, COW-33: a cluster of four, ended by itself, and the footer behind it."""
    raw = raw_stream(EXAMPLE, cluster_ops=4).raw
    cow = check_example(raw, 4298, "4f96739b5e13bb503bf27ccbf4df839620badb15d5a8237ef0ef4e90fd014f5e")
    assert cow.ops.payload[1] == 0x76


def test_a3_version_3() -> None:
    """A.3: COW-12, COW-41, COW-43, COW-45, COW-46."""
    raw = raw_cow([op(COPY, 3, 7), op(REPLACE, 5, 0xBE, 4096), op(ZERO, 6)], BLOCK, max_compression_size=4096)
    cow = check_example(raw, 4286, "b89488221531d344bec3bd479b204546185a3d01709c28b0fd47ca3408de88c5")
    assert (cow.header.compression, cow.end, cow.cursor) == (Compression.NONE, End.OPEN, None)


def test_a4_version_3_with_a_label() -> None:
    """A.4: COW-22, COW-44, COW-51: a slot that is not used, a resume point, and the header's compression."""
    ops = [op(COPY, 3, 7), op(REPLACE, 5, 0xCE, 28), op(ZERO, 6)]
    raw = raw_cow(ops, STREAM, points=((9, 3),), op_count_max=4, compression=GZ, max_compression_size=4096)
    cow = check_example(raw, 234, "59b4a219c2ae9ca815443fe817bc8f0a7c555e226ce4b03135605147a805c7d1")
    assert cow.labels == ((9, 3),)


@pytest.mark.parametrize(
    ("records", "size", "count", "clusters", "footer"),
    [
        ([Rec(COPY, 3, 7)], 142, 1, [], 0x3A),
        ([Rec(REPLACE, 5, payload=BLOCK)], 4298, 2, [0x3A], 0x1076),
        ([Rec(ZERO, 5), Rec(ZERO, 6), Rec(ZERO, 7)], 202, 4, [0x62], 0x76),
        ([], 122, 0, [], 0x26),
    ],
)
def test_a5_clusters_of_four(records: list[Rec], size: int, count: int, clusters: list[int], footer: int) -> None:
    """A.5: COW-28, COW-30, COW-31, COW-33: clusters ended early, by themselves, and not at all for want of data."""
    stream = raw_stream(records, cluster_ops=4)
    for cluster in clusters:
        assert not any(stream.raw[cluster + 20 : 0x26 + 80])
    assert (len(stream.raw), stream.clusters, stream.footer) == (size, clusters, footer)
    assert struct.unpack_from("<Q", stream.raw, footer + 12) == (count,)
    cow = CowFile.parse(store(stream.raw))
    assert cow.op_count == len(records)
    assert cow.cursor is not None
    assert (cow.cursor.records, cow.cursor.op_pos) == (count, footer)


def test_a5_label_without_clusters() -> None:
    """A.5: COW-24: replace, label 9, zero, one behind the other."""
    stream = raw_stream([Rec(REPLACE, 5, payload=BLOCK), Rec(LABEL, 0, 9), Rec(ZERO, 6)])
    assert (len(stream.raw), stream.records[1]) == (4278, 0x103A)
    assert stream.raw[0x103A:0x104E] == bytes.fromhex("04000000 0000000000000000 0900000000000000")
    assert CowFile.parse(store(stream.raw)).labels == ((9, 1),)


def test_a5_sequence() -> None:
    """A.5: COW-58: a list behind the op area, and the merge order that it makes."""
    records = [sequence_of(5, 3), Rec(COPY, 3, 7), Rec(COPY, 5, 9), Rec(ZERO, 1), Rec(ZERO, 2)]
    stream = raw_stream(records, cluster_ops=8)
    assert (stream.payloads[0], stream.footer) == (0xC6, 0xCE)
    assert stream.raw[0xC6:0xCE] == bytes.fromhex("0500000003000000")
    assert struct.unpack_from("<Q", stream.raw, stream.clusters[0] + 12) == (0x30,)
    cow = CowFile.parse(store(stream.raw))
    assert cow.sequence.tolist() == [5, 3]
    assert cow.ops.new_block[merge_list(cow)].tolist() == [5, 3, 1, 2]


@pytest.mark.parametrize(
    ("raw", "record"),
    [
        ("00100000 32000000 0a80010000000060", Op(OpType.XOR, 50, 1, 24 * 4096 + 10, 4096)),
        ("25010000 64000000 ce06010000000028", Op(OpType.REPLACE, 100, 16, 0x106CE, 293)),
    ],
)
def test_a5_records_of_version_3(raw: str, record: Op) -> None:
    """A.5: COW-21, COW-54, COW-57: an XOR from an odd byte, and a unit of 16 blocks."""
    assert record.pack() == bytes.fromhex(raw)
    assert Op.unpack(bytes.fromhex(raw), 0) == record


def example_194() -> RawStream:
    """The file of COW-194, from the tables."""
    data = b"This is some data, believe it".ljust(4096, b"\0")
    records = [Rec(COPY, 0, 5), Rec(REPLACE, 2, payload=data), Rec(LABEL, 0, 1), Rec(XOR, 50, 24 * 4096 + 10, data)]
    records += [Rec(ZERO, block) for block in range(5, 15)] + [Rec(LABEL, 0, 2)]
    return raw_stream(records, cluster_ops=5, num_merge_ops=1, buffer_size=2 << 20)


def test_cow_194() -> None:
    """COW-194: 2105826 bytes of version 2 with clusters of five, scratch and progress, position by position."""
    stream = example_194()
    assert len(stream.raw) == 2105826
    assert hashlib.sha256(stream.raw).hexdigest() == "afd7288855d0d9afd55e87910cc1886d7e73b97876cc4d15b85303d8027c8e2f"
    assert stream.records[0] == 0x200026
    assert [stream.clusters[0], stream.footer] == [0x200076, 0x20218E]
    cow = CowFile.parse(store(stream.raw))
    assert cow.ops.payload.tolist()[1:3] == [0x20008A, 0x20108A]
    assert cow.ops.source.tolist()[1:3] == [0x20008A, 0x1800A]
    assert (cow.op_count, cow.header.num_merge_ops) == (13, 1)
    assert cow.cursor is not None
    assert cow.cursor.records == 18
    assert cow.labels == ((1, 2), (2, 13))
    assert cow.ops.new_block[merge_list(cow)].tolist() == [0, 50, 2, *range(5, 15)]


@pytest.mark.parametrize("version", [1, 2])
def test_version_1_has_no_scratch(version: int) -> None:
    """COW-3, COW-11, COW-14: 34 bytes and no scratch space, whatever lies behind them."""
    stream = raw_stream(EXAMPLE, version)
    assert stream.records[0] == (34 if version == 1 else 38)
    cow = CowFile.parse(store(stream.raw))
    assert cow.header.version == version
    assert cow.header.buffer_size == 0
    # The first record is where version 2 has the size of the scratch space.
    assert stream.raw[34:38] == (b"\x01\0\0\0" if version == 1 else bytes(4))


def test_ops_of_every_version_are_the_same() -> None:
    """COW-205: in memory there is one form, which for version 3 is the one on disk, and one digest of it."""
    ops = [op(COPY, 3, 7), op(XOR, 9, 12345, 4096), op(ZERO, 6)]
    three = CowFile.parse(store(raw_cow(ops, BLOCK)))
    records = b"".join(struct.pack("<IIQ", *record) for record in ops)
    assert bytes(three.ops.records) == records
    assert three.ops_digest == xxhash.xxh3_64_intdigest(records)
    for version in (1, 2):
        stream = raw_stream([Rec(COPY, 3, 7), Rec(XOR, 9, 12345, BLOCK), Rec(LABEL, 0, 4), Rec(ZERO, 6)], version)
        cow = CowFile.parse(store(stream.raw))
        assert bytes(cow.ops.records) == records
        assert [cow.ops.op(index) for index in range(3)] == [three.ops.op(index) for index in range(3)]
        assert cow.ops_digest == three.ops_digest
    assert CowFile.parse(store(raw_cow(ops, BLOCK, points=((1, 2),))), label=1).ops_digest == (
        xxhash.xxh3_64_intdigest(records[:32])
    )


def test_header_fields() -> None:
    """COW-10, COW-12: every field of version 3 is found where the table has it, and packed there again."""
    values = dict(zip(["num_merge_ops", "buffer_size", "sequence_data_count"], (5, 6, 7), strict=True))
    raw = HEADER.pack(0x436F77634F572121, 3, 0, 78, 0, 16, 512, 0, *values.values(), 8, 9, 10, 11, 4, 8192)
    header = Header.unpack(raw)
    assert (header.num_merge_ops, header.buffer_size, header.sequence_data_count) == (5, 6, 7)
    assert (header.resume_point_count, header.resume_point_max, header.op_count, header.op_count_max) == (8, 9, 10, 11)
    assert (header.block_size, header.compression, header.max_compression_size) == (512, 4, 8192)
    assert (header.sequence_start, header.resume_start) == (78 + 6, 78 + 6 + 28)
    assert (header.ops_start, header.data_start) == (112 + 144, 112 + 144 + 176)
    assert header.pack() == raw
    for version in (1, 2):
        raw = stream_header(version, cluster_ops=200, num_merge_ops=3)
        assert Header.unpack(raw).pack() == raw


def test_regions_with_scratch() -> None:
    """COW-42: with 2 MiB of scratch the ops start at 0x20008e and the data 16 bytes a slot behind."""
    raw = raw_cow([op(REPLACE, 1, 0x20008E + 160, 4096)], BLOCK, op_count_max=10, buffer_size=2 << 20)
    cow = CowFile.parse(store(raw))
    assert (cow.header.ops_start, cow.header.data_start) == (0x20008E, 0x20008E + 160)
    assert cow.ops.payload.tolist() == [0x20008E + 160]
    assert cow.data_end == len(raw)


def test_unused_slots_say_nothing() -> None:
    """COW-44, COW-45: what lies in the slots behind op_count is not read; the data starts behind all slots."""
    raw = raw_cow([op(ZERO, 3), op(REPLACE, 5, data_start(5), 4096)], BLOCK, op_count_max=5)
    cow = CowFile.parse(store(patched(raw, data_start(2), b"\xff" * 48)))
    assert cow.ops.new_block.tolist() == [3, 5]
    assert cow.ops.source[1] == data_start(5)


def test_file_may_end_before_the_data() -> None:
    """COW-48: few ops and no payload end before the data region."""
    raw = raw_cow([op(ZERO, 1)], op_count_max=100)
    assert len(raw) < data_start(100)
    cow = CowFile.parse(store(raw))
    assert cow.ops.new_block.tolist() == [1]
    assert cow.data_end == data_start(100)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_empty_file_is_its_base(version: int) -> None:
    """COW-6, COW-212: no op means that the target is the base."""
    raw = raw_cow([]) if version == 3 else raw_stream([], version).raw
    assert image(raw, BLOCK * 3) == BLOCK * 3
    cow = CowFile.parse(store(raw))
    assert (cow.highest_target_block, cow.is_merged, cow.has_begun) == (-1, False, False)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_progress_lies_at_byte_26(version: int) -> None:
    """COW-145, COW-146: the one field that changes after the writer is done, in every version."""
    raw = raw_cow([op(COPY, 1, 2), op(ZERO, 3)]) if version == 3 else raw_stream(EXAMPLE[::2], version).raw
    for merged in (0, 1, 2):
        cow = CowFile.parse(store(patched(raw, PROGRESS_OFFSET, struct.pack("<Q", merged))))
        assert cow.header.num_merge_ops == merged
        assert (cow.is_merged, cow.has_begun) == (merged == 2, merged == 1)


def test_lookup_goes_through_the_nearest_unit() -> None:
    """COW-52, COW-53, COW-57, COW-63: a block inside a unit is that unit's, its neighbours are the base's."""
    unit = b"".join(bytes([value]) * 4096 for value in range(1, 5))
    base = b"".join(bytes([100 + value]) * 4096 for value in range(12))
    raw = raw_cow([op(COPY, 9, 0), op(REPLACE, 4, data_start(3), 16384, 2), op(ZERO, 2)], unit)
    assert list(image(raw, base)[17::4096]) == [100, 101, 0, 103, 1, 2, 3, 4, 108, 100, 110, 111]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_xor_reads_any_bytes_of_the_source(version: int) -> None:
    """COW-54, COW-36: payload XOR source, from a byte inside a block on, so from two blocks."""
    base = bytes(range(256)) * 64
    payload = bytes(byte ^ 0x5A for byte in range(256)) * 16
    if version == 3:
        raw = raw_cow([op(REPLACE, 0, data_start(2), 4096), op(XOR, 2, 4099, 4096)], BLOCK + payload)
    else:
        raw = raw_stream([Rec(REPLACE, 0, payload=BLOCK), Rec(XOR, 2, 4099, payload)], version, cluster_ops=8).raw
    expected = bytes(a ^ b for a, b in zip(payload, base[4099 : 4099 + 4096], strict=True))
    assert image(raw, base) == BLOCK + base[4096:8192] + expected + base[12288:]


def test_target_size_is_never_the_slot_count() -> None:
    """COW-66, COW-213: base or highest op, whichever is longer; op_count_max says nothing."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 5)], op_count_max=1)))
    assert cow.target_size(20 * 4096) == 20 * 4096
    assert cow.target_size(5 * 4096) == 6 * 4096
    assert CowFile.parse(store(raw_cow([], op_count_max=77))).target_size(4096) == 4096
    assert cow.extent_map(5 * 4096).block_count == 6
    assert cow.extent_map(6 * 4096, 9 * 4096 - 3 * 4096).block_count == 6


@pytest.mark.parametrize(("base", "target"), [(4095, None), (4096, 4097), (0, 0), (4096, -4096)])
def test_sizes_are_whole_blocks(base: int, target: int | None) -> None:
    """COW-5: an image is at least one block, and whole ones."""
    with pytest.raises(SnapdError) as caught:
        CowFile.parse(store(raw_cow([]))).extent_map(base, target)
    assert caught.value.reason == "EINVAL"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_another_block_size_is_honoured(version: int) -> None:
    """COW-4, COW-5: blocks are the header's, in target, source and units alike."""
    base = b"".join(bytes([value]) * 1024 for value in range(8))
    if version == 3:
        ops = [op(COPY, 1, 6), op(REPLACE, 4, data_start(2), 2048, 1)]
        raw = raw_cow(ops, b"\xaa" * 1024 + b"\xbb" * 1024, block_size=1024)
    else:
        records = [Rec(COPY, 1, 6), Rec(REPLACE, 4, payload=b"\xaa" * 1024), Rec(REPLACE, 5, payload=b"\xbb" * 1024)]
        raw = raw_stream(records, version, cluster_ops=8, block_size=1024).raw
    assert list(image(raw, base)[::1024]) == [0, 6, 2, 3, 0xAA, 0xBB, 6, 7]


@pytest.mark.parametrize("kind", [XOR, REPLACE, ZERO, COPY])
def test_types_of_records(kind: int) -> None:
    """COW-7, COW-8: the four types that map a block, in version 1 too."""
    payload = BLOCK if kind in (XOR, REPLACE) else b""
    cow = CowFile.parse(store(raw_stream([Rec(kind, 3, None if kind == REPLACE else 0, payload)], 1).raw))
    assert cow.ops.op(0).type is OpType(kind)
    assert OP_V2.size == 20


def test_a_compressed_block_in_version_2() -> None:
    """COW-17, COW-36: a payload of its own length each, between others."""
    records = [
        Rec(REPLACE, 1, payload=STREAM),
        Rec(COPY, 2, 0),
        Rec(XOR, 3, 0, STREAM),
        Rec(REPLACE, 4, payload=STREAM),
    ]
    for cluster_ops in (0, 2, 3, 64):
        stream = raw_stream(records, cluster_ops=cluster_ops, compression=GZ)
        assert CowFile.parse(store(stream.raw)).ops.payload.tolist() == stream.payloads
        assert image(stream.raw, bytes(5 * 4096)) == bytes(4096) + BLOCK + bytes(4096) + BLOCK * 2
    with pytest.raises(CowError, match="COW-107"):
        CowFile.parse(store(raw_stream(records, compression=NONE).raw))

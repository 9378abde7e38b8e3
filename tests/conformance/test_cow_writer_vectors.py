"""The worked examples and test vectors of the format, byte for byte (appendices A and D)."""

import hashlib
import struct
import zlib
from random import Random

import pytest

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.errors import CowError
from snapd.cow.format import PROGRESS_OFFSET, OpType
from snapd.cow.image.view import CowView
from snapd.cow.op import Op
from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import CowWriter, WriterOptions, create_writer

BLOCK = b"\x41" * 4096
TEXT = b"This is some data, believe it".ljust(4096, b"\0")
ALGORITHMS = ["none", "gz", "brotli", "lz4", "zstd"]


def v2(cluster_ops: int, compress: str = "none", *, scratch: bool = False, version: int = 2) -> WriterOptions:
    """Options of a version 2 file."""
    option = CompressOption.parse(compress)
    return WriterOptions(version=version, compression=option, cluster_ops=cluster_ops, scratch=scratch)


def v3(slots: int, compress: str = "none", *, unit: int = 4096) -> WriterOptions:
    """Options of a version 3 file."""
    return WriterOptions(compression=CompressOption.parse(compress), op_count_max=slots, unit=unit, scratch=False)


def begin(options: WriterOptions) -> tuple[SimStore, CowWriter]:
    """An empty file and its writer."""
    store = SimDisk(Random(0)).store("cow")
    return store, create_writer(store, options)


def content(store: SimStore) -> bytes:
    """All bytes."""
    return read_bytes(store, 0, store.size())


def sha256(store: SimStore) -> str:
    """The digest of all bytes."""
    return hashlib.sha256(content(store)).hexdigest()


def add_example(writer: CowWriter) -> None:
    """The three ops of appendix A."""
    writer.copy(3, 7)
    writer.raw(5, BLOCK)
    writer.zero(6)


@pytest.mark.parametrize(
    ("options", "size", "digest"),
    [
        (v2(0), 4278, "84e8bdd7c4ce952a7b5cd1296de0d7468e87bd074bca4f85dcc3b7bab15a706f"),
        (v2(4), 4298, "4f96739b5e13bb503bf27ccbf4df839620badb15d5a8237ef0ef4e90fd014f5e"),
        (v2(4, version=1), 4298, "4f96739b5e13bb503bf27ccbf4df839620badb15d5a8237ef0ef4e90fd014f5e"),
        (v3(3), 4286, "b89488221531d344bec3bd479b204546185a3d01709c28b0fd47ca3408de88c5"),
    ],
    ids=["A.1", "A.2", "COW-3", "A.3"],
)
def test_worked_examples(options: WriterOptions, size: int, digest: str) -> None:
    """A.1 to A.3: COW-3, COW-11, COW-12, COW-15, COW-17, COW-20, COW-24, COW-25, COW-27 to COW-29, COW-32, COW-45."""
    store, writer = begin(options)
    add_example(writer)
    writer.finalize()
    assert store.size() == writer.size == size
    assert sha256(store) == digest


def test_worked_example_with_gz_and_a_label() -> None:
    """A.4: COW-51, COW-83, COW-84, COW-223: byte for byte with a stock zlib, whose stream is the one printed there."""
    store, writer = begin(v3(4, "gz"))
    add_example(writer)
    writer.label(9)
    writer.finalize()
    raw = content(store)
    assert raw[0x4E:0x8E] == struct.pack("<QQ", 9, 3) + bytes(48)
    assert zlib.decompress(raw[0xCE:]) == BLOCK
    stock = bytes.fromhex("78daedc1010d000000c2a06cef5fca1e0e28000000e0dd00ffad103d")
    if zlib.compress(BLOCK, 9) == stock:
        assert len(raw) == 234
        assert sha256(store) == "59b4a219c2ae9ca815443fe817bc8f0a7c555e226ce4b03135605147a805c7d1"


def v2_record(kind: int, data_length: int, new_block: int, source: int) -> bytes:
    """A record, from the table of section 3.1 alone."""
    return struct.pack("<BBHQQ", kind, 0, data_length, new_block, source)


def test_one_copy_has_no_cluster_op() -> None:
    """A.5, COW-33: without data the footer follows in the op area."""
    store, writer = begin(v2(4))
    writer.copy(3, 7)
    writer.finalize()
    assert store.size() == writer.size == 142
    assert content(store)[0x26:0x4E] == v2_record(1, 0, 3, 7) + v2_record(255, 64, 20, 1)


def test_one_replace_ends_its_cluster_early() -> None:
    """A.5, COW-30, COW-33: the cluster op counts the unused slots, which are zeros."""
    store, writer = begin(v2(4))
    writer.raw(5, BLOCK)
    writer.finalize()
    raw = content(store)
    assert raw[0x26:0x4E] == v2_record(2, 4096, 5, 0x76) + v2_record(5, 0, 0, 0x1028)
    assert raw[0x4E:0x76] == bytes(40)
    assert raw[0x76:0x1076] == BLOCK
    assert raw[0x1076:] == v2_record(255, 64, 40, 2) + bytes(64)


def test_three_zeros_fill_a_cluster() -> None:
    """A.5, COW-31: the cluster op comes as soon as less than two slots are free."""
    store, writer = begin(v2(4))
    writer.zero(1, 3)
    writer.finalize()
    assert store.size() == writer.size == 202
    assert content(store)[0x62:0x8A] == v2_record(5, 0, 0, 0) + v2_record(255, 64, 80, 4)


def test_an_empty_stream_is_a_footer() -> None:
    """A.5: nothing but header and footer, with and without clusters."""
    for cluster_ops in (0, 4):
        store, writer = begin(v2(cluster_ops))
        writer.finalize()
        assert store.size() == writer.size == 122
        assert content(store)[0x26:] == v2_record(255, 64, 0, 0) + bytes(64)


def test_a_label_is_a_record() -> None:
    """A.5, COW-82: unclustered replace, label 9, zero."""
    store, writer = begin(v2(0))
    writer.raw(5, BLOCK)
    writer.label(9)
    writer.zero(6)
    writer.finalize()
    assert store.size() == 4278
    assert content(store)[0x103A:0x104E] == v2_record(4, 0, 0, 9)
    assert content(store)[-84:-64] == v2_record(255, 64, 60, 3)


def test_a_sequence_is_the_payload_of_an_op() -> None:
    """A.5, COW-58, COW-67: sequence [5, 3] in a cluster of eight."""
    store, writer = begin(v2(8))
    writer.sequence([5, 3])
    writer.copy(3, 7)
    writer.copy(5, 9)
    writer.zero(1, 2)
    writer.finalize()
    raw = content(store)
    assert raw[0x26:0x3A] == v2_record(7, 8, 0, 0xC6)
    assert raw[0xC6:0xCE] == struct.pack("<II", 5, 3)
    assert v2_record(5, 0, 0, 0x30) in raw[0x26:0xC6]
    assert raw[0xCE:] == v2_record(255, 64, 120, 6) + bytes(64)
    cow = CowFile.parse(store)
    assert cow.ops.new_block[merge_list(cow)].tolist() == [5, 3, 1, 2]


def test_single_records_of_version_3() -> None:
    """A.5, COW-20 to COW-22, COW-55, COW-115: an XOR op at byte 98314, a replace op of 16 blocks."""
    store, writer = begin(v3(1))
    writer.xor(50, BLOCK, 24, 10)
    writer.finalize()
    assert content(store)[0x8E:0x9E] == bytes.fromhex("00100000 32000000 0a80010000000060")
    assert Op(OpType.REPLACE, 100, 16, 0x106CE, 293).pack() == bytes.fromhex("25010000 64000000 ce06010000000028")


def test_the_file_that_other_readers_are_tested_with() -> None:
    """COW-194, COW-34, COW-36, COW-124, COW-134: 2 105 826 bytes with scratch, known by their SHA-256."""
    store, writer = begin(v2(5, scratch=True))
    writer.copy(0, 5)
    writer.raw(2, TEXT)
    writer.label(1)
    writer.xor(50, TEXT, 24, 10)
    writer.zero(5, 10)
    writer.label(2)
    writer.finalize()
    assert read_bytes(store, 0x20218E, 20) == v2_record(255, 64, 360, 18)
    # That file says of itself that one op is merged.
    store.write(struct.pack("<Q", 1), PROGRESS_OFFSET)
    assert store.size() == 2105826
    assert sha256(store) == "afd7288855d0d9afd55e87910cc1886d7e73b97876cc4d15b85303d8027c8e2f"
    store.write(struct.pack("<Q", 0), PROGRESS_OFFSET)
    cow = CowFile.parse(store)
    assert cow.op_count == 13
    assert cow.ops.new_block[merge_list(cow)].tolist() == [0, 50, 2, *range(5, 15)]
    assert [tuple(label) for label in cow.labels] == [(1, 2), (2, 13)]


def test_gz_streams() -> None:
    """COW-195: two blocks and the length of their streams, where zlib makes the stock ones."""
    store, writer = begin(v3(2, "gz"))
    blocks = [TEXT, b"More data!".ljust(4096, b"\0")]
    writer.raw(0, b"".join(blocks))
    writer.finalize()
    assert CowFile.parse(store).ops.data_length.tolist() == [len(zlib.compress(block, 9)) for block in blocks]
    if zlib.ZLIB_RUNTIME_VERSION == "1.2.13":
        assert CowFile.parse(store).ops.data_length.tolist() == [56, 41]


def as_long_as_itself() -> bytes:
    """A block whose zlib stream is exactly one block long."""
    for zeros in range(45, 65):
        for seed in range(100):
            block = Random(seed).randbytes(4096 - zeros) + bytes(zeros)
            if len(zlib.compress(block, 9)) == 4096:
                return block
    pytest.skip("this zlib makes no such stream")


def test_a_stream_as_long_as_its_block() -> None:
    """COW-196, COW-105, COW-106: version 2 stores the stream, version 3 the block."""
    block = as_long_as_itself()
    base = SimDisk(Random(0)).store("base", bytes(4096))
    for options, stored in ((v2(4, "gz"), zlib.compress(block, 9)), (v3(1, "gz"), block)):
        store, writer = begin(options)
        writer.raw(0, block)
        writer.finalize()
        cow = CowFile.parse(store)
        assert cow.ops.data_length.tolist() == [4096]
        assert read_bytes(store, int(cow.ops.payload[0]), 4096) == stored
        assert read_bytes(CowView(cow.extent_map(4096), store, source=base, base=base), 0, 4096) == block


def test_incompressible_blocks_in_version_2() -> None:
    """COW-105, COW-17, COW-18: gz and brotli grow, lz4 and zstd are stored raw, and every op names the algorithm."""
    noise = Random(1).randbytes(4096)
    for algorithm, length in (("gz", 4107), ("brotli", 4100), ("lz4", 4096), ("zstd", 4096)):
        store, writer = begin(v2(4, algorithm))
        writer.raw(0, noise)
        writer.xor(1, BLOCK, 0, 0)
        writer.finalize()
        code = CompressOption.parse(algorithm).algorithm
        raw = content(store)
        assert (raw[0x27], raw[0x27 + 20]) == (code, code)
        assert CowFile.parse(store).ops.data_length[0] == length


@pytest.mark.parametrize("sequence", [(2, 10, 6, 7, 3, 5), ()], ids=["sequence", "stream order"])
def test_merge_order_of_version_2(sequence: tuple[int, ...]) -> None:
    """COW-197, COW-67, COW-68: the ordered ops first, in the sequence's or the stream's order, the rest by block."""
    store, writer = begin(v2(1024))
    writer.sequence(sequence)
    copies = [6, 3, 2, 5, 10, 7] if sequence else [2, 10, 6, 7, 3, 5]
    for block, zeros in zip(copies, [[12, 8, 11], [], [4, 9], [1], [], []], strict=True):
        writer.copy(block, 100)
        for zero in zeros:
            writer.zero(zero)
    writer.finalize()
    cow = CowFile.parse(store)
    assert cow.ops.new_block[merge_list(cow)].tolist() == [2, 10, 6, 7, 3, 5, 1, 4, 8, 9, 11, 12]


def test_merge_order_without_a_sequence() -> None:
    """COW-198, COW-70, COW-211: version 3 takes the stream as it is and fails the check, version 2 sorts and passes."""
    found = {}
    for options in (v3(4), v2(1024)):
        store, writer = begin(options)
        writer.zero(9)
        writer.raw(8, BLOCK)
        writer.copy(3, 7)
        writer.zero(1)
        writer.finalize()
        cow = CowFile.parse(store)
        found[options.version] = cow.ops.new_block[merge_list(cow)].tolist(), bool(order_fault(cow))
    assert found == {3: ([9, 8, 3, 1], True), 2: ([3, 1, 8, 9], False)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_incompressible_unit_is_one_raw_op(algorithm: str) -> None:
    """COW-200, COW-106, COW-107: 16 incompressible blocks at 64 KiB are one op of exponent 4 and 65536 raw bytes."""
    noise = Random(2).randbytes(65536)
    store, writer = begin(v3(16, algorithm, unit=65536))
    writer.raw(100, noise)
    writer.finalize()
    length, new_block, info = struct.unpack("<IIQ", read_bytes(store, 0x8E, 16))
    assert (length, new_block, info >> 57 & 7) == (65536, 100, 4)
    assert read_bytes(store, 0x8E + 256, 65536) == noise


def test_the_last_four_labels() -> None:
    """COW-201, COW-83, COW-84, COW-86: seven labels leave four points, and the header counts four."""
    store, writer = begin(v3(7))
    for number in range(1, 8):
        writer.zero(number)
        writer.label(number)
    points = struct.unpack("<8Q", read_bytes(store, 0x4E, 64))
    assert points == (4, 4, 5, 5, 6, 6, 7, 7)
    assert struct.unpack("<II", read_bytes(store, 46, 8)) == (4, 4)
    assert [CowFile.parse(store, label=number).op_count for number in range(4, 8)] == [4, 5, 6, 7]
    with pytest.raises(CowError, match="V15"):
        CowFile.parse(store, label=3)


def test_one_op_more_than_slots() -> None:
    """COW-202, COW-127: a call that finds no slots adds nothing, and the file can still be finished."""
    store, writer = begin(v3(20))
    with pytest.raises(CowError, match="COW-127"):
        writer.zero(0, 21)
    writer.zero(0, 20)
    with pytest.raises(CowError, match="COW-127"):
        writer.zero(20)
    with pytest.raises(CowError, match="COW-127"):
        writer.copy(20, 1)
    with pytest.raises(CowError, match="COW-127"):
        writer.raw(20, BLOCK)
    writer.finalize()
    assert CowFile.parse(store).op_count == 20


@pytest.mark.parametrize("options", [v2(1024), v3(10)], ids=["v2", "v3"])
def test_a_sequence_of_more_than_there_are(options: WriterOptions) -> None:
    """COW-203, COW-73: a file whose sequence names a block without an op is refused, but not up to a label."""
    store, writer = begin(options)
    writer.sequence(range(10))
    writer.label(1)
    for block in range(9):
        writer.copy(block, block + 20)
    writer.label(2)
    writer.finalize()
    with pytest.raises(CowError, match="V19"):
        CowFile.parse(store)
    assert CowFile.parse(store, label=2).op_count == 9

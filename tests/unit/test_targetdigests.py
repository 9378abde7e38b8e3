"""The digests that writers work out for every target block, and when they refuse to."""

import errno
from random import Random

import pytest
from cow_writing import VERSIONS, Call, options

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk, SimStore
from snapd.cow.compress import CompressOption
from snapd.cow.digests import DigestLog, DigestTable, block_digest
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.targetdigests import TargetDigests
from snapd.cow.write.writer import CowWriter, WriterOptions, append_writer, create_writer

SIZE = 4096
RANDOM = Random(4)
SOURCE = [RANDOM.randbytes(SIZE) for _ in range(20)]
DATA = RANDOM.randbytes(SIZE * 2)
ZERO = bytes(SIZE)


def file(content: bytes = b"") -> SimStore:
    """A file of its own."""
    return SimDisk(Random(0)).store("file", content)


def begin(version: int = 3, compress: str = "none", *, target_blocks: int = 20) -> tuple[SimStore, SimStore, CowWriter]:
    """A COW over the source, its table, and the writer of both."""
    cow, table = file(), file()
    log = DigestLog.create(table, block_size=SIZE)
    digests = TargetDigests(log, file(b"".join(SOURCE)), len(SOURCE), target_blocks)
    return cow, table, create_writer(cow, options(version, compress), digests)


def known(cow: SimStore, table: SimStore, label: int | None = None) -> dict[int, int]:
    """The digests of a state, by block."""
    parsed = CowFile.parse(cow, label=label)
    dense = DigestTable.load(table, op_count=parsed.op_count, ops_digest=parsed.ops_digest).dense(20)
    return {block: digest for block, digest in enumerate(dense.tolist()) if digest}


def digests(blocks: dict[int, bytes]) -> dict[int, int]:
    """The digests of these blocks."""
    return {block: block_digest(content) for block, content in blocks.items()}


def xored(data: bytes, source: bytes) -> bytes:
    """Byte by byte."""
    return bytes(one ^ other for one, other in zip(data, source, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kind_of_op(version: int) -> None:
    """COW-54, COW-216: what is copied and XORed is read from the source, what is stored is hashed as it comes."""
    cow, table, writer = begin(version, "zstd")
    assert known(cow, table) == {} if version == 3 else True
    writer.copy(3, 8, 2)
    writer.raw(5, DATA)
    writer.label(1)
    expected = {3: SOURCE[8], 4: SOURCE[9], 5: DATA[:SIZE], 6: DATA[SIZE:]}
    assert known(cow, table, 1) == digests(expected)
    writer.zero(7, 3)
    writer.xor(12, DATA, 1, 100)
    encoder = options(version, "zstd").encoder()
    writer.put(OpType.REPLACE, 15, 1, 0, encoder.encode(DATA[:SIZE]))
    writer.put(OpType.XOR, 16, 1, 3 * SIZE + 1, encoder.encode(DATA[:SIZE]))
    writer.finalize()
    source = b"".join(SOURCE)
    expected |= dict.fromkeys((7, 8, 9), ZERO)
    expected |= {
        12: xored(DATA[:SIZE], source[SIZE + 100 : 2 * SIZE + 100]),
        13: xored(DATA[SIZE:], source[2 * SIZE + 100 : 3 * SIZE + 100]),
        15: DATA[:SIZE],
        16: xored(DATA[:SIZE], source[3 * SIZE + 1 : 4 * SIZE + 1]),
    }
    unchanged = {block: SOURCE[block] for block in range(20) if block not in expected}
    assert known(cow, table) == digests(expected | unchanged)


@pytest.mark.parametrize("version", VERSIONS)
def test_going_on_after_the_end(version: int) -> None:
    """COW-93, COW-216: what was unchanged at one end may be changed at the next."""
    cow, table, writer = begin(version)
    writer.zero(2)
    writer.finalize()
    writer.raw(9, DATA)
    writer.finalize()
    expected = dict(enumerate(SOURCE)) | {2: ZERO, 9: DATA[:SIZE], 10: DATA[SIZE:]}
    assert known(cow, table) == digests(expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_going_on_behind_a_label(version: int) -> None:
    """COW-87, COW-88, COW-216: the table is cut first; blocks that lost their op are unchanged again."""
    cow, table, writer = begin(version)
    writer.zero(2)
    writer.label(1)
    writer.raw(9, DATA)
    writer.finalize()
    parsed = CowFile.parse(cow, label=1)
    log = DigestLog.reopen(table, op_count=parsed.op_count, ops_digest=parsed.ops_digest)
    again = TargetDigests(log, file(b"".join(SOURCE)), len(SOURCE), 20)
    writer = append_writer(cow, parsed, CompressOption.parse("none"), digests=again)
    writer.zero(10)
    writer.finalize()
    assert known(cow, table) == digests(dict(enumerate(SOURCE)) | {2: ZERO, 10: ZERO})


@pytest.mark.parametrize(
    "call",
    [
        lambda writer: writer.zero(20),
        lambda writer: writer.raw(19, DATA),
        lambda writer: writer.copy(1, 20),
        lambda writer: writer.copy(1, 18, 3),
        lambda writer: writer.xor(1, DATA, 18, 1),
        lambda writer: writer.put(OpType.XOR, 1, 1, 20 * SIZE - 1, DATA[:SIZE]),
    ],
)
def test_ops_that_leave_the_images(call: Call) -> None:
    """V30: refused before anything is changed, since the sizes are known here."""
    cow, table, writer = begin()
    with pytest.raises(CowError, match="V30") as caught:
        call(writer)
    assert caught.value.errno == errno.EINVAL
    writer.zero(1)
    writer.finalize()
    assert known(cow, table) == digests(dict(enumerate(SOURCE)) | {1: ZERO})


def test_a_target_behind_the_source_needs_ops() -> None:
    """UNDO-23: the end is refused and named until every such block has one; nothing is spoilt by the attempt."""
    cow, table, writer = begin(target_blocks=23)
    writer.zero(20)
    writer.zero(22)
    with pytest.raises(CowError, match=r"block 21 .*UNDO-23"):
        writer.finalize()
    writer.zero(21)
    writer.finalize()
    parsed = CowFile.parse(cow)
    end = DigestTable.load(table, op_count=parsed.op_count, ops_digest=parsed.ops_digest)
    assert end.target_bytes == 23 * SIZE


def test_a_source_that_cannot_be_read_ends_the_writer() -> None:
    """COW-216: a digest that is not known is never made up."""
    table = file()
    log = DigestLog.create(table, block_size=SIZE)
    short = file(b"".join(SOURCE[:5]))
    cow = file()
    writer = create_writer(cow, options(3), TargetDigests(log, short, len(SOURCE), 20))
    writer.zero(1)
    with pytest.raises(SnapdError) as caught:
        writer.copy(2, 10)
    assert caught.value.errno == errno.EIO
    with pytest.raises(SnapdError) as caught:
        writer.finalize()
    assert caught.value.errno == errno.EIO
    assert CowFile.parse(cow).op_count == 0


def test_a_payload_that_does_not_decode_ends_the_writer() -> None:
    """COW-120, COW-216: what a caller encoded wrongly gets neither a digest nor a label."""
    cow, _, writer = begin(3, "zstd")
    with pytest.raises(CowError, match="COW-120"):
        writer.put(OpType.REPLACE, 1, 1, 0, b"not a frame")
    with pytest.raises(CowError, match="COW-120"):
        writer.label(1)
    assert CowFile.parse(cow).op_count == 0


def test_blocks_of_another_size() -> None:
    """COW-216: a table for other blocks is refused before anything is written."""
    cow = file()
    log = DigestLog.create(file(), block_size=512)
    with pytest.raises(CowError, match="COW-216"):
        create_writer(cow, WriterOptions(op_count_max=5), TargetDigests(log, file(bytes(512)), 1, 1))
    assert cow.size() == 0

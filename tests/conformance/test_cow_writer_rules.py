"""What the writers refuse, and that a refused call changes nothing (sections 6, 10 and 12)."""

import contextlib
import errno

import pytest
from cow_writing import BLOCK, VERSIONS, Call, begin, content, options

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import CowWriter, WriterOptions


def finished(settings: WriterOptions, *calls: Call) -> bytes:
    """The file that these calls make; those that are refused are left out."""
    store, writer = begin(settings)
    for call in calls:
        with contextlib.suppress(CowError):
            call(writer)
    writer.finalize()
    return content(store)


REFUSED: list[tuple[str, Call]] = [
    ("COW-59", lambda writer: writer.copy(1, 2, 0)),
    ("COW-59", lambda writer: writer.zero(1, 0)),
    ("COW-59", lambda writer: writer.raw(1, b"")),
    ("COW-60", lambda writer: writer.copy(90, 0, 11)),
    ("COW-60", lambda writer: writer.zero(100)),
    ("COW-60", lambda writer: writer.raw(99, BLOCK * 2)),
    ("COW-60", lambda writer: writer.xor(100, BLOCK, 0, 0)),
    ("COW-61", lambda writer: writer.zero(50)),
    ("COW-61", lambda writer: writer.copy(45, 0, 6)),
    ("COW-61", lambda writer: writer.raw(40, BLOCK * 20)),
    ("COW-61", lambda writer: writer.xor(50, BLOCK, 0, 0)),
    ("COW-61", lambda writer: writer.put(OpType.REPLACE, 50, 1, 0, BLOCK)),
    ("COW-23", lambda writer: writer.zero(1 << 32)),
    ("COW-23", lambda writer: writer.zero(-1)),
    ("COW-23", lambda writer: writer.copy(1, 1 << 48)),
    ("COW-23", lambda writer: writer.copy(1, (1 << 48) - 1, 2)),
    ("COW-23", lambda writer: writer.copy(1, -1)),
    ("COW-23", lambda writer: writer.xor(1, BLOCK, 1 << 36, 0)),
    ("COW-55", lambda writer: writer.xor(1, BLOCK, 0, 4096)),
    ("COW-55", lambda writer: writer.xor(1, BLOCK, 0, -1)),
    ("COW-129", lambda writer: writer.raw(1, b"x" * 4097)),
    ("COW-129", lambda writer: writer.xor(1, b"x" * 100, 0, 0)),
    ("COW-57", lambda writer: writer.put(OpType.XOR, 1, 2, 0, BLOCK * 2)),
    ("COW-57", lambda writer: writer.put(OpType.REPLACE, 1, 3, 0, BLOCK * 3)),
    ("COW-57", lambda writer: writer.put(OpType.COPY, 1, 1, 0, BLOCK)),
    ("COW-109", lambda writer: writer.put(OpType.REPLACE, 1, 1, 0, b"")),
    ("COW-109", lambda writer: writer.put(OpType.REPLACE, 1, 1, 0, b"short")),
    ("COW-50", lambda writer: writer.sequence([1])),
    ("COW-81", lambda writer: writer.label(1 << 64)),
    ("COW-81", lambda writer: writer.label(-1)),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("statement", "call"), REFUSED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(REFUSED)])
def test_a_refused_call_changes_nothing(version: int, statement: str, call: Call) -> None:
    """COW-23, COW-50, COW-55, COW-57, COW-59 to COW-61, COW-81, COW-109, COW-129: by name, and never half done."""
    settings = options(version, max_blocks=1 << 32) if statement == "COW-23" else options(version)

    def before(writer: CowWriter) -> None:
        writer.zero(50)

    def after(writer: CowWriter) -> None:
        writer.raw(1, BLOCK)

    _, writer = begin(settings)
    before(writer)
    with pytest.raises(CowError, match=statement):
        call(writer)
    assert writer.op_count == 1
    assert finished(settings, before, call, after) == finished(settings, before, after)


def test_more_slots_than_there_are_is_all_or_nothing() -> None:
    """COW-127: also for raw data of several batches, of which the first ones would have fitted."""
    settings = options(3, op_count_max=10, cluster_ops=4)

    def refused(writer: CowWriter) -> None:
        writer.raw(20, BLOCK * 11)

    with pytest.raises(CowError, match="COW-127"):
        refused(begin(settings)[1])
    assert finished(settings, refused, lambda writer: writer.raw(20, BLOCK * 10)) == finished(
        settings, lambda writer: writer.raw(20, BLOCK * 10)
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sequence_comes_first_and_once(version: int) -> None:
    """COW-50, COW-58, COW-67: not behind an op or a label, not twice, and no block twice."""
    calls: list[Call] = [
        lambda writer: writer.zero(1),
        lambda writer: writer.label(1),
        lambda writer: writer.sequence([4]),
    ]
    for call in calls:
        _, writer = begin(options(version))
        call(writer)
        with pytest.raises(CowError, match="COW-50"):
            writer.sequence([2])
    store, writer = begin(options(version))
    with pytest.raises(CowError, match="COW-67"):
        writer.sequence([4, 5, 4])
    with pytest.raises(CowError, match="COW-60"):
        writer.sequence([100])
    writer.sequence([5, 4])
    writer.copy(4, 9, 2)
    writer.finalize()
    assert CowFile.parse(store).sequence.tolist() == [5, 4]


def test_a_long_sequence_is_split_in_version_2() -> None:
    """COW-58: 2048 entries an op for blocks of 4 KiB."""
    store, writer = begin(options(2, max_blocks=5000, cluster_ops=3))
    blocks = list(range(4999, 0, -1))
    writer.sequence(blocks)
    writer.copy(0, 1)
    for block in blocks:
        writer.copy(block, 9999)
    writer.finalize()
    assert CowFile.parse(store).sequence.tolist() == blocks
    first = read_bytes(store, 0x26, 20)
    assert int.from_bytes(first[2:4], "little") == 8192


def test_no_sequence_without_clusters() -> None:
    """COW-26: such a file could not be read."""
    _, writer = begin(options(2, cluster_ops=0))
    with pytest.raises(CowError, match="COW-26"):
        writer.sequence([1])


@pytest.mark.parametrize(
    ("changed", "statement"),
    [
        ({"version": 0}, "COW-3"),
        ({"version": 4}, "COW-3"),
        ({"block_size": 0}, "COW-4"),
        ({"block_size": 3000}, "COW-4"),
        ({"block_size": 65536}, "COW-4"),
        ({"version": 2, "cluster_ops": 1}, "V9"),
        ({"cluster_ops": -1}, "V9"),
        ({"version": 2, "unit": 65536}, "COW-223"),
        ({"op_count_max": -1}, "COW-49"),
        ({"op_count_max": 1 << 32}, "COW-49"),
        ({"block_size": 8192, "unit": 4096}, "V23"),
        ({"threads": 0}, "thread"),
    ],
)
def test_options_that_no_file_can_have(changed: dict[str, int], statement: str) -> None:
    """COW-3, COW-4, COW-49, COW-223."""
    with pytest.raises(SnapdError, match=statement) as caught:
        WriterOptions(**{"op_count_max": 10, **changed})  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("level", ["gz,10", "brotli,12", "zstd,23", "gz,-2"])
def test_a_bad_level_fails_before_anything_is_written(version: int, level: str) -> None:
    """COW-101: neither at the first block nor, with threads, somewhere on one of them."""
    for threads in (1, 2):
        with pytest.raises(SnapdError) as caught:
            options(version, level, threads=threads)
        assert caught.value.errno == errno.EINVAL

"""Labels, going on behind one, and writing on after the end (section 8)."""

import struct
from random import Random

import pytest
import rawcow
from cow_writing import BLOCK, VERSIONS, begin, content, options

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.errors import CowError
from snapd.cow.parse.reader import CowFile, End
from snapd.cow.write.writer import CowWriter, WriterOptions, append_writer, create_writer

NONE = CompressOption.parse("none")


def go_on(store: SimStore, label: int | None) -> CowWriter:
    """A writer behind a label, or behind all that a file has."""
    return append_writer(store, CowFile.parse(store, label=label), NONE)


def labels(store: SimStore) -> list[tuple[int, int]]:
    """The labels of a version 3 file, with the number of ops before each."""
    return [(label.label, label.op_count) for label in CowFile.parse(store).labels]


def labelled(version: int, *numbers: int) -> tuple[SimStore, CowWriter]:
    """A file in which each label stands behind one zero op more."""
    store, writer = begin(options(version))
    for block, number in enumerate(numbers):
        writer.zero(block)
        writer.label(number)
    return store, writer


def test_the_first_of_equal_labels_counts_in_version_2() -> None:
    """COW-82: the same number may be given twice; a reader stops at the first."""
    store, _ = labelled(2, 7, 5, 7)
    assert CowFile.parse(store, label=7).op_count == 1
    assert CowFile.parse(store, label=5).op_count == 2


def test_the_last_of_equal_labels_counts_in_version_3() -> None:
    """COW-83: a label drops the points that it is not above, itself included."""
    store, writer = labelled(3, 1, 7, 7)
    assert labels(store) == [(1, 1), (7, 3)]
    writer.zero(50)
    writer.label(3)
    assert labels(store) == [(1, 1), (3, 4)]
    with pytest.raises(CowError, match="V15"):
        CowFile.parse(store, label=7)
    writer.label(0)
    assert labels(store) == [(0, 4)]
    assert read_bytes(store, 78, 64) == struct.pack("<QQ", 0, 4) + bytes(48)


@pytest.mark.parametrize("entries", [0, 97, 100, 104, 108])
def test_dropped_points_are_gone(entries: int) -> None:
    """COW-84, COW-85: labels 4 to 7, on behind 4, then 5: 6 and 7 are no labels any more, wherever the region lies."""
    store, writer = begin(options(3, op_count_max=200, max_blocks=200))
    if entries:
        writer.sequence(range(entries))
        writer.copy(0, 5, entries)
    for number in range(4, 8):
        writer.zero(120 + number)
        writer.label(number)
    writer = go_on(store, 4)
    assert labels(store) == [(4, entries + 1)]
    writer.zero(150)
    writer.label(5)
    assert labels(store) == [(4, entries + 1), (5, entries + 2)]
    for number in (6, 7):
        with pytest.raises(CowError, match="V15"):
            CowFile.parse(store, label=number)
    assert read_bytes(store, 78 + 4 * entries + 32, 32) == bytes(32)


def test_points_of_a_writer_that_counts_all_labels() -> None:
    """COW-84: a header that counts seven labels means four points; going on behind one makes it right."""
    store, _ = labelled(3, 1, 2, 3, 4, 5, 6, 7)
    store.write(struct.pack("<I", 7), 46)
    writer = go_on(store, 6)
    assert labels(store) == [(4, 4), (5, 5), (6, 6)]
    assert struct.unpack("<I", read_bytes(store, 46, 4)) == (3,)
    writer.zero(50)
    writer.label(9)
    assert labels(store) == [(4, 4), (5, 5), (6, 6), (9, 7)]


def test_points_among_others_that_mean_nothing() -> None:
    """COW-85: what another writer left between the points goes with the next label."""
    store, _ = labelled(3, 1, 2, 3, 4)
    store.write(struct.pack("<QQQQ", 2, 2, 1, 99), 78)
    assert labels(store) == [(2, 2), (3, 3), (4, 4)]
    writer = go_on(store, 3)
    assert labels(store) == [(2, 2), (3, 3)]
    writer.zero(50)
    writer.label(5)
    assert labels(store) == [(2, 2), (3, 3), (5, 4)]
    assert read_bytes(store, 78, 64) == struct.pack("<6Q", 2, 2, 3, 3, 5, 4) + bytes(16)


def test_another_number_of_points_is_not_appended_to() -> None:
    """COW-41: the writers keep four."""
    store, _ = labelled(3, 1)
    store.write(struct.pack("<I", 2), 50)
    # Two slots less: the ops follow at once.
    store.write(read_bytes(store, 78 + 64, 16), 78 + 32)
    with pytest.raises(CowError, match="COW-41"):
        go_on(store, 1)


@pytest.mark.parametrize("cluster_ops", [0, 2, 3, 4, 5, 1024])
def test_going_on_without_a_footer(cluster_ops: int) -> None:
    """COW-87, COW-94: a stream that was never finished ends as the one that was written in one go."""
    settings = options(2, cluster_ops=cluster_ops)
    files = []
    for is_cut in (False, True):
        store, writer = begin(settings)
        writer.raw(0, BLOCK * 2)
        writer.copy(5, 9)
        writer.label(3)
        if is_cut:
            # Lost with its writer, but for what lies on the disk.
            writer.raw(20, BLOCK * 5)
            writer.label(4)
            with pytest.raises(CowError, match="V12"):
                CowFile.parse(store)
            writer = go_on(store, 3)
        writer.raw(30, BLOCK)
        writer.finalize()
        files.append(content(store))
    assert files[0] == files[1]


def test_clusters_come_from_the_file() -> None:
    """COW-87: going on writes clusters as the file has them, ends a full one first, and counts its records anew."""
    store, writer = begin(options(2, cluster_ops=3))
    writer.zero(0)
    writer.label(1)
    writer.zero(1)
    writer.finalize()
    before = content(store)
    writer = go_on(store, 1)
    writer.zero(1)
    writer.finalize()
    assert content(store) == before
    cow = CowFile.parse(store)
    assert (cow.header.cluster_ops, cow.op_count) == (3, 2)


def test_the_layout_comes_from_the_file() -> None:
    """COW-88: block size, slots, units, sequence and payloads of version 3 stay."""
    store = SimDisk(Random(0)).store("cow")
    settings = WriterOptions(block_size=1024, unit=16384, op_count_max=17, scratch=False)
    writer = create_writer(store, settings)
    writer.sequence([3])
    writer.copy(3, 8)
    writer.raw(10, b"a" * 4096)
    writer.label(2)
    writer.raw(20, b"b" * 1024)
    writer.finalize()
    writer = go_on(store, 2)
    writer.raw(30, b"c" * 16384)
    assert writer.op_count_max == 17
    writer.finalize()
    cow = CowFile.parse(store)
    assert (cow.header.block_size, cow.header.max_unit, cow.sequence.tolist()) == (1024, 16384, [3])
    assert cow.ops.new_block.tolist() == [3, 10, 30]
    assert cow.ops.blocks.tolist() == [1, 4, 16]


def test_version_3_is_never_cut() -> None:
    """COW-92: what lies behind the end of the payloads stays, and means nothing."""
    store, writer = begin(options(3))
    writer.raw(0, BLOCK)
    writer.label(1)
    writer.raw(1, BLOCK * 9)
    writer.finalize()
    long = store.size()
    writer = go_on(store, 1)
    writer.finalize()
    assert store.size() == long
    assert writer.size == long - 9 * 4096
    assert CowFile.parse(store).op_count == 1


def test_version_2_is_cut_behind_its_footer() -> None:
    """COW-91: only by finalize."""
    store, writer = begin(options(2))
    writer.raw(0, BLOCK)
    writer.label(1)
    writer.raw(1, BLOCK * 9)
    writer.finalize()
    long = store.size()
    writer = go_on(store, 1)
    assert store.size() == long
    writer.finalize()
    assert store.size() == writer.size == long - 9 * 4096


@pytest.mark.parametrize("version", VERSIONS)
def test_what_lies_behind_the_label_is_gone_at_once(version: int) -> None:
    """COW-95, COW-214: before the first op is overwritten the file does not have it any more."""
    store, writer = begin(options(version))
    writer.zero(0)
    writer.label(1)
    writer.zero(1, 5)
    writer.finalize()
    writer = go_on(store, 1)
    assert not store.unflushed_sectors()
    if version == 2:
        with pytest.raises(CowError, match="V12"):
            CowFile.parse(store)
    else:
        assert CowFile.parse(store).op_count == 1
    assert CowFile.parse(store, label=1).op_count == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster_ops", [0, 4, 1024])
def test_writing_on_after_the_end(version: int, cluster_ops: int) -> None:
    """COW-91, COW-93: each finalize gives the file of what there is by then; twice in a row writes nothing."""
    settings = options(version, cluster_ops=cluster_ops)
    store, writer = begin(settings)
    for count in range(1, 5):
        writer.raw(10 * count, BLOCK)
        writer.zero(10 * count + 5, 2)
        writer.finalize()
        whole, one_go = begin(settings)
        for block in range(1, count + 1):
            one_go.raw(10 * block, BLOCK)
            one_go.zero(10 * block + 5, 2)
        one_go.finalize()
        assert content(store) == content(whole)
        assert writer.size == one_go.size
        writer.finalize()
        assert content(store) == content(whole)


def test_a_finished_stream_is_unfinished_by_the_next_label() -> None:
    """COW-93: between the two nothing says that it is whole."""
    store, writer = begin(options(2))
    writer.raw(0, BLOCK)
    writer.finalize()
    writer.zero(1)
    writer.label(8)
    with pytest.raises(CowError, match="V12"):
        CowFile.parse(store)
    assert CowFile.parse(store, label=8).op_count == 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster_ops", [0, 5])
def test_going_on_behind_the_end(version: int, cluster_ops: int) -> None:
    """COW-87, COW-88: without a label behind all ops, in version 2 where the footer was."""
    store, writer = begin(options(version, cluster_ops=cluster_ops))
    writer.raw(0, BLOCK * 2)
    if version == 3:
        writer.label(6)
    writer.zero(9)
    writer.finalize()
    writer = go_on(store, None)
    writer.raw(5, BLOCK)
    writer.label(7)
    writer.finalize()
    cow = CowFile.parse(store)
    assert cow.end is (End.FINISHED if version == 2 else End.OPEN)
    assert cow.ops.new_block.tolist() == [0, 1, 9, 5]
    assert [tuple(label) for label in cow.labels] == ([(7, 4)] if version == 2 else [(6, 2), (7, 4)])


def test_labels_have_64_bits() -> None:
    """COW-19, COW-81: all of them are told apart, the number is the caller's."""
    high = [1, 1 << 48, (1 << 48) + 1, (1 << 64) - 1]
    for version in VERSIONS:
        store, _ = labelled(version, *high)
        assert [CowFile.parse(store, label=number).op_count for number in high] == [1, 2, 3, 4]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_label_makes_durable(version: int) -> None:
    """COW-82, COW-83, COW-96: nothing that it promises waits for a flush."""
    store, writer = begin(options(version, cluster_ops=5))
    for number in range(8):
        writer.raw(10 * number, BLOCK * 3)
        writer.label(number)
        assert not store.unflushed_sectors()
    writer.zero(99)
    writer.finalize()
    assert not store.unflushed_sectors()


def test_a_new_file_is_as_good_as_empty() -> None:
    """COW-14, COW-90, COW-124: header and zeroed scratch in place of what was there, durable."""
    for version in VERSIONS:
        store = SimDisk(Random(0)).store("cow", b"\xff" * (3 << 20))
        create_writer(store, WriterOptions(version=version, op_count_max=5))
        assert not store.unflushed_sectors()
        assert store.size() == CowFile.parse(store).header.sequence_start if version == 3 else 38 + (2 << 20)
        assert read_bytes(store, store.size() - (2 << 20), 2 << 20) == bytes(2 << 20)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40, 63])
def test_a_file_that_ends_inside_its_resume_points_can_be_gone_on_with(length: int) -> None:
    """COW-48, COW-88: without ops a version 3 file need not have the whole region, whatever its header counts."""
    file = rawcow.store((rawcow.header(op_count_max=5, resume_point_count=4) + bytes(64))[: 78 + length])
    writer = append_writer(file, CowFile.parse(file), CompressOption.parse("none"))
    writer.zero(3)
    writer.label(7)
    writer.finalize()
    assert CowFile.parse(file, label=7).op_count == 1


def test_a_file_of_huge_clusters_is_not_gone_on_with() -> None:
    """V9, COW-91: what a header asks for in free slots is bounded before the first of them is written."""
    file, writer = begin(options(2))
    writer.zero(1)
    writer.label(1)
    file.write(struct.pack("<I", 1 << 31), 22)
    before = read_bytes(file, 0, file.size())
    with pytest.raises(CowError, match="clusters of 2147483648 ops"):
        append_writer(file, CowFile.parse(file, label=1), CompressOption.parse("none"))
    assert read_bytes(file, 0, file.size()) == before

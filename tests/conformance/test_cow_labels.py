"""Labels as a reader meets them: records of a stream in versions 1 and 2, resume points in version 3 (section 8)."""

import pytest
from rawcow import (
    COPY,
    LABEL,
    REPLACE,
    XOR,
    ZERO,
    Rec,
    data_start,
    op,
    patched,
    raw_cow,
    raw_stream,
    sequence_of,
    store,
)

from snapd.cow.cursor import Cursor
from snapd.cow.errors import CowError
from snapd.cow.parse.parsed import End
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
Points = tuple[tuple[int, int], ...]


def zeros(count: int, points: Points, **changed: int) -> bytes:
    """A version 3 file of so many ops, with these resume points."""
    return raw_cow([op(ZERO, block) for block in range(count)], b"", (), points, **changed)


def labels(raw: bytes) -> Points:
    """The labels that a strict parse offers; every one of them works."""
    found = CowFile.parse(store(raw)).labels
    for label, count in found:
        cow = CowFile.parse(store(raw), label=label)
        assert (cow.end, cow.op_count) == (End.LABEL, count)
        assert cow.labels == tuple(point for point in found if point.label <= label)
    return found


def test_resume_points() -> None:
    """COW-51, COW-86: label and number of ops before it; the region lies behind the sequence."""
    assert labels(zeros(7, ((4, 4), (5, 5), (6, 6), (7, 7)))) == ((4, 4), (5, 5), (6, 6), (7, 7))
    raw = raw_cow([op(COPY, 1, 9), op(COPY, 2, 9)], sequence=(2, 1), points=((9, 1),))
    assert labels(raw) == ((9, 1),)
    assert CowFile.parse(store(raw), label=9).sequence.tolist() == [2, 1]


def test_the_ops_before_a_label_are_all_that_counts() -> None:
    """COW-86, COW-88, COW-95: what follows the label need not even be there."""
    start = data_start(3)
    ops = [op(REPLACE, 1, start, 4096), op(XOR, 2, 0, 4096), op(REPLACE, 3, 0, 4096)]
    raw = raw_cow(ops, BLOCK * 2, points=((5, 2),))
    cow = CowFile.parse(store(raw), label=5)
    assert cow.data_end == start + 8192 == len(raw)
    assert (cow.op_count, cow.header.op_count) == (2, 3)
    with pytest.raises(CowError, match="V18"):
        CowFile.parse(store(raw))
    torn = raw_cow([op(ZERO, 1), op(ZERO, 2)], points=((5, 1),))[:-1]
    assert CowFile.parse(store(torn), label=5).op_count == 1
    with pytest.raises(CowError, match="V11"):
        CowFile.parse(store(torn))


@pytest.mark.parametrize("count", [4, 5, 7, 1 << 31])
def test_cow_84_the_count_is_no_count(count: int) -> None:
    """COW-84, COW-201: a writer may count labels ever added; there are never more than slots."""
    raw = zeros(7, ((4, 4), (5, 5), (6, 6), (7, 7)), resume_point_count=count)
    assert labels(raw) == ((4, 4), (5, 5), (6, 6), (7, 7))
    with pytest.raises(CowError, match="V15"):
        CowFile.parse(store(raw), label=3)


def test_a_count_below_the_slots() -> None:
    """COW-84: slots behind the count say nothing."""
    assert labels(zeros(7, ((4, 4), (5, 5)), resume_point_count=1)) == ((4, 4),)
    assert labels(zeros(7, ((4, 4), (5, 5)), resume_point_count=0)) == ()


@pytest.mark.parametrize("ops", [2, 3, 5, 8])
def test_cow_85_points_left_behind(ops: int) -> None:
    """COW-85: labels 4 to 7, an append at 4, then 5 again: what is left of 6 and 7 must not be resumed at.

    Label 5 stands at all ops but one. Then 6 and 7 are known by counts that are too large or get smaller; but where
    they happen to fit, nothing in the file tells.
    """
    raw = zeros(ops, ((4, 1), (5, ops - 1), (6, 3), (7, 4)), resume_point_count=5)
    expected = {2: ((4, 1), (5, 1)), 3: ((4, 1), (5, 2), (6, 3)), 5: ((4, 1), (5, 4)), 8: ((4, 1), (5, 7))}
    assert labels(raw) == expected[ops]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((3, 1), (9, 2), (5, 3), (6, 4)), ((3, 1), (9, 2))),
        (((3, 1), (3, 2)), ((3, 1),)),
        (((3, 1), (0, 0), (0, 0), (0, 0)), ((3, 1),)),
        (((0, 0), (1, 0), (2, 0), (3, 4)), ((0, 0), (1, 0), (2, 0), (3, 4))),
        (((1, 3), (2, 2), (3, 3)), ((1, 3),)),
        (((1, 99), (2, 2)), ((2, 2),)),
        (((8, 99), (2, 2), (9, 3)), ((9, 3),)),
        ((((1 << 64) - 1, 4),), (((1 << 64) - 1, 4),)),
        (((1, (1 << 64) - 1), (2, 1 << 63)), ()),
    ],
)
def test_what_counts_as_a_point(points: Points, expected: Points) -> None:
    """COW-84, COW-85, V32: along the slots labels grow and op counts do not shrink, and none is above op_count."""
    assert labels(zeros(4, points, resume_point_count=4)) == expected


def test_zeroed_slots_of_a_file_with_label_0() -> None:
    """COW-81, COW-84: 0 is a label like any other; a slot of zeros behind it is none."""
    assert labels(zeros(4, ((0, 3),), resume_point_count=4)) == ((0, 3),)


def test_the_resume_region_may_end_with_the_file() -> None:
    """COW-48: slots that the file is too short for are not there, as in a file that has no op yet."""
    assert labels(zeros(0, ())[:78]) == ()
    assert labels(patched(zeros(0, ((1, 0), (2, 0)))[: 78 + 20], 46, b"\x02")) == ((1, 0),)


def test_another_number_of_slots() -> None:
    """COW-41, COW-84: the header's, and the ops lie behind them all."""
    raw = bytearray(zeros(6, tuple((label, label) for label in range(1, 5)), resume_point_max=6))
    raw[78 + 64 : 78 + 64] = b"".join(value.to_bytes(8, "little") for value in (5, 5, 6, 6))
    raw[46] = 6
    assert labels(bytes(raw)) == tuple((label, label) for label in range(1, 7))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("cluster_ops", [0, 2, 3, 5, 64])
def test_labels_of_a_stream(version: int, cluster_ops: int) -> None:
    """COW-82, COW-86, COW-87: the first label of a value ends the parse, and the cursor stands behind it."""
    records = [
        *(Rec(LABEL, 0, 0), Rec(COPY, 1, 9), Rec(REPLACE, 2, payload=BLOCK), Rec(LABEL, 0, 7), Rec(XOR, 3, 5, BLOCK)),
        *(Rec(LABEL, 0, 7), Rec(LABEL, 0, 3), Rec(ZERO, 4)),
    ]
    stream = raw_stream(records, version, cluster_ops=cluster_ops)
    whole = CowFile.parse(store(stream.raw))
    assert (whole.end, whole.labels) == (End.FINISHED, ((0, 0), (7, 2), (7, 3), (3, 3)))
    for label, count, last in ((0, 0, 0), (7, 2, 3), (3, 3, 6)):
        cow = CowFile.parse(store(stream.raw), label=label)
        assert (cow.end, cow.op_count) == (End.LABEL, count)
        assert cow.cursor is not None
        assert cow.cursor.op_pos == stream.records[last] + 20
        assert cow.labels[-1].label == label
    with pytest.raises(CowError, match="V15"):
        CowFile.parse(store(stream.raw), label=4)


@pytest.mark.parametrize("cluster_ops", [0, 5])
def test_damage_behind_a_label(cluster_ops: int) -> None:
    """COW-94: whatever follows the label is not looked at; what comes before must be whole."""
    records = [Rec(REPLACE, 1, payload=BLOCK), Rec(LABEL, 0, 7), Rec(99, 5), Rec(ZERO, 1)]
    stream = raw_stream(records, cluster_ops=cluster_ops, finish=False)
    assert CowFile.parse(store(stream.raw), label=7).op_count == 1
    with pytest.raises(CowError, match="V22"):
        CowFile.parse(store(stream.raw))
    torn = patched(stream.raw, stream.records[0], b"\x63")
    with pytest.raises(CowError, match="V22"):
        CowFile.parse(store(torn), label=7)


def test_cow_203_a_sequence_that_is_ahead_of_its_ops() -> None:
    """COW-73, COW-203: ten blocks named and nine ops: refused, but not where a label cuts the file anyway."""
    copies = [Rec(COPY, block, 90) for block in range(9)]
    raw = raw_stream([sequence_of(*range(10)), *copies, Rec(LABEL, 0, 1)], cluster_ops=64).raw
    regions = raw_cow([op(COPY, block, 90) for block in range(9)], sequence=tuple(range(10)), points=((1, 9),))
    for file in (raw, regions):
        with pytest.raises(CowError, match="V19"):
            CowFile.parse(store(file))
        cow = CowFile.parse(store(file), label=1)
        assert (cow.op_count, len(cow.sequence)) == (9, 10)


def test_cursor_of_a_stream_that_goes_on() -> None:
    """COW-34, COW-35: after copy, replace, label and XOR a cluster of five is full, the next begins behind it."""
    records = [
        Rec(COPY, 1, 9),
        Rec(REPLACE, 2, payload=BLOCK),
        Rec(LABEL, 0, 7),
        Rec(XOR, 3, 5, BLOCK),
        Rec(LABEL, 0, 8),
    ]
    stream = raw_stream(records, cluster_ops=5, finish=False)
    begin = 38
    assert CowFile.parse(store(stream.raw), label=7).cursor == Cursor(5, begin + 60, begin + 100 + 4096, 3, 3)
    next_cluster = begin + 100 + 8192
    assert stream.records[4] == next_cluster
    cursor = CowFile.parse(store(stream.raw), label=8).cursor
    assert cursor == Cursor(5, next_cluster + 20, next_cluster + 100, 6, 1)


def test_a_begun_merge_shows_at_a_label_too() -> None:
    """COW-148, COW-217: whoever would append must see it; whether all is merged cannot be said of a part."""
    records = [Rec(COPY, 1, 9), Rec(LABEL, 0, 7), Rec(ZERO, 2)]
    cow = CowFile.parse(store(raw_stream(records, num_merge_ops=1).raw), label=7)
    assert (cow.is_merged, cow.has_begun) == (False, True)
    with pytest.raises(CowError, match="UNDO-28"):
        cow.extent_map(16 * 4096)

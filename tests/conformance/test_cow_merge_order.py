"""Merge order: how it follows from a file, version by version, and what an ordered merge must refuse (section 7)."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rawcow import COPY, LABEL, REPLACE, XOR, ZERO, Rec, data_start, op, raw_cow, raw_stream, sequence_of, store

from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
Call = tuple[int, int, int]
"""(kind, target block, source)."""


def stream(calls: list[Call], sequence: tuple[int, ...] = (), *, version: int = 2, cluster_ops: int = 64) -> CowFile:
    """A version 1 or 2 file of these ops."""
    records = [Rec(kind, new, None if kind == REPLACE else source, payload(kind)) for kind, new, source in calls]
    if sequence:
        records.insert(0, sequence_of(*sequence))
    return CowFile.parse(store(raw_stream(records, version, cluster_ops=cluster_ops).raw))


def regions(calls: list[Call], sequence: tuple[int, ...] = ()) -> CowFile:
    """A version 3 file of these ops."""
    at, ops, data = data_start(len(calls), len(sequence)), [], b""
    for kind, new, source in calls:
        ops.append(op(kind, new, at + len(data) if kind == REPLACE else source, len(payload(kind))))
        data += payload(kind)
    return CowFile.parse(store(raw_cow(ops, data, sequence)))


def payload(kind: int) -> bytes:
    """A block for the kinds that have one."""
    return BLOCK if kind in (REPLACE, XOR) else b""


def targets(cow: CowFile) -> list[int]:
    """Target blocks in merge order."""
    return [int(block) for block in cow.ops.new_block[merge_list(cow)]]


MIXED: list[Call] = [
    *((COPY, 6, 20), (ZERO, 12, 0), (ZERO, 8, 0), (ZERO, 11, 0), (COPY, 3, 20), (COPY, 2, 20), (ZERO, 4, 0)),
    *((ZERO, 9, 0), (COPY, 5, 20), (ZERO, 1, 0), (COPY, 10, 20), (COPY, 7, 20)),
]
SEQUENCE = (2, 10, 6, 7, 3, 5)


@pytest.mark.parametrize("version", [1, 2])
def test_cow_197_with_a_sequence(version: int) -> None:
    """COW-67, COW-71, COW-197: the listed blocks in list order, then the rest ascending."""
    cow = stream(MIXED, SEQUENCE, version=version)
    assert targets(cow) == [2, 10, 6, 7, 3, 5, 1, 4, 8, 9, 11, 12]
    assert order_fault(cow) == ""


def test_cow_197_without_a_sequence() -> None:
    """COW-68, COW-197, COW-211: copies in stream order, wherever the others stand, then the rest ascending."""
    copies: list[Call] = [(COPY, block, 20) for block in SEQUENCE]
    cow = stream([*MIXED[1:4], *copies[:3], MIXED[6], *copies[3:], MIXED[7], MIXED[9]])
    assert targets(cow) == [2, 10, 6, 7, 3, 5, 1, 4, 8, 9, 11, 12]
    assert order_fault(cow) == ""


def test_cow_197_a_list_in_several_ops() -> None:
    """COW-58: the lists of sequence ops follow each other, across clusters too."""
    records = [sequence_of(*SEQUENCE[:1]), sequence_of(*SEQUENCE[1:4]), sequence_of(*SEQUENCE[4:])]
    records += [Rec(kind, new, source) for kind, new, source in MIXED]
    for cluster_ops in (2, 3, 64):
        cow = CowFile.parse(store(raw_stream(records, cluster_ops=cluster_ops).raw))
        assert cow.sequence.tolist() == list(SEQUENCE)
        assert targets(cow) == [2, 10, 6, 7, 3, 5, 1, 4, 8, 9, 11, 12]


def test_sequence_of_version_3() -> None:
    """COW-69: as in version 2."""
    cow = regions(MIXED, SEQUENCE)
    assert targets(cow) == [2, 10, 6, 7, 3, 5, 1, 4, 8, 9, 11, 12]
    assert order_fault(cow) == ""


def test_cow_198_version_3_is_not_sorted() -> None:
    """COW-70, COW-198, COW-210, COW-211: the stream is the order, and that is refused; in version 2 it is none."""
    calls: list[Call] = [(ZERO, 9, 0), (REPLACE, 8, 0), (COPY, 3, 7), (ZERO, 1, 0)]
    cow = regions(calls)
    assert targets(cow) == [9, 8, 3, 1]
    assert order_fault(cow).startswith("op 2")
    assert "COW-74" in order_fault(cow)
    for version in (1, 2):
        older = stream(calls, version=version, cluster_ops=0)
        assert targets(older) == [3, 1, 8, 9]
        assert order_fault(older) == ""


@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        ([(COPY, 3, 2), (COPY, 2, 1)], ""),
        ([(COPY, 3, 2), (COPY, 2, 1), (COPY, 4, 2)], "op 2: reads block 2"),
        ([(COPY, 2, 1), (COPY, 3, 2)], "op 1: reads block 2"),
        ([(COPY, 1, 2), (COPY, 2, 3), (COPY, 3, 4)], ""),
        ([(COPY, 5, 9), (COPY, 6, 9), (COPY, 9, 1)], ""),
        ([(COPY, 9, 1), (COPY, 5, 9)], "op 1: reads block 9"),
        ([(COPY, 2, 1), (XOR, 3, 4097)], "op 1: reads block 2"),
        ([(COPY, 1, 9), (XOR, 3, 4097)], "op 1: reads block 1"),
        ([(COPY, 2, 1), (XOR, 3, 4096)], ""),
        ([(COPY, 1, 9), (XOR, 3, 4096)], "op 1: reads block 1"),
        ([(XOR, 1, 4096), (XOR, 2, 8191)], "op 1: reads block 1"),
        ([(XOR, 5, 5 * 4096), (XOR, 6, 6 * 4096 + 4095)], ""),
        ([(XOR, 7, 6 * 4096 + 1), (XOR, 6, 5 * 4096 + 1)], ""),
        ([(XOR, 6, 5 * 4096 + 1), (XOR, 7, 6 * 4096 + 1)], "op 1: reads block 6"),
    ],
)
def test_cow_199_what_was_overwritten(calls: list[Call], fault: str) -> None:
    """COW-75, COW-76, COW-199, V31: a block is read before any other op overwrites it; an XOR may read two."""
    for cow in (regions(calls), stream(calls), stream(calls, cluster_ops=0, version=1)):
        assert order_fault(cow).startswith(fault)
        assert bool(order_fault(cow)) == bool(fault)
        assert ("COW-75" in order_fault(cow)) == bool(fault)


def test_cow_74_a_sequence_names_every_reader() -> None:
    """COW-74: a copy or XOR that the sequence leaves out comes behind what reads nothing, or sorted."""
    calls: list[Call] = [(COPY, 6, 20), (XOR, 9, 4096), (ZERO, 5, 0)]
    for cow in (regions(calls, (6,)), stream(calls, (6,))):
        assert targets(cow) == [6, 5, 9]
        assert "op 1" in order_fault(cow)
        assert "COW-74" in order_fault(cow)
    assert order_fault(regions(calls, (9, 6))) == ""
    assert order_fault(regions(calls, (5, 9, 6))) != ""


def test_a_unit_is_listed_by_its_first_block() -> None:
    """COW-69, COW-73: the list has ops, whatever they cover."""
    start = data_start(3, 2)
    ops = [op(REPLACE, 8, start, 16384, 2), op(REPLACE, 0, start + 16384, 8192, 1), op(COPY, 30, 1)]
    cow = CowFile.parse(store(raw_cow(ops, BLOCK * 6, (30, 8))))
    assert targets(cow) == [30, 8, 0]


def test_a_sequence_of_a_file_cut_at_a_label() -> None:
    """COW-73, COW-203: the sequence stays, and what has no op yet is passed over."""
    records = [sequence_of(5, 3, 4), Rec(COPY, 3, 9), Rec(ZERO, 1), Rec(LABEL, 0, 2), Rec(COPY, 4, 9), Rec(COPY, 5, 9)]
    raw = raw_stream(records, cluster_ops=4).raw
    assert targets(CowFile.parse(store(raw))) == [5, 3, 4, 1]
    cut = CowFile.parse(store(raw), label=2)
    assert targets(cut) == [3, 1]
    raw = raw_cow([op(COPY, 3, 9), op(COPY, 5, 9)], sequence=(5, 3), points=((7, 1),))
    assert targets(CowFile.parse(store(raw), label=7)) == [3]
    assert targets(CowFile.parse(store(raw))) == [5, 3]


def test_a_file_without_ops_is_in_order() -> None:
    """COW-212: nothing to merge is nothing to refuse."""
    for cow in (regions([]), stream([]), stream([], cluster_ops=0, version=1)):
        assert targets(cow) == []
        assert order_fault(cow) == ""


calls_of_any_kind = st.lists(
    st.tuples(st.sampled_from([COPY, REPLACE, ZERO, XOR]), st.integers(0, 12), st.integers(0, 12 * 4096)),
    max_size=12,
    unique_by=lambda call: call[1],
).map(lambda calls: [(kind, new, at // 4096 if kind == COPY else at * (kind == XOR)) for kind, new, at in calls])


@given(calls_of_any_kind, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([1, 2, 3]))
@settings(max_examples=400, deadline=None)
def test_any_order_against_a_walk(calls: list[Call], random: Random, listed: bool, version: int) -> None:
    """COW-67 to COW-70, COW-76: list and verdict are those of the statements followed op by op."""
    sequence = tuple(random.sample([call[1] for call in calls], random.randint(0, len(calls)))) if listed else ()
    cow = regions(calls, sequence) if version == 3 else stream(calls, sequence, version=version)
    by_block = {new: (kind, new, source) for kind, new, source in calls}
    if sequence:
        first = [by_block[block] for block in sequence]
    elif version == 3:
        first = list(calls)
    else:
        first = [call for call in calls if call[0] in (COPY, XOR)]
    merge = first + sorted((call for call in calls if call not in first), key=lambda call: call[1])
    assert targets(cow) == [call[1] for call in merge]
    assert bool(order_fault(cow)) == walk_fails(merge)


def walk_fails(merge: list[Call]) -> bool:
    """COW-76, step by step."""
    overwritten, unordered = set[int](), False
    for kind, new, source in merge:
        if kind not in (COPY, XOR):
            unordered = True
            continue
        reads = {source} if kind == COPY else {source // 4096, (source + 4095) // 4096}
        if unordered or reads & overwritten:
            return True
        overwritten.add(new)
    return False

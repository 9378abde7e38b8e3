"""Merge order: how it follows from the file, and what an ordered merge must refuse."""

import struct

import numpy as np
import pytest
from cowfiles import block, store, written
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.store import read_bytes
from snapd.cow.format import HEADER_SIZE
from snapd.cow.mergeorder import NO_SOURCE, CopyOrder, merge_list, order_fault
from snapd.cow.reader import CowFile


def targets(cow: CowFile) -> list[int]:
    """Target blocks in merge order."""
    return [int(cow.new_block[index]) for index in merge_list(cow)]


def with_sequence(cow_bytes: bytes, blocks: list[int]) -> CowFile:
    """The file with a sequence put before its resume points; its ops have no payload."""
    raw = bytearray(cow_bytes)
    raw[38:46] = struct.pack("<Q", len(blocks))
    raw[HEADER_SIZE:HEADER_SIZE] = struct.pack(f"<{len(blocks)}I", *blocks)
    return CowFile.parse(store(bytes(raw)))


def test_without_a_sequence_the_stream_is_the_order() -> None:
    """COW-70, COW-198, COW-211: zero 9, replace 8, copy 3 <- 7, zero 1 merges as it stands, and that is refused."""
    cow = CowFile.parse(written(("zero", 9, 0), ("replace", 8, block(1)), ("copy", 3, 7), ("zero", 1, 0)))
    assert targets(cow) == [9, 8, 3, 1]
    assert "op 2" in order_fault(cow)
    assert "COW-74" in order_fault(cow)


def test_with_a_sequence_the_rest_follows_by_block() -> None:
    """COW-69: listed blocks in list order, then the others ascending."""
    cow = written(("zero", 12, 0), ("copy", 6, 20), ("zero", 8, 0), ("copy", 3, 21), ("copy", 2, 22), ("zero", 4, 0))
    parsed = with_sequence(read_bytes(cow, 0, cow.size()), [2, 6, 3])
    assert targets(parsed) == [2, 6, 3, 4, 8, 12]
    assert order_fault(parsed) == ""


@pytest.mark.parametrize(
    ("copies", "fault"),
    [
        ([(3, 2), (2, 1)], ""),
        ([(3, 2), (2, 1), (4, 2)], "op 2: reads block 2"),
        ([(2, 1), (3, 2)], "op 1: reads block 2"),
        ([(1, 2), (2, 3), (3, 4)], ""),
        ([(5, 9), (6, 9), (9, 1)], ""),
        ([(9, 1), (5, 9)], "op 1: reads block 9"),
    ],
)
def test_a_copy_after_its_source_was_overwritten(copies: list[tuple[int, int]], fault: str) -> None:
    """COW-75, COW-76, COW-199, V31: an op goes before any other that overwrites what it reads."""
    cow = CowFile.parse(written(*(("copy", new, source) for new, source in copies)))
    assert order_fault(cow).startswith(fault)
    assert bool(order_fault(cow)) == bool(fault)


def test_a_file_without_ops_is_in_order() -> None:
    """COW-212: nothing to merge is nothing to refuse."""
    assert order_fault(CowFile.parse(written())) == ""


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=41))
@settings(max_examples=300, deadline=None)
def test_any_copies_are_brought_into_order(pairs: list[tuple[int, int]]) -> None:
    """COW-78, COW-79, COW-157: every copy but one a cycle is emitted once, before its source is overwritten."""
    source = np.full(41, NO_SOURCE, dtype=np.int64)
    for target, value in pairs:
        source[target] = NO_SOURCE if value == target else value
    wanted = {int(target): int(source[target]) for target in np.flatnonzero(source >= 0)}
    emitted: list[tuple[int, int]] = []
    CopyOrder(source).emit(lambda target, value: emitted.append((target, value)))
    overwritten = set[int]()
    for target, value in emitted:
        assert wanted[target] == value
        assert value not in overwritten
        assert target not in overwritten
        overwritten.add(target)
    dropped = set(wanted) - overwritten
    assert dropped == set(wanted) - set(np.flatnonzero(source >= 0).tolist())
    assert len(dropped) == _cycles(wanted)


def _cycles(source: dict[int, int]) -> int:
    """How many cycles the copies form."""
    found = set[frozenset[int]]()
    for start in source:
        path, at = list[int](), start
        while at in source and at not in path:
            path.append(at)
            at = source[at]
        if at in path:
            found.add(frozenset(path[path.index(at) :]))
    return len(found)

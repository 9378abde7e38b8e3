"""Ops that read the source, in an order that an ordered merge takes as it comes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.cow.diff.blockrows import Ints
from snapd.cow.diff.copyfind import NO_SOURCE
from snapd.cow.diff.copyorder import CopyOrder

BLOCKS = 41


def ones(blocks: Ints) -> Ints:
    """Everything costs the same."""
    return np.ones(len(blocks), dtype=np.int64)


def emitted(reads: list[int], reads_next: list[bool]) -> tuple[list[int], set[int]]:
    """The target blocks in order, and those that were given up; `reads` has NO_SOURCE where there is no op."""
    array = np.array(reads, dtype=np.uint32)
    flags = np.array(reads_next)
    order = CopyOrder(array, flags, flags.copy())
    blocks = [
        block for run in order.emit(ones) for block in range(run.block, run.block + run.step * run.length, run.step)
    ]
    before = {block for block, read in enumerate(reads) if read != NO_SOURCE}
    return blocks, before - set(np.flatnonzero(array != NO_SOURCE).tolist())


@given(st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, 60), st.booleans()), max_size=BLOCKS))
@settings(max_examples=400, deadline=None)
def test_any_ops_are_brought_into_order(ops: list[tuple[int, int, bool]]) -> None:
    """COW-75, COW-78: each op comes once or is given up, before any other overwrites a block that it reads."""
    reads, reads_next = [NO_SOURCE] * BLOCKS, [False] * BLOCKS
    for block, read, two in ops:
        # Only an XOR may read its own block.
        reads[block], reads_next[block] = (NO_SOURCE, False) if read == block and not two else (read, two)
    blocks, given_up = emitted(reads, reads_next)
    assert sorted([*blocks, *given_up]) == [block for block in range(BLOCKS) if reads[block] != NO_SOURCE]
    overwritten = set[int]()
    for block in blocks:
        assert not overwritten & (set(range(reads[block], reads[block] + 1 + reads_next[block])) - {block})
        overwritten.add(block)


@pytest.mark.parametrize("shift", [1, 3, 20, -1, -3, -20])
@pytest.mark.parametrize("two", [True, False])
def test_moved_ranges_stay_runs(shift: int, two: bool) -> None:
    """COW-77: what moved up is taken from its end, what moved down from its start, in runs as long as the shift."""
    reads = [block + shift if 0 <= block + shift < 200 else NO_SOURCE for block in range(200)]
    blocks, given_up = emitted(reads, [two and read != NO_SOURCE for read in reads])
    assert not given_up
    steps = sum(abs(after - before) == 1 for before, after in itertools.pairwise(blocks))
    assert steps >= len(blocks) - 1 - len(blocks) // abs(shift)


def test_xor_with_its_own_and_the_next_block_is_one_run() -> None:
    """Data that moved by less than a block: each op reads its own block and a neighbour, and nothing is given up."""
    for reads in (list(range(100)), [NO_SOURCE, *range(99)]):
        blocks, given_up = emitted(reads, [read != NO_SOURCE for read in reads])
        assert not given_up
        assert all(abs(after - before) == 1 for before, after in itertools.pairwise(blocks))


def test_blocks_behind_the_target_are_never_overwritten() -> None:
    """A source that is larger than the target puts no op before another."""
    blocks, given_up = emitted([5, 6, 4], [True, False, True])
    assert (sorted(blocks), given_up) == ([0, 1, 2], set())

"""The set of mapped blocks against Python's own."""

from hypothesis import given
from hypothesis import strategies as st

from snapd.cow.write.mappedblocks import MappedBlocks

_RUNS = st.lists(st.tuples(st.one_of(st.integers(0, 60), st.integers(2000, 6200)), st.integers(1, 2500)), max_size=12)


@given(runs=_RUNS, end=st.integers(0, 9000))
def test_it_is_a_set(runs: list[tuple[int, int]], end: int) -> None:
    """COW-61: a run is taken as a whole or not at all, and the gaps are what is left, across pages."""
    mapped, expected = MappedBlocks(), set[int]()
    for start, count in runs:
        run = set(range(start, start + count))
        assert mapped.claim(start, count) == min(expected & run, default=None)
        if not expected & run:
            expected |= run
    gaps = list(mapped.gaps(end))
    assert [block for gap in gaps for block in range(gap.start, gap.end)] == sorted(set(range(end)) - expected)


def test_the_last_block_there_is() -> None:
    """COW-23: memory follows the blocks that are in it, not their numbers."""
    mapped = MappedBlocks()
    assert mapped.claim((1 << 32) - 1, 1) is None
    assert mapped.claim((1 << 32) - 5000, 5000) == (1 << 32) - 1
    assert mapped.claim((1 << 32) - 5000, 4999) is None
    assert mapped.claim(0, 5000) is None

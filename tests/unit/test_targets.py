"""T as runs and pieces, compared with the plain definition."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from random import Random

from zeromap import zero_map

from snapd.block.extent import Extent
from snapd.merge.targets import Targets

BLOCK = 4096


def coalesce(blocks: Iterable[int]) -> Iterator[Extent]:
    """The maximal runs of an ascending sequence of block numbers."""
    start = end = -1
    for block in blocks:
        if block == end:
            end += 1
            continue
        if start >= 0:
            yield Extent(start, end - start)
        start, end = block, block + 1
    if start >= 0:
        yield Extent(start, end - start)


def targets(blocks: set[int], count: int, piece_blocks: int) -> Targets:
    return Targets(zero_map(blocks, count, block_size=BLOCK), piece_blocks * BLOCK)


def test_runs_and_pieces_cover_exactly_t() -> None:
    """Runs are the maximal ones; pieces are bounded, ascending, and begin and end in T."""
    random = Random(4)
    for _ in range(100):
        count = random.randint(1, 200)
        blocks = {b for b in range(count) if random.random() < random.choice([0.05, 0.5, 0.95])}
        piece_blocks = random.choice([1, 2, 7, 64])
        start = random.randrange(count)
        t = targets(blocks, count, piece_blocks)
        wanted = sorted(b for b in blocks if b >= start)
        assert list(t.runs(start)) == list(coalesce(wanted))
        pieces = list(t.pieces(start))
        assert all(p.start in blocks and p.end - 1 in blocks and 1 <= p.length <= piece_blocks for p in pieces)
        assert all(a.end <= b.start for a, b in pairwise(pieces))
        assert [b for p in pieces for b in range(p.start, p.end) if b in blocks] == wanted
        assert t.count(start, count) == len(wanted)
        assert [bool(x) for p in pieces for x in t.mask(p)] == [
            b in blocks for p in pieces for b in range(p.start, p.end)
        ]


def test_long_gaps_are_not_read_over() -> None:
    """A piece joins runs over short gaps only: 64 KiB."""
    pieces = list(targets({0, 16, 34}, 40, 64).pieces(0))
    assert [(p.start, p.end) for p in pieces] == [(0, 17), (34, 35)]


def test_runs_begin_where_they_are_asked_for() -> None:
    """From the middle of a run on, and from behind the last one."""
    t = targets({0, 4, 5, 6, 9}, 12, 4)
    assert list(t.runs(5)) == [Extent(5, 2), Extent(9, 1)]
    assert list(t.runs(10)) == []
    assert t.count(5, 12) == 3

"""Extents: runs of consecutive blocks."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """`length` blocks from block `start`; in blocks, never bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first block behind the extent."""
        return self.start + self.length


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

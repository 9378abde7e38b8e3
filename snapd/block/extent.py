"""Extents: runs of consecutive blocks."""

from typing import NamedTuple


class Extent(NamedTuple):
    """`length` blocks from block `start`; in blocks, never bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first block behind the extent."""
        return self.start + self.length

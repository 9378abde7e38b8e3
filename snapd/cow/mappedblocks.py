"""The target blocks that have an op: what a writer needs to refuse a second one (COW-61).

One bit a block, in pages that exist where an op does: memory follows the ops, not the highest block.
"""

from collections.abc import Iterator

from snapd.block.extent import Extent

_PAGE_BLOCKS = 2048


class MappedBlocks:
    """A set of block numbers that only grows."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}

    def add(self, start: int, count: int) -> None:
        """Take in `count` blocks from `start`."""
        for page, mask in _masks(start, count):
            self._pages[page] = self._pages.get(page, 0) | mask

    def first_of(self, start: int, count: int) -> int | None:
        """The lowest of the `count` blocks from `start` that is in the set; None when none is."""
        for page, mask in _masks(start, count):
            if both := self._pages.get(page, 0) & mask:
                return page * _PAGE_BLOCKS + (both & -both).bit_length() - 1
        return None

    def gaps(self, end: int) -> Iterator[Extent]:
        """The runs of blocks below `end` that are not in the set, ascending; long ones come in pieces."""
        for page in range(-(-end // _PAGE_BLOCKS)):
            first = page * _PAGE_BLOCKS
            missing = ~self._pages.get(page, 0) & (1 << min(_PAGE_BLOCKS, end - first)) - 1
            while missing:
                skip = (missing & -missing).bit_length() - 1
                length = (~(missing >> skip) & (missing >> skip) + 1).bit_length() - 1
                yield Extent(first + skip, length)
                missing &= -1 << skip + length


def _masks(start: int, count: int) -> Iterator[tuple[int, int]]:
    while count > 0:
        page, bit = divmod(start, _PAGE_BLOCKS)
        length = min(count, _PAGE_BLOCKS - bit)
        yield page, (1 << length) - 1 << bit
        start += length
        count -= length

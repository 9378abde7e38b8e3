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

    def claim(self, start: int, count: int) -> int | None:
        """Take in the blocks if none of them is in the set; else change nothing and return the lowest that is."""
        page, bit = divmod(start, _PAGE_BLOCKS)
        if bit + count <= _PAGE_BLOCKS:
            # One op of one page, as nearly all are: a creation does this for every unit.
            mask, present = (1 << count) - 1 << bit, self._pages.get(page, 0)
            if both := present & mask:
                return page * _PAGE_BLOCKS + (both & -both).bit_length() - 1
            self._pages[page] = present | mask
            return None
        masks = _masks(start, count)
        pages = [self._pages.get(page, 0) for page, _ in masks]
        for (page, mask), present in zip(masks, pages, strict=True):
            if both := present & mask:
                return page * _PAGE_BLOCKS + (both & -both).bit_length() - 1
        for (page, mask), present in zip(masks, pages, strict=True):
            self._pages[page] = present | mask
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


def _masks(start: int, count: int) -> list[tuple[int, int]]:
    """The run as (page, bits in it)."""
    page, bit = divmod(start, _PAGE_BLOCKS)
    masks = []
    while bit + count > _PAGE_BLOCKS:
        masks.append((page, (1 << _PAGE_BLOCKS) - (1 << bit)))
        count -= _PAGE_BLOCKS - bit
        page, bit = page + 1, 0
    masks.append((page, (1 << count) - 1 << bit))
    return masks

"""Extent maps made by hand: which blocks have an op, of which kind, and nothing about content."""

from array import array
from collections.abc import Collection, Sequence

from snapd.cow.format import Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap


def zero_map(changed: Collection[int], blocks: int, *, block_size: int = 4096, ops_digest: int = 0) -> ExtentMap:
    """A map of `blocks` blocks, those in `changed` being zeros."""
    kinds = [OpType.ZERO if block in changed else UNCHANGED for block in range(blocks)]
    return kinds_map(kinds, block_size=block_size, ops_digest=ops_digest)


def kinds_map(kinds: Sequence[int], *, block_size: int = 4096, ops_digest: int = 0) -> ExtentMap:
    """A map of blocks that are each UNCHANGED or served by an op of this kind."""
    starts, whats = array("I"), array("Q")
    for block, kind in enumerate(kinds):
        if not whats or whats[-1] != kind << 60:
            starts.append(block)
            whats.append(kind << 60)
    starts.append(len(kinds))
    return ExtentMap(
        block_size=block_size,
        version=3,
        compression=Compression.NONE,
        max_unit=block_size,
        ops_digest=ops_digest,
        starts=memoryview(starts),
        whats=memoryview(whats),
        records=b"",
        payloads=memoryview(array("Q")),
        digests=None,
    )


def has_op(extent_map: ExtentMap, block: int) -> bool:
    """Whether an op serves the block."""
    return extent_map.run(extent_map.run_of(block)).kind != UNCHANGED

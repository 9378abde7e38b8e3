"""Extent maps made by hand: which blocks have an op, and nothing about content (they are all zero ops)."""

from array import array
from collections.abc import Collection

from snapd.cow.format import Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap


def zero_map(changed: Collection[int], blocks: int, *, block_size: int = 4096, ops_digest: int = 0) -> ExtentMap:
    """A map of `blocks` blocks, those in `changed` being zeros."""
    starts, whats = array("I"), array("Q")
    for block in range(blocks):
        what = OpType.ZERO << 60 if block in changed else UNCHANGED
        if not whats or whats[-1] != what:
            starts.append(block)
            whats.append(what)
    starts.append(blocks)
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

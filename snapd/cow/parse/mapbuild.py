"""From the ops of a parsed COW to its extent map."""

import errno
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from snapd.block.errors import SnapdError
from snapd.cow.digests import DigestTable
from snapd.cow.format import Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.cow.parse.optable import OpTable

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile

_Blocks = npt.NDArray[np.int64]
_Whats = npt.NDArray[np.uint64]


def build_extent_map(cow: "CowFile", target_blocks: int, *, merged: bool, digests: DigestTable | None) -> ExtentMap:
    """The map of a COW whose sizes were checked; one without changed runs when the base is known to be `merged`.

    Where ops overlap, which only a lenient parse lets pass, the last one wins (COW-209). ERANGE for a target whose
    number of blocks does not fit.
    """
    header, ops = cow.header, cow.ops
    if target_blocks >> 32:
        raise SnapdError(errno.ERANGE, f"target of {target_blocks} blocks: block numbers have 32 bits (COW-23)")
    if merged or not len(ops):
        starts, whats = np.array([0, target_blocks]), np.array([UNCHANGED], dtype=np.uint64)
    else:
        starts, whats = _with_gaps(*_served(ops), target_blocks)
    return ExtentMap(
        block_size=header.block_size,
        version=header.version,
        compression=Compression(header.compression),
        max_unit=header.max_unit,
        ops_digest=cow.ops_digest,
        starts=starts.astype(np.uint32).data,
        whats=whats.data,
        records=ops.records,
        payloads=ops.payload.data,
        digests=None if digests is None else digests.dense(target_blocks).data,
    )


def _served(ops: OpTable) -> tuple[_Blocks, _Whats, _Blocks]:
    """Start, encoded kind and end of every changed run, ascending."""
    start, order = _ascending(ops.new_block)
    what, end, zero = _encoded(ops)[order], ops.end.view(np.int64)[order], ops.type[order] == OpType.ZERO
    if (end[:-1] > start[1:]).any():
        return _last_wins(start, end, what, order)
    # A run goes on where the next op begins at its end and has the value that follows; the rest is equal then too.
    begins = np.ones(len(start), dtype=np.bool_)
    begins[1:] = (start[1:] != end[:-1]) | (what[1:] != what[:-1] + ~zero[:-1])
    first = np.flatnonzero(begins)
    return start[first], what[first], end[np.append(first[1:], len(start)) - 1]


def _ascending(new_block: npt.NDArray[np.uint32]) -> tuple[_Blocks, _Blocks]:
    """The blocks in ascending order, and which each of them was; equal ones stay as they were."""
    # Block and index in one number: sorting that is faster, and takes less memory, than sorting an index.
    keys = new_block.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    if (keys[1:] < keys[:-1]).any():
        keys.sort()
    return (keys >> np.uint64(32)).view(np.int64), (keys & np.uint64(0xFFFFFFFF)).view(np.int64)


def _encoded(ops: OpTable) -> _Whats:
    """Every op as a run of the file form (see `extentmap`)."""
    kind = ops.type
    what = np.arange(len(ops), dtype=np.uint64)
    np.copyto(what, ops.source, where=kind == OpType.COPY)
    what[kind == OpType.ZERO] = 0
    what |= kind.astype(np.uint64) << np.uint64(60)
    what |= ops.exponent.astype(np.uint64) << np.uint64(56)
    return what


def _last_wins(start: _Blocks, end: _Blocks, what: _Whats, order: _Blocks) -> tuple[_Blocks, _Whats, _Blocks]:
    """The same for ops that overlap: one run for every stretch that is left of an op.

    Only of a replaced unit a part can be left; where it begins in the unit, the op's own record tells.
    """
    # Between two neighbouring edges one op serves all blocks, or none does.
    edges = np.unique(np.concatenate([start, end]))
    low, high = np.searchsorted(edges, start), np.searchsorted(edges, end)
    owner = np.full(len(edges) - 1, -1, dtype=np.int64)
    for i in np.argsort(order, kind="stable").tolist():
        owner[low[i] : high[i]] = i
    first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    stop = np.append(first[1:], len(owner))
    kept = owner[first] >= 0
    return edges[first[kept]], what[owner[first[kept]]], edges[stop[kept]]


def _with_gaps(start: _Blocks, what: _Whats, end: _Blocks, target_blocks: int) -> tuple[_Blocks, _Whats]:
    """Put the unchanged runs between the changed ones; the starts end with the number of target blocks."""
    before = np.append(0, end)
    after = np.append(start, target_blocks)
    gap = before[before < after]
    starts = np.concatenate([start, gap])
    order = np.argsort(starts, kind="stable")
    whats = np.concatenate([what, np.full(len(gap), UNCHANGED, dtype=np.uint64)])[order]
    return np.append(starts[order], target_blocks), whats

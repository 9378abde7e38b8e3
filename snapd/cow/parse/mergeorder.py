"""The order in which an ordered merge takes the ops of a COW, and whether it may.

An ordered merge overwrites the image it reads from. So an op that reads a block comes before any other op that
overwrites it (COW-75), and ops that read nothing come last (COW-74). A reversible merge needs none of this (UNDO-6).
"""

import numpy as np
import numpy.typing as npt

from snapd.cow.format import OpType
from snapd.cow.parse.optable import OpTable
from snapd.cow.parse.reader import CowFile

_Int = npt.NDArray[np.int64]


def merge_list(cow: CowFile) -> _Int:
    """Op indices in the order in which an ordered merge takes them; every op once (COW-67 to COW-73).

    A sequence comes first and the rest follows by target block, in every version. A block of the sequence that has no
    op, as in a file cut at a label, is passed over.
    """
    ops = cow.ops
    if len(cow.sequence):
        return _then_by_block(ops, _listed(ops, cow.sequence))
    return _stream_order(ops) if cow.header.version == 3 else _readers_first(ops)


def order_fault(cow: CowFile) -> str:
    """Why an ordered merge must refuse this file (COW-74 to COW-76); empty when it need not."""
    ops, order = cow.ops, merge_list(cow)
    reads = _reads_source(ops)[order]
    count = len(order) if reads.all() else int(reads.argmin())
    late = reads[count:]
    if late.any():
        return f"op {order[count + int(late.argmax())]}: a copy or XOR behind an op that reads nothing (COW-74)"
    readers = order[:count]
    source = ops.source[readers]
    is_xor = ops.type[readers] == OpType.XOR
    block_size = np.uint64(cow.header.block_size)
    # An XOR from a byte inside a block reads two.
    first = np.where(is_xor, source // block_size, source)
    last = np.where(is_xor, (source + block_size - np.uint64(1)) // block_size, source)
    written = ops.new_block[readers]
    by_block = _sorted_by(written)
    for read in (first, last):
        place = np.searchsorted(written[by_block], read).clip(max=max(count - 1, 0))
        # Overwriting what it reads itself is the op's own affair.
        early = (written[by_block[place]] == read) & (by_block[place] < np.arange(count))
        if early.any():
            i = int(early.argmax())
            return f"op {readers[i]}: reads block {read[i]}, which an op before it overwrites (COW-75)"
    return ""


def _stream_order(ops: OpTable) -> _Int:
    """Version 3 without a sequence: as the producer put them (COW-70)."""
    return np.arange(len(ops))


def _readers_first(ops: OpTable) -> _Int:
    """Versions 1 and 2 without a sequence: what reads the source in stream order, then the rest by block (COW-68)."""
    return _then_by_block(ops, np.flatnonzero(_reads_source(ops)))


def _listed(ops: OpTable, sequence: npt.NDArray[np.uint32]) -> _Int:
    """The ops that begin at the blocks of the sequence."""
    by_block = _sorted_by(ops.new_block)
    starts = ops.new_block[by_block]
    place = np.searchsorted(starts, sequence)
    place = place[np.searchsorted(starts, sequence, side="right") > place]
    return by_block[place]


def _then_by_block(ops: OpTable, listed: _Int) -> _Int:
    rest = np.ones(len(ops), dtype=np.bool_)
    rest[listed] = False
    others = np.flatnonzero(rest)
    return np.concatenate([listed, others[_sorted_by(ops.new_block[others])]])


def _reads_source(ops: OpTable) -> npt.NDArray[np.bool_]:
    return np.isin(ops.type, (OpType.COPY, OpType.XOR))


def _sorted_by(blocks: npt.NDArray[np.uint32]) -> _Int:
    """The stable order of the blocks; much faster than sorting indices."""
    keys = blocks.astype(np.uint64) << np.uint64(32) | np.arange(len(blocks), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)

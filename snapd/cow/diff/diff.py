"""The difference of two images as ops: what makes the source the target, in an order that any merge takes.

Every target block is, in this priority, unchanged (no op), zero, a copy of a source block, or stored: as XOR where that
takes fewer bytes, else in a replace unit (COW-157). Ops that read another block than their own come first, in an order
that merges; then the XOR ops that read only their own; then zeros; then replaces (COW-70, COW-74, COW-75, COW-154).

Both images are read about twice, and of them some bytes a block are kept, whatever their size. The result depends on
the images and options only, never on threads.
"""

import errno
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from snapd.block.errors import SnapdError
from snapd.block.store import Store
from snapd.cow.diff.blockplan import BlockPlan, extents
from snapd.cow.diff.blockrows import Ints
from snapd.cow.diff.blockscan import Hashes, scan_images
from snapd.cow.diff.copyfind import find_copies
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.unitcoder import TASK_BLOCKS, UnitCoder, XorPayload
from snapd.cow.diff.xormode import XorMode
from snapd.cow.diff.xorsearch import find_moved
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.progress import Meter, Progress
from snapd.cow.write.basewriter import CowWriter

_MAX_BLOCKS = (1 << 32) - 1
_COPY_RUNS = 1024


@dataclass(frozen=True, slots=True)
class DiffCounts:
    """How many target blocks became what."""

    unchanged_blocks: int
    zero_blocks: int
    copy_blocks: int
    xor_blocks: int
    replace_blocks: int


class Diff:
    """The ops between two images, whose sizes are multiples of 4096 and not zero (EINVAL else).

    The images must not change meanwhile.
    """

    def __init__(self, source: Store, target: Store, options: CreateOptions, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._is_searching = options.has_xor and options.xor is XorMode.SEARCH
        source_blocks, self.target_blocks = _block_count(source, "source"), _block_count(target, "target")
        searched = source_blocks + self.target_blocks if self._is_searching else 0
        total = max(source_blocks, self.target_blocks) + searched + self.target_blocks
        self._meter = Meter(progress, total * BLOCK_SIZE)
        self._coder = UnitCoder(source, target, options)
        self.target_digests: Hashes = np.zeros(0, dtype=np.uint64)
        """The digest of every target block (COW-216), as soon as `write` is done."""

    def write(self, writer: CowWriter) -> DiffCounts:
        """Append the ops to `writer`, whose options are those of the diff."""
        plan = self._plan()
        copies, moved_xors = self._write_ordered(plan, writer)
        zeros = int(np.count_nonzero(plan.zero))
        stored = int(np.count_nonzero(plan.stored))
        self._meter.add((self.target_blocks - stored) * BLOCK_SIZE)
        xors = self._write_xors(plan, writer)
        for extent in extents(plan.zero, limit=len(plan.zero)):
            writer.zero(extent.start, extent.length)
        for payloads in self._coder.units(extents(plan.stored, limit=TASK_BLOCKS)):
            for block, blocks, payload in payloads:
                writer.put(OpType.REPLACE, block, blocks, 0, payload)
                self._meter.add(blocks * BLOCK_SIZE)
        return DiffCounts(
            unchanged_blocks=plan.unchanged_blocks,
            zero_blocks=zeros,
            copy_blocks=copies,
            xor_blocks=moved_xors + xors,
            replace_blocks=stored - xors,
        )

    def _plan(self) -> BlockPlan:
        """What of the target is unchanged, zero, a copy, or the XOR of moved data; the rest is to be stored."""
        options = self._options
        scan = scan_images(self._source, self._target, options, self._meter)
        self.target_digests = scan.target_hash
        copy_of = find_copies(self._source, self._target, scan, options.jobs)
        if not self._is_searching:
            return BlockPlan(scan, copy_of, None)
        moved = find_moved(self._source, self._target, scan, copy_of, options, self._meter)
        plan = BlockPlan(scan, copy_of, moved)
        candidates = extents(plan.stored.copy(), limit=TASK_BLOCKS, having=plan.has_moved)
        for payloads in self._coder.better_as_xor(candidates, plan.closest):
            for block, source, _ in payloads:
                if source != block * BLOCK_SIZE:
                    plan.make_moved_xor(block, source)
        return plan

    def _write_ordered(self, plan: BlockPlan, writer: CowWriter) -> tuple[int, int]:
        """The ops that read other blocks than their own; returns the numbers of copies and of XOR ops.

        What has to be given up for an order is to be stored then.
        """
        waiting: deque[list[_CopyRun]] = deque()
        copies = xors = 0

        def xor_blocks() -> Iterator[Ints]:
            for runs, blocks in self._ordered(plan):
                waiting.append(runs)
                yield np.array(blocks, dtype=np.int64)

        for payloads in self._coder.as_xor(xor_blocks(), plan.moved_xor):
            # The copies that come before these XOR ops.
            for run in waiting.popleft():
                writer.copy(run.block, run.source, run.blocks)
                copies += run.blocks
            _put_xors(writer, payloads)
            xors += len(payloads)
        return copies, xors

    def _ordered(self, plan: BlockPlan) -> Iterator[tuple[list["_CopyRun"], list[int]]]:
        """The ops in an order that merges, some at a time: copies, and XOR blocks that come behind them."""
        is_xor, reads = plan.is_xor.data, plan.reads.data
        runs: list[_CopyRun] = []
        xors: list[int] = []
        for block in plan.in_merge_order(self._coder.weigh):
            if len(runs) == _COPY_RUNS or len(xors) == TASK_BLOCKS or (xors and not is_xor[block]):
                yield runs, xors
                runs, xors = [], []
            if is_xor[block]:
                xors.append(block)
            elif runs and runs[-1].goes_on(block, reads[block]):
                runs[-1].blocks += 1
            else:
                runs.append(_CopyRun(block, reads[block], 1))
        yield runs, xors

    def _write_xors(self, plan: BlockPlan, writer: CowWriter) -> int:
        """Of what is to be stored, what is smaller as XOR with its own place; returns the number of blocks."""
        xors = 0
        candidates = extents(plan.stored.copy(), limit=TASK_BLOCKS, having=plan.similar)
        for payloads in self._coder.better_as_xor(candidates, plan.same_place):
            _put_xors(writer, payloads)
            plan.stored[[payload.block for payload in payloads]] = False
            self._meter.add(len(payloads) * BLOCK_SIZE)
            xors += len(payloads)
        return xors


@dataclass(slots=True)
class _CopyRun:
    """`blocks` target blocks from `block` that are copies of the source blocks from `source` on."""

    block: int
    source: int
    blocks: int

    def goes_on(self, block: int, source: int) -> bool:
        """Whether the copy of one more block belongs to the run."""
        return block == self.block + self.blocks and source == self.source + self.blocks


def _put_xors(writer: CowWriter, payloads: list[XorPayload]) -> None:
    for block, source, payload in payloads:
        writer.put(OpType.XOR, block, 1, source, payload)


def _block_count(image: Store, name: str) -> int:
    """Blocks of an image; EINVAL when it is empty or no multiple of the block size (COW-149)."""
    size = image.size()
    if not size or size % BLOCK_SIZE:
        raise SnapdError(errno.EINVAL, f"{name} of {size} bytes: not a multiple of {BLOCK_SIZE}, or empty (COW-149)")
    if size // BLOCK_SIZE > _MAX_BLOCKS:
        raise SnapdError(errno.EFBIG, f"{name} of {size} bytes: more than {_MAX_BLOCKS} blocks (COW-23)")
    return size // BLOCK_SIZE

"""The checked parse of a COW file of any version (section 9, the "Ours" column).

Invariant: `CowFile.parse` returns a file of which every rule that needs no other file holds, or raises a
`CowError` that names the rule; nothing partly parsed is handed out. A lenient parse may let a few rules pass
(COW-208) and says so in `tolerated`. What a file costs is bounded by its own length, whatever its header says.
"""

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from snapd.block.errors import SnapdError
from snapd.block.store import Store, read_bytes
from snapd.cow.cursor import Cursor
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import PROGRESS_OFFSET, SCRATCH_DONE, OpType
from snapd.cow.header import MAX_HEADER_SIZE, Header
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.mapbuild import build_extent_map
from snapd.cow.parse.optable import OpTable
from snapd.cow.parse.parsed import End, Label
from snapd.cow.parse.regions import read_regions
from snapd.cow.parse.stream import read_stream

__all__ = ["CowFile", "End", "Label"]


@dataclass(frozen=True, slots=True)
class CowFile:
    """A parsed COW of `size` bytes.

    `ops` are the data ops in stream order, up to the label that was asked for. `sequence` are the target blocks whose
    ops an ordered merge takes first, in that order. `labels` are those that can be asked for, none behind the one that
    was. `cursor` is where the next record of a version 1 or 2 stream goes. `window_done` says that an ordered merge
    stopped while its scratch space held blocks that may be nowhere else (COW-142); without scratch there is no such
    state (COW-215).
    """

    header: Header
    size: int
    ops: OpTable
    sequence: npt.NDArray[np.uint32]
    labels: tuple[Label, ...]
    end: End
    cursor: Cursor | None
    is_merged: bool
    window_done: bool
    tolerated: Tolerance

    @classmethod
    def parse(cls, store: Store, *, label: int | None = None, lenient: bool = False) -> "CowFile":
        """Read and check a file: all of it, or what lies before `label` (COW-86, COW-87).

        An unfinished file of version 1 or 2 can only be read up to a label (V12, COW-214); V15 without that label.
        """
        tolerated = Tolerance()
        tolerance = tolerated if lenient else None
        size = store.size()
        header = Header.unpack(read_bytes(store, 0, min(size, MAX_HEADER_SIZE)), tolerance)
        if header.sequence_start > size:
            message = f"{header.buffer_size} bytes of scratch space leave the file of {size}"
            raise CowError(message, statement="V11", offset=34)
        read = read_regions if header.version == 3 else read_stream
        parsed = read(store, header, size, label=label, tolerance=tolerance)
        if parsed.op_total is not None and header.num_merge_ops > parsed.op_total:
            message = f"{header.num_merge_ops} ops merged of {parsed.op_total}"
            raise CowError(message, statement="V25", offset=PROGRESS_OFFSET)
        state = read_bytes(store, header.size, 1)[0] if header.buffer_size else 0
        return cls(
            header=parsed.header,
            size=size,
            ops=parsed.ops,
            sequence=parsed.sequence,
            labels=parsed.labels,
            end=parsed.end,
            cursor=parsed.cursor,
            is_merged=0 < header.num_merge_ops == parsed.op_total and state != SCRATCH_DONE,
            window_done=state == SCRATCH_DONE,
            tolerated=tolerated,
        )

    @property
    def op_count(self) -> int:
        """Data ops."""
        return len(self.ops)

    @property
    def has_begun(self) -> bool:
        """An ordered merge of this file has begun and is not over (COW-217)."""
        return (self.header.num_merge_ops > 0 or self.window_done) and not self.is_merged

    @property
    def ops_digest(self) -> int:
        """xxh3-64 of the ops in version 3 form."""
        return xxhash.xxh3_64_intdigest(self.ops.records)

    @property
    def highest_target_block(self) -> int:
        """The last target block any op writes; -1 without ops."""
        return int(self.ops.end.max()) - 1 if len(self.ops) else -1

    @property
    def data_end(self) -> int:
        """The byte behind the last payload, or where the first one would be."""
        if not len(self.ops):
            return self.cursor.data_pos if self.cursor is not None else self.header.data_start
        return int((self.ops.payload + self.ops.data_length).max())

    def target_size(self, base_size: int) -> int:
        """Bytes of the new image (COW-213): the base's size, or the end of the last op behind it."""
        return max(base_size, (self.highest_target_block + 1) * self.header.block_size)

    def extent_map(
        self,
        base_size: int,
        target_size: int | None = None,
        *,
        merged: bool = False,
        digests: DigestTable | None = None,
    ) -> ExtentMap:
        """The map of this COW over a base of `base_size` bytes; one without ops if the base is known to be `merged`.

        Without `target_size` the digests say it, else the base and the ops (COW-213).
        Errors: EINVAL for sizes that are no multiple of the block size; V30 for a source or target outside the
        images; UNDO-23 when the part behind the base is not covered by ops; EBUSY for a COW that another merge has
        begun (COW-65).
        """
        block_size = self.header.block_size
        if target_size is None:
            target_size = digests.target_bytes if digests is not None else None
        if target_size is None:
            target_size = self.target_size(base_size)
        for name, value in (("base", base_size), ("target", target_size)):
            if value % block_size:
                raise SnapdError(
                    errno.EINVAL, f"{name} of {value} bytes: not a multiple of the block size {block_size}"
                )
        if target_size <= 0:
            raise SnapdError(errno.EINVAL, f"target of {target_size} bytes: an image has at least one block")
        if self.has_begun:
            raise CowError(
                f"ordered merge begun, {self.header.num_merge_ops} ops are merged: finish it first",
                statement="UNDO-28",
                number=errno.EBUSY,
            )
        if not merged:
            self.check_sizes(base_size // block_size, target_size // block_size)
        return build_extent_map(self, target_size // block_size, merged=merged, digests=digests)

    def check_sizes(self, base_blocks: int, target_blocks: int) -> None:
        """No op leaves the images (V30), and what lies behind the base has an op (UNDO-23)."""
        ops, block_size = self.ops, self.header.block_size
        kind, source, start, end = ops.type, ops.source, ops.new_block, ops.end
        self._refuse_outside((kind == OpType.COPY) & (source >= base_blocks), f"the base has {base_blocks} blocks")
        beyond = (kind == OpType.XOR) & (source + np.uint64(block_size) > base_blocks * block_size)
        self._refuse_outside(beyond, f"the base has {base_blocks} blocks")
        self._refuse_outside(end > target_blocks, f"the target has {target_blocks} blocks")
        behind = np.flatnonzero(end > base_blocks)
        # Ops that overlap, which a lenient parse lets pass, must not count twice.
        behind = behind[np.argsort(start[behind], kind="stable")]
        reach = np.maximum.accumulate(end[behind])
        before = np.append(np.uint64(base_blocks), reach[:-1])
        covered = int((end[behind] - np.maximum(start[behind], np.minimum(before, end[behind]))).sum())
        if covered < target_blocks - base_blocks:
            raise CowError(
                f"{target_blocks - base_blocks} target blocks lie behind the base, ops cover only {covered}",
                statement="UNDO-23",
            )

    def _refuse_outside(self, outside: npt.NDArray[np.bool_], limit: str) -> None:
        if not outside.any():
            return
        index = int(outside.argmax())
        op = self.ops.op(index)
        unit = "byte" if op.type is OpType.XOR else "block"
        read = f" from {unit} {op.source}" if op.type in (OpType.COPY, OpType.XOR) else ""
        raise CowError(
            f"{op.type.name.lower()} to block {op.new_block}{read}: {limit}", statement="V30", op_index=index
        )

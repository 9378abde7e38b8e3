"""The extent map: which op serves a target block, as runs, in a form any process can map and index.

A *run* is a stretch of target blocks that are served the same way: unchanged, zero, a copy that goes on block by block,
or units of one size whose ops follow each other. So an image with few changes costs little, whatever its size, and the
read path, the merge, `info` and `verify` all walk the same runs. A worker must not import numpy to get there: the
control plane parses and checks a COW once, saves the map as a file, and workers map it.

File layout (little-endian, all of it derived from the COW and its digests, never a source of truth):

    0   8  magic "SNAPDMAP"                    40  4  compression code
    8   4  version, 2                          44  4  version of the COW file
    12  4  block size, bytes                   48  4  largest unit, bytes
    16  8  target blocks (B)                   52  4  1 with digests, else 0
    24  8  ops (N)                             56  8  xxh3-64 of the op records
    32  8  runs (R)                            64  8  xxh3-64 of everything from byte 80 on
                                               72  8  xxh3-64 of bytes 0..71
    80         8*R bytes: uint64 a run: type (bits 63 to 60, 0 = unchanged), log2 of the unit's blocks (59 to 56),
               and the value (47 to 0): a copy's source block, or the index of the op of the run's first block
    80+8*R     8*N bytes: uint64 an op, the byte offset of its payload in the COW
    ..         8*B bytes: uint64 a target block, its digest or 0 (COW-216); absent without digests
    ..         16*N bytes: the op records in version 3 form
    ..         4*(R+1) bytes: uint32 a run, its first block, ascending from 0; then B
"""

import errno
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.format import OP_SIZE_V3, SOURCE_LIMIT, Compression
from snapd.cow.op import Op

_MAGIC = b"SNAPDMAP"
_HEAD = struct.Struct("<8sIIQQQIIIIQQ")
_HEAD_DIGEST = struct.Struct("<Q")
_HEAD_SIZE = _HEAD.size + _HEAD_DIGEST.size
_VALUE_MASK = SOURCE_LIMIT - 1

UNCHANGED = 0
"""The kind of a run that has no op: the base has it (COW-6)."""


class Run(NamedTuple):
    """`length` target blocks from `start`, in units of `unit_blocks`; `kind` is UNCHANGED or an `OpType`.

    `value` is a copy's source block for `start`, or the index of the first op, the others following one a unit.
    """

    start: int
    length: int
    kind: int
    unit_blocks: int
    value: int

    @property
    def end(self) -> int:
        """The first block behind the run."""
        return self.start + self.length


class ExtentMap:
    """A parsed COW over a target of `block_count` blocks.

    `starts` has one entry a run and the end, `whats` one a run; `records` and `payloads` one an op, as have
    `payload_lengths` and `new_blocks`, parts of the records; `digests` one a block, or is None.
    """

    def __init__(
        self,
        *,
        block_size: int,
        version: int,
        compression: Compression,
        max_unit: int,
        ops_digest: int,
        starts: memoryview,
        whats: memoryview,
        records: bytes | memoryview,
        payloads: memoryview,
        digests: memoryview | None,
    ) -> None:
        self.block_size = block_size
        self.version = version
        self.compression = compression
        self.max_unit = max_unit
        self.ops_digest = ops_digest
        self.starts = starts
        self.whats = whats
        self.records = records
        self.payloads = payloads
        self.digests = digests
        # Columns of the records: a fraction of what unpacking one costs.
        words = memoryview(records).cast("I")
        self.payload_lengths, self.new_blocks = words[0::4], words[1::4]
        self._infos = words.cast("B").cast("Q")[1::2]
        self._last = 0

    @property
    def block_count(self) -> int:
        """Target blocks."""
        return int(self.starts[-1])

    @property
    def run_count(self) -> int:
        """Runs, unchanged ones too."""
        return len(self.whats)

    @property
    def op_count(self) -> int:
        """Ops."""
        return len(self.payloads)

    def op(self, index: int) -> Op:
        """The op with this index."""
        return Op.unpack(self.records, index * OP_SIZE_V3)

    def sources(self, first: int, end: int) -> list[int]:
        """The source of each of the ops [first, end)."""
        return [info & _VALUE_MASK for info in self._infos[first:end].tolist()]

    def run_of(self, block: int) -> int:
        """The index of the run that has the block, for `run`."""
        starts, last = self.starts, self._last
        # Readers go on where they were: worth two comparisons before the search.
        if not starts[last] <= block < starts[last + 1]:
            self._last = last = bisect_right(starts, block, 0, len(self.whats)) - 1
        return last

    def run(self, index: int) -> Run:
        """The run with this index."""
        start, what = self.starts[index], self.whats[index]
        return Run(start, self.starts[index + 1] - start, what >> 60, 1 << (what >> 56 & 15), what & _VALUE_MASK)

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """The runs that blocks [start, end) touch, whole, ascending."""
        if start >= end:
            return
        index = self.run_of(start)
        while index < len(self.whats) and self.starts[index] < end:
            yield self.run(index)
            index += 1

    def changed_extents(self, start: int, end: int) -> Iterator[Extent]:
        """The longest stretches of [start, end) whose blocks all have an op, ascending."""
        first = stop = start
        for run in self.runs(start, end):
            if run.kind == UNCHANGED:
                continue
            if run.start > stop:
                if first < stop:
                    yield Extent(first, stop - first)
                first = run.start
            stop = min(run.end, end)
        if first < stop:
            yield Extent(first, stop - first)

    def changed_blocks(self) -> int:
        """Target blocks that have an op."""
        return sum(extent.length for extent in self.changed_extents(0, self.block_count))

    def save(self, fd: int) -> None:
        """Write the file form to an empty file; not flushed, since it can always be made again."""
        sections = [
            part.cast("B") if isinstance(part, memoryview) else part
            for part in (self.whats, self.payloads, self.digests or b"", self.records, self.starts)
        ]
        hasher = xxhash.xxh3_64()
        for section in sections:
            hasher.update(section)
        head = _HEAD.pack(
            *(_MAGIC, 2, self.block_size, self.block_count, self.op_count, self.run_count, self.compression),
            *(self.version, self.max_unit, self.digests is not None, self.ops_digest, hasher.intdigest()),
        )
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(head + _HEAD_DIGEST.pack(xxhash.xxh3_64_intdigest(head)))
            for section in sections:
                file.write(section)

    @classmethod
    def load(cls, fd: int) -> "ExtentMap":
        """Map the file form; EBADMSG when it is not whole."""
        size = os.fstat(fd).st_size
        if size < _HEAD_SIZE:
            raise SnapdError(errno.EBADMSG, f"extent map: only {size} bytes long")
        view = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
        magic, layout, block_size, blocks, ops, runs, *rest = _HEAD.unpack_from(view)
        compression, version, max_unit, with_digests, ops_digest, body = rest
        (head_digest,) = _HEAD_DIGEST.unpack_from(view, _HEAD.size)
        lengths = (8 * runs, 8 * ops, 8 * blocks * with_digests, OP_SIZE_V3 * ops, 4 * (runs + 1))
        if (
            (magic, layout) != (_MAGIC, 2)
            or head_digest != xxhash.xxh3_64_intdigest(view[: _HEAD.size])
            or size != _HEAD_SIZE + sum(lengths)
            or body != xxhash.xxh3_64_intdigest(view[_HEAD_SIZE:])
        ):
            raise SnapdError(errno.EBADMSG, "extent map: damaged or not an extent map")
        sections = []
        at = _HEAD_SIZE
        for length in lengths:
            sections.append(view[at : at + length])
            at += length
        whats, payloads, digests, records, starts = sections
        return cls(
            block_size=block_size,
            version=version,
            compression=Compression(compression),
            max_unit=max_unit,
            ops_digest=ops_digest,
            starts=starts.cast("I"),
            whats=whats.cast("Q"),
            records=records,
            payloads=payloads.cast("Q"),
            digests=digests.cast("Q") if with_digests else None,
        )

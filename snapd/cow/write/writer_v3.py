"""Writing version 3: ops, payloads, sequence and resume points in regions of their own (section 5).

Order of writes (COW-95, COW-96); nothing counts before the header says so:

| step | action | a crash after it leaves |
| --- | --- | --- |
| create 1 | the digests' state of no ops; an old file cut to nothing; flush | the old file, or none |
| create 2 | header without ops, zeroed scratch; flush | a valid, empty file |
| append 1 | (the caller) the digests cut back to the label | the old file, whose later ops have no digests |
| append 2 | what a killed writer wrote; flush | the same |
| append 3 | header with the label's ops and points; flush | the file as it is at the label |
| add | payloads and records behind those that count | the file as it was |
| commit 1 | the digests' state, durable | the same, and a state that nobody looks for |
| commit 2 | the rest of payloads and records, resume points that fit; flush | the same |
| commit 3 | header with the new op count; flush | the new ops, and digests of them |
| commit 4 | resume points that did not fit, as `snapd.cow.write.resumepoints` says | the label too |

A commit is a label or the end. Nothing that the header on disk counts is ever overwritten: an append writes only after
the header stopped counting what lies behind the label.
"""

import errno
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

from snapd.block.store import Buffer, Store, read_bytes
from snapd.cow.errors import CowError
from snapd.cow.format import (
    MAX_OP_COUNT,
    OP_SIZE_V3,
    OP_V3,
    RESUME_POINT,
    RESUME_POINT_MAX,
    RESUME_POINT_SIZE,
    SCRATCH_SIZE,
    OpType,
)
from snapd.cow.header import Header
from snapd.cow.op import Op
from snapd.cow.write.basewriter import CowWriter
from snapd.cow.write.resumepoints import REGION_SIZE, Point, ResumePoints
from snapd.cow.write.writeroptions import WriterOptions

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile
    from snapd.cow.write.targetdigests import TargetDigests

_SPILL_BYTES = 1 << 20
_RECORDS_PER_BLOCK = 16
"""How many ops are kept for a block of payload, before either is written (COW-126)."""
_RUN_OPS = 4096


class WriterV3(CowWriter):
    """The writer of version 3; `header` is that of the file without the ops added since."""

    def __init__(
        self, store: Store | None, options: WriterOptions, digests: "TargetDigests | None", header: Header
    ) -> None:
        super().__init__(store, options, digests)
        self._header = header
        self._points = ResumePoints(header.resume_start)
        self._records = bytearray()
        self._payloads = bytearray()
        self._stored_ops = header.op_count
        self._stored_bytes = 0
        self._data_start = header.data_start
        batch = max(options.cluster_ops, 1)
        self._spill_payloads = min(batch * options.block_size, _SPILL_BYTES)
        self._spill_records = min(batch * _RECORDS_PER_BLOCK * OP_SIZE_V3, _SPILL_BYTES)

    @classmethod
    def create(cls, store: Store | None, options: WriterOptions, digests: "TargetDigests | None") -> "WriterV3":
        """Begin a new file. EINVAL without a number of op slots, unless there is no file (COW-133)."""
        slots = options.op_count_max
        if store is not None:
            slots = slots or options.max_blocks or 0
            if not 1 <= slots <= MAX_OP_COUNT:
                message = f"{slots} op slots: version 3 needs op_count_max or max_blocks"
                raise CowError(message, statement="COW-49", number=errno.EINVAL)
        header = Header(
            block_size=options.block_size,
            buffer_size=SCRATCH_SIZE if options.scratch else 0,
            op_count_max=slots,
            compression=options.compression.algorithm,
            max_compression_size=options.unit,
        )
        writer = cls(store, options, digests, header)
        writer._begin_file(header)
        return writer

    @classmethod
    def append(
        cls, store: Store, cow: "CowFile", options: WriterOptions, digests: "TargetDigests | None"
    ) -> "WriterV3":
        """Go on behind the ops that `cow` keeps; what lay behind them is durably given up (COW-88, COW-95)."""
        if cow.header.resume_point_max != RESUME_POINT_MAX:
            message = (
                f"{cow.header.resume_point_max} resume points, only files with {RESUME_POINT_MAX} can be appended to"
            )
            raise CowError(message, statement="COW-41", offset=50, number=errno.EOPNOTSUPP)
        writer = cls(store, options, digests, cow.header.with_ops(cow.op_count))
        writer._resume(cow)
        writer._stored_bytes = cow.data_end - writer._data_start
        writer._points = _points_of(store, cow)
        writer._write_header()
        return writer

    @property
    def size(self) -> int:
        """The end of the payloads that left memory: those of all ops behind a label or `finalize` (COW-132)."""
        with self._change:
            self._settle()
        return self._data_start + self._stored_bytes

    @property
    def op_count_max(self) -> int:
        return self._header.op_count_max

    def _check_slots(self, ops: int) -> None:
        limit = MAX_OP_COUNT if self._store is None else self._header.op_count_max
        if self._op_count + ops > limit:
            message = f"{ops} ops more than the {self._op_count} in {limit} op slots"
            raise CowError(message, statement="COW-127", number=errno.ENOSPC)

    def _check_sequence(self) -> None:
        """Any version 3 file has a place for it."""

    def _emit(self, kind: OpType, new_block: int, blocks: int, source: int, payload: Buffer) -> None:
        if kind is OpType.REPLACE:
            source = self._data_start + self._stored_bytes + len(self._payloads)
        self._payloads += payload
        self._add_records(Op(kind, new_block, blocks, source, len(payload)).pack())

    def _emit_run(self, kind: OpType, new_block: int, source: int, count: int) -> None:
        # Packed by the thousand: a file may have as many of these as blocks.
        for done in range(0, count, _RUN_OPS):
            ops = min(_RUN_OPS, count - done)
            first = kind << 60 | source + done
            infos = range(first, first + ops) if kind is OpType.COPY else repeat(first, ops)
            blocks = range(new_block + done, new_block + done + ops)
            self._add_records(b"".join(map(OP_V3.pack, repeat(0), blocks, infos)))

    def _emit_sequence(self, entries: bytes) -> None:
        self._write(entries, self._header.sequence_start)
        self._header = replace(self._header, sequence_data_count=len(entries) // 4)
        self._data_start = self._header.data_start
        self._points = ResumePoints(self._header.resume_start)

    def _mark(self, number: int) -> None:
        self._spill()
        self._points.add(number, self._stored_ops)
        self._commit_digests(number)
        self._commit()

    def _finish(self) -> None:
        self._spill()
        self._finish_digests()
        self._commit()

    def _commit(self) -> None:
        """Make what was written count."""
        fits = self._points.fits
        if fits:
            for region in self._points.writes():
                self._write(region, self._points.start)
            self._points.wrote()
            self._points.believed = len(self._points)
        self._flush()
        self._header = self._header.with_ops(self._stored_ops)
        self._write_header()
        if not fits:
            for region in self._points.writes():
                self._write(region, self._points.start)
                self._flush()
            self._points.wrote()
            if self._points.believed != len(self._points):
                self._points.believed = len(self._points)
                self._write_header()

    def _write_header(self) -> None:
        header = replace(self._header, resume_point_count=self._points.believed)
        self._write(header.pack(), 0)
        self._flush()

    def _add_records(self, records: bytes) -> None:
        self._hasher.update(records)
        self._records += records
        if len(self._payloads) >= self._spill_payloads or len(self._records) >= self._spill_records:
            self._spill()

    def _spill(self) -> None:
        """Write what is kept; it does not count yet."""
        if not self._records:
            return
        self._write(self._records, self._header.ops_start + OP_SIZE_V3 * self._stored_ops)
        if self._payloads:
            self._write(self._payloads, self._data_start + self._stored_bytes)
        self._stored_ops += len(self._records) // OP_SIZE_V3
        self._stored_bytes += len(self._payloads)
        self._records = bytearray()
        self._payloads = bytearray()
        # Only an estimate gets more ops than slots (COW-133).
        if self._stored_ops > self._header.op_count_max:
            self._header = replace(self._header, op_count_max=self._stored_ops)
            self._data_start = self._header.data_start


def _points_of(store: Store, cow: "CowFile") -> ResumePoints:
    """The points that `cow` keeps, of which some slot is the last one to be believed from now on (COW-85)."""
    header = cow.header
    region = read_bytes(store, header.resume_start, min(REGION_SIZE, max(0, cow.size - header.resume_start)))
    kept = tuple(Point(*label) for label in cow.labels)
    # A file without ops may end inside the region, and inside a slot of it.
    slots = region[: RESUME_POINT_SIZE * min(header.resume_point_count, len(region) // RESUME_POINT_SIZE)]
    believed = 1 + max((i for i, point in enumerate(RESUME_POINT.iter_unpack(slots)) if point in kept), default=-1)
    return ResumePoints(header.resume_start, region, kept, believed=believed)

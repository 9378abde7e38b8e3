"""Writing version 2: a stream of records and payloads, with or without clusters, that a footer closes (section 4).

Order of writes; a stream counts as far as a label that the reader names, or as a whole when it has its footer:

| step | action | a crash after it leaves |
| --- | --- | --- |
| create 1 | the digests' state of no ops; an old file cut to nothing, a device zeroed; flush | the old file, or none |
| create 2 | header, zeroed scratch; flush | a file without labels |
| append 1 | (the caller) the digests cut back to the label | the old file, whose later ops have no digests |
| append 2 | what a killed writer wrote; flush | the same |
| append 3 | the footer zeroed; flush | the labels |
| add 1 | the footer of an earlier `finalize` zeroed; flush | the labels |
| add 2 | payloads and records behind the last label | the labels up to the one behind which is added |
| label 1 | the rest of payloads and records; flush | the same |
| label 2 | the digests' state, durable | the same, and a state that nobody looks for |
| label 3 | the label's record; flush | the new label too, all that it promises, and digests of it |
| finalize 1 | the rest, zeros in unused slots, an early cluster op; flush | the labels |
| finalize 2 | the digests' state, durable | the same, and a state that nobody looks for |
| finalize 3 | footer, the file cut behind it; flush | the finished file, and digests of it |

A footer names the number of records before it, so a part of one, or one behind too many records, closes nothing. But
others of the same number could come to stand before it. So no footer outlives the records that it closed: it is gone
before any of them is overwritten, or one is added.
"""

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from snapd.block.store import Buffer, Store, read_bytes
from snapd.cow.cursor import Cursor
from snapd.cow.errors import CowError
from snapd.cow.format import FOOTER_DATA_SIZE, FOOTER_SIZE, OP_SIZE_V2, OP_V2, SCRATCH_SIZE, OpType
from snapd.cow.header import Header
from snapd.cow.op import Op
from snapd.cow.write.basewriter import CowWriter
from snapd.cow.write.writeroptions import WriterOptions

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile
    from snapd.cow.write.targetdigests import TargetDigests

_SPILL_BYTES = 1 << 20
_RECORD_TYPES = frozenset(OpType) - {OpType.FOOTER}


class WriterV2(CowWriter):
    """The writer of version 2, at `cursor` of the stream."""

    def __init__(
        self, store: Store | None, options: WriterOptions, digests: "TargetDigests | None", cursor: Cursor
    ) -> None:
        super().__init__(store, options, digests)
        self._cursor = cursor
        # What is next to each other in the file and not written yet: records, and payloads where they lie apart.
        self._records = bytearray()
        self._records_start = cursor.op_pos
        self._payloads = bytearray()
        self._payloads_start = cursor.data_pos
        self._footer: int | None = None

    @classmethod
    def create(cls, store: Store | None, options: WriterOptions, digests: "TargetDigests | None") -> "WriterV2":
        """Begin a new file."""
        header = Header(
            version=2,
            block_size=options.block_size,
            cluster_ops=options.cluster_ops,
            buffer_size=SCRATCH_SIZE if options.scratch else 0,
        )
        writer = cls(store, options, digests, Cursor.at(header.sequence_start, options.cluster_ops))
        writer._begin_file(header)
        return writer

    @classmethod
    def append(
        cls, store: Store, cow: "CowFile", options: WriterOptions, digests: "TargetDigests | None"
    ) -> "WriterV2":
        """Go on behind the records that `cow` keeps; the file is durably unfinished from now on (COW-87)."""
        assert cow.cursor is not None
        writer = cls(store, options, digests, replace(cow.cursor))
        writer._resume(cow)
        writer._footer = _find_footer(store, cow.cursor)
        writer._remove_footer()
        if writer._cursor.is_full:
            writer._end_cluster()
        return writer

    @property
    def size(self) -> int:
        """Bytes of the file if it were finished now, which is what it has after `finalize` (COW-131)."""
        with self._change:
            self._settle()
        cursor = self._cursor
        return (cursor.data_pos if cursor.has_data else cursor.op_pos) + FOOTER_SIZE

    @property
    def op_count_max(self) -> int:
        return 0

    def _check_slots(self, ops: int) -> None:
        """A stream has no slots."""

    def _check_sequence(self) -> None:
        if not self._options.cluster_ops:
            raise CowError("a stream without clusters has no sequence", statement="COW-26", number=errno.EINVAL)

    def _emit(self, kind: OpType, new_block: int, blocks: int, source: int, payload: Buffer) -> None:
        if kind is OpType.REPLACE:
            source = self._cursor.data_pos
        op = Op(kind, new_block, blocks, source, len(payload))
        self._hasher.update(op.pack())
        self._add_record(kind, op.pack_v2(self._options.compression.algorithm), source, payload)

    def _emit_run(self, kind: OpType, new_block: int, source: int, count: int) -> None:
        step = 1 if kind is OpType.COPY else 0
        for i in range(count):
            self._emit(kind, new_block + i, 1, source + i * step, b"")

    def _emit_sequence(self, entries: bytes) -> None:
        # Half of what 16 bits could hold (COW-58).
        most = 2 * self._block_size
        for start in range(0, len(entries), most):
            self._add_metadata(OpType.SEQUENCE, self._cursor.data_pos, entries[start : start + most])

    def _mark(self, number: int) -> None:
        self._spill()
        self._flush()
        self._commit_digests(number)
        self._add_metadata(OpType.LABEL, number)
        self._spill()
        self._flush()

    def _finish(self) -> None:
        # Finished already: writing it anew would only put the footer at risk.
        if self._footer is not None:
            return
        self._spill()
        going_on = replace(self._cursor)
        self._clear_op_area()
        if self._cursor.has_data:
            self._end_cluster()
            self._spill()
        self._flush()
        self._finish_digests()
        records, self._footer = self._cursor.records, self._cursor.op_pos
        footer = OP_V2.pack(OpType.FOOTER, 0, FOOTER_DATA_SIZE, records * OP_SIZE_V2, records)
        self._write(footer + bytes(FOOTER_DATA_SIZE), self._footer)
        if self._store is not None:
            self._store.truncate(self._footer + FOOTER_SIZE)
        self._flush()
        # Writing may go on where the early cluster op and the footer are now.
        self._cursor = going_on

    def _add_metadata(self, kind: OpType, source: int, payload: bytes = b"") -> None:
        self._add_record(kind, OP_V2.pack(kind, 0, len(payload), 0, source), source, payload)

    def _add_record(self, kind: OpType, record: bytes, source: int, payload: Buffer) -> None:
        self._remove_footer()
        self._put_record(kind, record, source, payload)
        if self._cursor.is_full:
            self._end_cluster()
        if len(self._records) + len(self._payloads) >= _SPILL_BYTES:
            self._spill()

    def _end_cluster(self) -> None:
        """A cluster op in the next slot, whether it is the last one or not (COW-29, COW-30)."""
        distance = self._cursor.data_pos - self._cursor.op_pos - OP_SIZE_V2
        self._put_record(OpType.CLUSTER, OP_V2.pack(OpType.CLUSTER, 0, 0, 0, distance), distance, b"")

    def _put_record(self, kind: OpType, record: bytes, source: int, payload: Buffer) -> None:
        cursor = self._cursor
        if cursor.op_pos != self._records_start + len(self._records):
            self._spill()
        if not self._records:
            self._records_start = cursor.op_pos
        self._records += record
        if not cursor.cluster_ops:
            self._records += payload
        else:
            if not self._payloads:
                self._payloads_start = cursor.data_pos
            self._payloads += payload
        cursor.pass_record(kind, len(payload), source)

    def _spill(self) -> None:
        """Write what is kept; without a label or a footer behind it, it does not count yet."""
        if self._payloads:
            self._write(self._payloads, self._payloads_start)
            self._payloads = bytearray()
        if self._records:
            self._write(self._records, self._records_start)
            self._records = bytearray()

    def _clear_op_area(self) -> None:
        """Zero the unused slots of the cluster, where ops may lie that an append has dropped (COW-91)."""
        if self._store is None or not self._cursor.cluster_ops:
            return
        end = min(self._cursor.cluster_start + OP_SIZE_V2 * self._cursor.cluster_ops, self._store.size())
        for start in range(self._cursor.op_pos, end, _SPILL_BYTES):
            self._write(bytes(min(_SPILL_BYTES, end - start)), start)

    def _remove_footer(self) -> None:
        if self._footer is not None:
            self._write(bytes(FOOTER_SIZE), self._footer)
            self._flush()
            self._footer = None


def _find_footer(store: Store, cursor: Cursor) -> int | None:
    """Where a reader that goes on from `cursor` meets a footer, right or wrong; None where it meets none."""
    at, size = replace(cursor), store.size()
    while at.op_pos + OP_SIZE_V2 <= size:
        kind, _, length, _, source = OP_V2.unpack(read_bytes(store, at.op_pos, OP_SIZE_V2))
        if kind == OpType.FOOTER:
            return at.op_pos
        if kind not in _RECORD_TYPES:
            return None
        at.pass_record(kind, length, source)
    return None

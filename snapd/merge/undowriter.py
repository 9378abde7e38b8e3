"""Writing the undo store U: create, append, and the header that makes appended ops count.

Order of writes (steps of UNDO-12; the caller decides when each is done):

| step | action | a crash after it leaves |
| --- | --- | --- |
| create | header with no ops and the table's identity, both flushed | an empty store |
| a `append` | payloads, then records and table entries, behind what counts | stale bytes that mean nothing |
| b `flush` | U and its table flushed | the same |
| c `commit` | header with the new op count, flushed | a complete store that holds the new ops too |

Between b and c no flush is saved: a header that counts ops whose bytes are not durable would be a lie (UNDO-13).
"""

import errno

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, Store
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.format import OP_SIZE_V3, Compression, OpType
from snapd.cow.header import Header
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.op import Op
from snapd.cow.write.writeroptions import unit_lengths
from snapd.merge.undostore import UndoStore
from snapd.merge.undotable import ENTRY_SIZE, TABLE_START, UndoIdentity, pack_entry

_OPTION = CompressOption(Compression.LZ4, 0)
_MAX_UNIT = 64 << 10
_MAX_UNIT_BLOCKS = 64
_WRITE_BYTES = 1 << 20


class UndoWriter:
    """The one writer of an undo store; `index` is the store as it counts now."""

    def __init__(self, store: Store, table: Store, targets: ExtentMap) -> None:
        """Take over an existing store: rewrite its header and make all of it durable (UNDO-24, UNDO-30).

        That it belongs to this COW is for the caller to check before. EBADMSG when its header or table is damaged.
        """
        self.index = UndoStore(store, table, targets)
        self._store = store
        self._table = table
        self._header = self.index.header
        self.index.load(self._header.op_count)
        self._unit_blocks = min(self._header.max_compression_size // self._header.block_size, _MAX_UNIT_BLOCKS)
        self._zeros = bytes(self._header.block_size)
        self._encoder = Encoder(_OPTION, version=3, max_unit=self._header.max_unit)
        self._data_end = self.index.data_end
        self._payloads = bytearray()
        self._records = bytearray()
        self._entries = bytearray()
        # A flush that failed may have dropped this page, and a killed writer may never have flushed it.
        store.write(self._header.pack(), 0)
        store.flush()
        table.flush()

    @classmethod
    def create(cls, store: Store, table: Store, identity: UndoIdentity, targets: ExtentMap) -> "UndoWriter":
        """Make the empty files a durable, empty store with a slot for every target block below O's end (UNDO-18)."""
        old_blocks = identity.old_size_bytes // targets.block_size
        slots = sum(extent.length for extent in targets.changed_extents(0, min(old_blocks, targets.block_count)))
        header = Header(
            block_size=targets.block_size,
            buffer_size=0,
            op_count_max=slots,
            compression=Compression.LZ4,
            max_compression_size=_MAX_UNIT,
        )
        store.write(header.pack(), 0)
        table.write(identity.pack(), 0)
        return cls(store, table, targets)

    @property
    def op_count(self) -> int:
        """Ops that count."""
        return self.index.op_count

    def append(self, start: int, content: Buffer) -> None:
        """Step a: the old content of whole blocks from `start`, behind all that was appended before.

        Errors: EBADMSG in a store with damaged ops, whose end is not known; ENOSPC; what the store raises.
        """
        if self.index.damaged_ops:
            raise SnapdError(errno.EBADMSG, f"undo store: {self.index.damaged_ops} ops are damaged, it cannot grow")
        block_size = self._header.block_size
        view = memoryview(content)
        block = first = 0
        blocks = len(view) // block_size
        while block <= blocks:
            unit = view[block * block_size : (block + 1) * block_size]
            if block == blocks or bytes(unit) == self._zeros:
                self._append_units(start + first, view[first * block_size : block * block_size])
                if block < blocks:
                    self._append_op(Op(OpType.ZERO, start + block, 1, 0, 0), unit)
                first = block + 1
            block += 1
        if len(self._payloads) >= _WRITE_BYTES:
            self._write_payloads()

    def flush(self) -> None:
        """Step b: everything appended is durable, and does not count."""
        self._write_payloads()
        count = self.op_count
        if self._records:
            self._store.write(self._records, self._header.ops_start + count * OP_SIZE_V3)
            self._table.write(self._entries, TABLE_START + count * ENTRY_SIZE)
        self._store.flush()
        self._table.flush()

    def commit(self) -> None:
        """Step c: what `flush` made durable counts, durably; `index` has it."""
        header = self._header.with_ops(self.op_count + len(self._records) // OP_SIZE_V3)
        self._store.write(header.pack(), 0)
        self._store.flush()
        self._header = header
        self._records.clear()
        self._entries.clear()
        # Read anew, not remembered: what is overwritten next can come back only if this can be read.
        self.index.load(header.op_count)
        if self.index.damaged_ops:
            raise SnapdError(errno.EIO, "undo store: ops just written do not read back")

    @property
    def has_pending(self) -> bool:
        """Whether something was appended since the last commit."""
        return bool(self._records)

    def _append_units(self, start: int, content: memoryview) -> None:
        block_size = self._header.block_size
        offset = 0
        for blocks in unit_lengths(len(content) // block_size, self._unit_blocks):
            unit = content[offset : offset + blocks * block_size]
            payload = self._encoder.encode(unit)
            at = self._data_end
            self._append_op(Op(OpType.REPLACE, start + offset // block_size, blocks, at, len(payload)), unit)
            self._payloads += payload
            self._data_end += len(payload)
            offset += blocks * block_size

    def _append_op(self, op: Op, unit: memoryview) -> None:
        if self.op_count + len(self._records) // OP_SIZE_V3 >= self._header.op_count_max:
            raise SnapdError(errno.ENOSPC, f"undo store: all {self._header.op_count_max} op slots are used (UNDO-18)")
        record = op.pack()
        self._records += record
        self._entries += pack_entry(unit, record)

    def _write_payloads(self) -> None:
        if self._payloads:
            self._store.write(self._payloads, self._data_end - len(self._payloads))
            self._payloads = bytearray()

"""Reading the undo store U: the old content of every block that a merge overwrites (UNDO-1).

U is a plain COW v3 file of replace and zero ops with a side table of digests beside it. Ops lie in ascending order of
their blocks and are appended only, so a reader keeps an index and adds what is new.

Invariant: a block of U reads as the old content or raises. An op whose record or table entry is not whole has lost
its place, which lies somewhere between its neighbours: every target block there fails, none is taken for "U lacks it".

Workers read U: nothing here imports numpy.
"""

import errno
import os
from array import array
from bisect import bisect_right

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.block.file import FileStore
from snapd.block.store import Buffer, Store, WritableBuffer, read_bytes
from snapd.cow.compress import Decoder
from snapd.cow.format import OP_SIZE_V3, Compression, OpType
from snapd.cow.header import MAX_HEADER_SIZE, Header
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.units import UnitReader
from snapd.cow.op import Op
from snapd.merge.undotable import ENTRY_SIZE, SUFFIX, TABLE_START, UndoIdentity, unit_digest_if_whole

_LOAD_OPS = 1 << 16
_SAVED = b"\1"
_LACKING = b"\0"


class UndoStore:
    """The index of an undo store, as far as `load` was told to go.

    `targets` is the map of C: with it, a damaged op fails only target blocks. Not for use by two threads at once.
    Errors: EBADMSG for a store or table that is missing a part, damaged or not one.
    """

    def __init__(self, store: Store, table: Store, targets: ExtentMap | None = None) -> None:
        self.identity = UndoIdentity.read(table)
        self.header = Header.unpack(read_bytes(store, 0, min(store.size(), MAX_HEADER_SIZE)))
        if (
            self.header.version != 3
            or self.header.compression != Compression.LZ4
            or self.header.buffer_size
            or self.header.num_merge_ops
        ):
            raise SnapdError(errno.EBADMSG, "undo store: another kind of COW file (UNDO-18)")
        self.damaged_ops = 0
        self.data_end = self.header.data_start
        self._store = store
        self._table = table
        self._targets = targets
        self._owned: tuple[int, ...] = ()
        blocks = self.identity.old_size_bytes // self.header.block_size
        # One byte a block of O beside the index: finding a run is then one search in C.
        self._saved = bytearray(blocks)
        # Of every whole op, ascending: its first block and its index.
        self._starts = array("I")
        self._indices = array("I")
        self._ops = bytearray()
        self._unit_digests = array("Q")
        # Where the last whole op ended, and whether damaged ones follow it.
        self._end = 0
        self._damaged_tail = False
        self._units = UnitReader(store, Decoder(Compression.LZ4, version=3), check=self._check_unit)

    @classmethod
    def open(cls, path: str, *, dir_fd: int | None = None, targets: ExtentMap | None = None) -> "UndoStore":
        """The store at `path` with its table beside it, read-only; nothing loaded yet. `close` gives them back."""
        fds: list[int] = []
        try:
            for name in (path, path + SUFFIX):
                fds.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd))  # noqa: PERF401 - closed on error
            undo = cls(FileStore(fds[0], path), FileStore(fds[1], path + SUFFIX), targets)
        except OSError as error:
            _close(fds)
            if error.errno == errno.ENOENT:
                raise SnapdError(errno.EBADMSG, f"{path}: the undo store or its digests are missing") from error
            raise SnapdError.from_os(error, f"open {path}") from error
        except SnapdError:
            _close(fds)
            raise
        undo._owned = tuple(fds)
        return undo

    def close(self) -> None:
        """Close what `open` opened."""
        _close(self._owned)
        self._owned = ()

    @property
    def op_count(self) -> int:
        """Ops loaded."""
        return len(self._ops) // OP_SIZE_V3

    @property
    def size(self) -> int:
        """Bytes of the old image, O."""
        return self.identity.old_size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of the store and its table, as far as loaded."""
        return self.data_end + TABLE_START + self.op_count * ENTRY_SIZE

    def stored_op_count(self) -> int:
        """How many ops the store's header says there are, now."""
        return Header.unpack(read_bytes(self._store, 0, MAX_HEADER_SIZE)).op_count

    def saved_blocks(self) -> int:
        """Blocks that the loaded ops hold."""
        return self._saved.count(_SAVED)

    def load(self, op_count: int) -> None:
        """Add the ops up to `op_count` to the index; fewer than before changes nothing.

        Errors: EBADMSG when there cannot be so many; what the stores raise when records cannot be read.
        """
        if op_count > self.header.op_count_max:
            raise SnapdError(errno.EBADMSG, f"undo store: {op_count} ops in {self.header.op_count_max} slots")
        while self.op_count < op_count:
            first = self.op_count
            count = min(op_count - first, _LOAD_OPS)
            records = read_bytes(self._store, self.header.ops_start + first * OP_SIZE_V3, count * OP_SIZE_V3)
            entries = read_bytes(self._table, TABLE_START + first * ENTRY_SIZE, count * ENTRY_SIZE)
            for i in range(count):
                record = records[i * OP_SIZE_V3 : (i + 1) * OP_SIZE_V3]
                self._add(first + i, record, unit_digest_if_whole(entries, i * ENTRY_SIZE, record))
        self._fail_gap(len(self._saved))

    def next_saved(self, block: int, end: int) -> int:
        """The first block of [block, end) that must not be read from the base; `end` when there is none."""
        found = self._saved.find(_SAVED, block, end)
        return end if found < 0 else found

    def next_lacking(self, block: int, end: int) -> int:
        """The first block of [block, end) that U lacks; `end` when there is none."""
        found = self._saved.find(_LACKING, block, end)
        return end if found < 0 else found

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Old content from byte `offset`, all of it in saved blocks; EBADMSG where it is damaged (UNDO-15)."""
        out = memoryview(buffer)
        block_size = self.header.block_size
        at = 0
        while at < len(out):
            index, op = self._op_of((offset + at) // block_size)
            within = offset + at - op.new_block * block_size
            length = min(op.blocks * block_size - within, len(out) - at)
            if op.type is OpType.ZERO:
                out[at : at + length] = bytes(length)
            else:
                unit = self._units.cached(index)
                if unit is None:
                    unit = self._units.read(index, op.source, op.data_length, op.blocks * block_size)
                out[at : at + length] = unit[within : within + length]
            at += length

    def _op_of(self, block: int) -> tuple[int, Op]:
        """The whole op that has the block, and its index; EBADMSG when a damaged one may have it."""
        place = bisect_right(self._starts, block) - 1
        if place >= 0:
            index = self._indices[place]
            op = Op.unpack(self._ops, index * OP_SIZE_V3)
            if block < op.new_block + op.blocks:
                return index, op
        raise SnapdError(errno.EBADMSG, f"undo store: a damaged op hides block {block}")

    def _add(self, index: int, record: bytes, digest: int | None) -> None:
        op = None if digest is None else self._op_in_order(record)
        self._ops += record
        self._unit_digests.append(digest or 0)
        if op is None:
            self.damaged_ops += 1
            self._damaged_tail = True
            return
        self._fail_gap(op.new_block)
        end = op.new_block + op.blocks
        self._starts.append(op.new_block)
        self._indices.append(index)
        self._saved[op.new_block : end] = _SAVED * op.blocks
        self._end = end
        if op.type is OpType.REPLACE:
            self.data_end = op.source + op.data_length

    def _op_in_order(self, record: bytes) -> Op | None:
        """The op, if it is one that U can hold behind the last one."""
        if record[-1] >> 4 not in (OpType.REPLACE, OpType.ZERO):
            return None
        op = Op.unpack(record, 0)
        return op if self._end <= op.new_block and op.new_block + op.blocks <= len(self._saved) else None

    def _fail_gap(self, next_start: int) -> None:
        """Close the books on damaged ops before `next_start`: their blocks lie in the gap, so the gap must fail."""
        if not self._damaged_tail:
            return
        blocks = len(self._saved) if self._targets is None else self._targets.block_count
        end = min(next_start, blocks)
        gap = Extent(self._end, end - self._end)
        for extent in [gap] if self._targets is None else self._targets.changed_extents(self._end, end):
            self._saved[extent.start : extent.end] = _SAVED * extent.length
        self._damaged_tail = False

    def _check_unit(self, index: int, unit: Buffer) -> None:
        if xxhash.xxh3_64_intdigest(unit) != self._unit_digests[index]:
            raise SnapdError(errno.EBADMSG, f"undo store: op {index}: the unit does not match its digest (UNDO-15)")


def _close(fds: list[int] | tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)

"""What the writers of both versions have in common: the calls, what they refuse, and the way from a call to an op.

A call is checked as a whole before it changes anything (COW-60, COW-127). Then it is taken: its blocks are mapped, its
units encoded on threads (COW-110) and emitted in order, as ops that have their place in the file. Held meanwhile is
little: a few tasks a thread, and what the writer of a version keeps before it writes.

Invariant: an error behind the checks ends the writer. Every later call raises the same one, so that half a call is
never labelled or finished; what is durable is the last label.
"""

import errno
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore
from snapd.block.store import Buffer, Store
from snapd.cow.compress import Decoder
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.header import Header
from snapd.cow.write.callchecks import CallChecks, refused
from snapd.cow.write.mappedblocks import MappedBlocks
from snapd.cow.write.payloadqueue import PayloadQueue, Unit
from snapd.cow.write.writeroptions import WriterOptions

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile
    from snapd.cow.write.targetdigests import TargetDigests

_LABEL_LIMIT = 1 << 64


class _Change:
    """Around whatever changes the writer: an error inside ends it."""

    def __init__(self) -> None:
        self._failure: SnapdError | None = None

    def __enter__(self) -> None:
        if self._failure is not None:
            raise self._failure

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, SnapdError):
            self._failure = error
        elif error is not None:
            self._failure = SnapdError(errno.EIO, f"the COW writer was interrupted: {error!r}")


class CowWriter(ABC):
    """Appends ops to a COW file in the order of the calls.

    Ops count from the next `label` or `finalize` on, after which writing may go on (COW-93). No target block has two
    ops (COW-61); that copies merge in their order is for the caller to see to (COW-75). Buffers that were given may be
    used again at once. Not for two threads at once.

    Errors: `CowError` with EINVAL, ERANGE or ENOSPC for a call that is refused and changes nothing. Any other ends the
    writer: the store's, ENOSPC at the end of a device (COW-128), those of the digests.
    """

    def __init__(self, store: Store | None, options: WriterOptions, digests: "TargetDigests | None") -> None:
        """Nothing is written yet, and without a `store` nothing ever is (COW-130)."""
        self._store = store
        self._options = options
        self._block_size = options.block_size
        self._digests = digests
        self._checks = CallChecks(options, digests)
        self._change = _Change()
        self._mapped = MappedBlocks()
        self._hasher = xxhash.xxh3_64()
        self._op_count = 0
        self._is_fresh = True
        self._device_end = store.size() if isinstance(store, BlockDeviceStore) else None
        self._decoder = Decoder(options.compression.algorithm, version=options.version)
        self._queue = PayloadQueue(options)

    # The calls

    def copy(self, new_block: int, source_block: int, count: int = 1) -> None:
        """`count` target blocks from `new_block` are the source blocks from `source_block`."""
        self._checks.source(source_block, source_block + count - 1)
        self._checks.source_bytes(source_block * self._block_size, count * self._block_size)
        self._claim(new_block, count, ops=count)
        with self._change:
            self._settle()
            if self._digests is not None:
                self._digests.copy(new_block, source_block, count)
            self._emit_run(OpType.COPY, new_block, source_block, count)

    def zero(self, new_block: int, count: int = 1) -> None:
        """`count` target blocks from `new_block` are all zeros."""
        self._claim(new_block, count, ops=count)
        with self._change:
            self._settle()
            if self._digests is not None:
                self._digests.zero(new_block, count)
            self._emit_run(OpType.ZERO, new_block, 0, count)

    def raw(self, new_block: int, data: Buffer) -> None:
        """The target blocks from `new_block` are `data`, in units as large as the options allow (COW-113)."""
        view = memoryview(data).cast("B")
        count = self._checks.block_count(view)
        units = self._options.cut(count)
        self._claim(new_block, count, ops=len(units))
        with self._change:
            if self._digests is not None:
                self._digests.replace(new_block, view)
            at = 0
            for blocks in units:
                unit = bytes(view[at : at + blocks * self._block_size])
                self._push(Unit(OpType.REPLACE, new_block + at // self._block_size, blocks, 0, unit))
                at += len(unit)

    def xor(self, new_block: int, data: Buffer, old_block: int, offset: int) -> None:
        """The target blocks from `new_block` are `data` XOR the source from byte `offset` of `old_block` (COW-55)."""
        view = memoryview(data).cast("B")
        blocks = self._checks.block_count(view)
        if not 0 <= offset < self._block_size:
            raise refused(f"offset {offset} is not within a block of {self._block_size} bytes", "COW-55")
        source = old_block * self._block_size + offset
        self._checks.source(source, source + len(view) - self._block_size)
        self._checks.source_bytes(source, len(view))
        self._claim(new_block, blocks, ops=blocks)
        with self._change:
            if self._digests is not None:
                self._digests.xor(new_block, view, source)
            for i in range(blocks):
                at = i * self._block_size
                unit = bytes(view[at : at + self._block_size])
                self._push(Unit(OpType.XOR, new_block + i, 1, source + at, unit))

    def put(self, kind: OpType, new_block: int, blocks: int, source: int, payload: Buffer) -> None:
        """One replace or XOR op whose payload the caller encoded, with an `Encoder` of the same options.

        `source` is the byte offset in the source image of an XOR op; for a replace op it does not matter.
        """
        self._checks.payload(kind, blocks, len(payload))
        if kind is OpType.XOR:
            self._checks.source(source, source)
            self._checks.source_bytes(source, self._block_size)
        self._claim(new_block, blocks, ops=1)
        with self._change:
            self._settle()
            if self._digests is not None:
                unit = self._decoder.decode(payload, blocks * self._block_size, op_index=self._op_count)
                if kind is OpType.XOR:
                    self._digests.xor(new_block, unit, source)
                else:
                    self._digests.replace(new_block, unit)
            self._emit(kind, new_block, blocks, source, payload)

    def sequence(self, blocks: Iterable[int]) -> None:
        """The target blocks whose ops an ordered merge takes first, in its order; before anything else (COW-50)."""
        listed = list(blocks)
        if not self._is_fresh:
            raise refused("a sequence comes before all ops and labels, and only once", "COW-50")
        self._check_sequence()
        named = MappedBlocks()
        for block in listed:
            self._checks.target(block, 1)
            if named.claim(block, 1) is not None:
                raise refused(f"the sequence names block {block} twice", "COW-67")
        with self._change:
            self._is_fresh = False
            self._emit_sequence(struct.pack(f"<{len(listed)}I", *listed))

    def label(self, number: int) -> None:
        """Make everything that was added durable, as what lies before the label `number` (COW-81)."""
        if not 0 <= number < _LABEL_LIMIT:
            raise refused(f"label {number} needs more than 64 bits", "COW-81", errno.ERANGE)
        with self._change:
            self._settle()
            self._is_fresh = False
            self._mark(number)

    def finalize(self) -> None:
        """Make everything that was added the durable content of a finished file (COW-91, COW-92)."""
        if self._digests is not None:
            self._digests.check_complete(self._mapped)
        with self._change:
            self._settle()
            self._finish()

    def close(self) -> None:
        """End the threads; what was added since the last label or `finalize` is lost."""
        self._queue.close()

    @property
    def op_count(self) -> int:
        """Data ops that were added."""
        return self._op_count

    @property
    def ops_digest(self) -> int:
        """xxh3-64 of these ops in version 3 form."""
        with self._change:
            self._settle()
        return self._hasher.intdigest()

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file, as an estimate gives them (COW-131, COW-132)."""

    @property
    @abstractmethod
    def op_count_max(self) -> int:
        """What the options of the real writer must give after an estimate; 0 in version 2, which has no slots."""

    # What the versions differ in. None of it is called after an error.

    @abstractmethod
    def _check_slots(self, ops: int) -> None:
        """Refuse what does not fit behind the ops there are (COW-127)."""

    @abstractmethod
    def _check_sequence(self) -> None:
        """Refuse a sequence where the version has no place for one."""

    @abstractmethod
    def _emit(self, kind: OpType, new_block: int, blocks: int, source: int, payload: Buffer) -> None:
        """Give an op its place in the file, and its record to the hasher."""

    @abstractmethod
    def _emit_run(self, kind: OpType, new_block: int, source: int, count: int) -> None:
        """The same for `count` copies or zeros of consecutive blocks."""

    @abstractmethod
    def _emit_sequence(self, entries: bytes) -> None:
        """Put the sequence into its place."""

    @abstractmethod
    def _mark(self, number: int) -> None:
        """Add a label behind the ops emitted, durably; the digests' state comes first."""

    @abstractmethod
    def _finish(self) -> None:
        """Finish the file behind the ops emitted, durably; the digests' state comes first."""

    # For the versions

    def _begin_file(self, header: Header) -> None:
        """Durably a file without ops in place of whatever the store held (COW-90, COW-124)."""
        self._commit_digests(0)
        if self._store is None:
            return
        if self._store.size():
            self._store.truncate(0)
            # Records of an earlier stream could be taken for some of the new one; version 3 counts its records.
            if header.version < 3 and self._device_end is not None:
                # The header first: an old file must not be there still while its content goes.
                self._store.write(bytes(header.size), 0)
                self._store.flush()
                self._store.zero(0, self._device_end)
            self._store.flush()
        self._write(header.pack() + bytes(header.buffer_size), 0)
        self._store.flush()

    def _resume(self, cow: "CowFile") -> None:
        """Go on behind the ops that a file keeps. They get durable: a writer that was killed may not have flushed."""
        self._flush()
        for start, blocks in zip(cow.ops.new_block.tolist(), cow.ops.blocks.tolist(), strict=True):
            self._mapped.claim(start, blocks)
        self._hasher.update(cow.ops.records)
        self._op_count = cow.op_count
        self._is_fresh = False

    def _write(self, data: Buffer, offset: int) -> None:
        if self._device_end is not None and offset + len(data) > self._device_end:
            raise CowError(
                f"{len(data)} bytes do not fit, the device ends at byte {self._device_end}",
                statement="COW-128",
                offset=offset,
                number=errno.ENOSPC,
            )
        if self._store is not None:
            self._store.write(data, offset)

    def _flush(self) -> None:
        if self._store is not None:
            self._store.flush()

    def _commit_digests(self, label: int) -> None:
        if self._digests is not None:
            self._digests.commit(op_count=self._op_count, ops_digest=self._hasher.intdigest(), label=label)

    def _finish_digests(self) -> None:
        if self._digests is not None:
            self._digests.finish(self._mapped, op_count=self._op_count, ops_digest=self._hasher.intdigest())

    def _claim(self, new_block: int, count: int, *, ops: int) -> None:
        """The last check of a call: the blocks are its own from now on, and so are op slots."""
        self._checks.target(new_block, count)
        self._check_slots(ops)
        if (block := self._mapped.claim(new_block, count)) is not None:
            raise refused(f"target block {block} already has an op", "COW-61")
        self._op_count += ops
        self._is_fresh = False

    def _push(self, unit: Unit) -> None:
        for done, payload in self._queue.push(unit):
            self._emit(done.type, done.new_block, done.blocks, done.source, payload)

    def _settle(self) -> None:
        """Emit whatever is still on its way."""
        if self._queue.is_empty:
            return
        for done, payload in self._queue.drain():
            self._emit(done.type, done.new_block, done.blocks, done.source, payload)

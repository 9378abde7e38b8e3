"""The requests of an NBD client in their transmission phase: taken from the bytes it sent, begun, and answered.

The one loop that sees every request. READs of whole sectors up to the size of a bio go straight into the arena, behind
their reply headers; everything else has an object of its own. A request that cannot be begun for want of credit or
room stays where it is, and everything behind it too.
"""

import errno

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, BioOp
from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.device.allocation import Allocation
from snapd.device.batch import Batch
from snapd.device.datapath import DataPath
from snapd.device.largeread import LargeRead
from snapd.device.nbd import (
    ALLOCATION_CONTEXT_ID,
    EXTENT,
    MAX_REQUEST_BYTES,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    STATUS_CHUNK,
    Chunk,
    Command,
    CommandFlag,
)
from snapd.device.replies import ReplyBatch, ReplyForm
from snapd.device.singles import Client, Single
from snapd.device.traffic import Traffic
from snapd.device.writing import Writing
from snapd.dmuser.arena import Arena

MIN_CHARGE_BYTES = 4096
"""What the smallest request costs, so that credit also bounds their number."""
BATCH_BYTES = (256 + 4) << 10
"""A batch is closed when it has so much: what is behind it is worked on while it leaves."""
_UNCUT_BYTES = 4096
"""Not worth cutting into what the store and what the worker serves: the worker can serve all of it."""
_EXTENTS = 1024
"""At most so many extents in one block status reply."""

_FUA, _NO_HOLE, _DF = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE), int(CommandFlag.DF)
_REQ_ONE = int(CommandFlag.REQ_ONE)
_READ_FLAGS = _FUA | _DF
_ALLOWED_FLAGS = {
    Command.READ: _READ_FLAGS,
    Command.WRITE: _FUA,
    Command.FLUSH: _FUA,
    Command.TRIM: _FUA,
    Command.WRITE_ZEROES: _FUA | _NO_HOLE,
    Command.BLOCK_STATUS: _FUA | _REQ_ONE,
}
_CHANGES = frozenset({int(Command.WRITE), int(Command.TRIM), int(Command.WRITE_ZEROES)})
_OPS = {
    Command.WRITE: BioOp.WRITE,
    Command.FLUSH: BioOp.FLUSH,
    Command.TRIM: BioOp.DISCARD,
    Command.WRITE_ZEROES: BioOp.WRITE_ZEROES,
}


class Requests:
    """Takes requests from `received` and answers through `client`."""

    def __init__(
        self,
        client: Client,
        path: DataPath,
        allocation: Allocation | None,
        form: ReplyForm,
        clock: Clock,
        traffic: Traffic,
    ) -> None:
        self.disconnected = False
        self._client = client
        self._path = path
        self._memory = path.memory
        self._allocation = allocation
        self._form = form
        self._clock = clock
        self._traffic = traffic
        self._writing: Writing | None = None
        self._large_reads: set[LargeRead] = set()
        self._skip_bytes = 0
        self._started_us = 0
        self._remote: ReplyBatch | None = None
        self._local: ReplyBatch | None = None

    def take(self, received: memoryview, start: int, end: int) -> tuple[int, bool]:
        """Begin the requests in `received[start:end]`; returns where it stopped, and whether credit or room stopped it.

        Errors: EPROTO for bytes that are no request, after which the connection must be closed.
        """
        self._started_us = self._clock.now_us()
        try:
            return self._take(received, start, end)
        finally:
            self._seal_all()

    @property
    def is_inside_write(self) -> bool:
        """Whether the client owes us payload."""
        return self._writing is not None

    def payload_place(self) -> memoryview | None:
        """Where the next bytes of the client belong, if they are payload and more than what a receive takes in."""
        return None if self._writing is None else self._writing.place()

    def payload_received(self, length: int) -> None:
        """So many bytes have come to `payload_place`; `take` goes on from there."""
        assert self._writing is not None
        self._writing.received(length)

    def close(self) -> None:
        """The client is gone: what is in flight ends unheard."""
        for read in self._large_reads:
            read.cancel()
        self.drop_write()

    def drop_write(self) -> None:
        """Forget the write whose payload is still coming; it goes unanswered, since the rest will not be taken."""
        if self._writing is not None:
            self._client.release(self._writing.request.charge_bytes)
            self._writing = None

    def _take(self, received: memoryview, start: int, end: int) -> tuple[int, bool]:
        header_bytes = REQUEST.size
        while not self.disconnected:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, end - start)
                start += skipped
                self._skip_bytes -= skipped
            if self._writing is not None:
                start, refused = self._writing.take(received, start, end)
                if not self._writing.is_complete:
                    return start, refused
                self._writing = None
            start, refused = self._take_reads(received, start, end)
            if refused or end - start < header_bytes:
                return start, refused
            magic, flags, command, cookie, offset, length = REQUEST.unpack_from(received, start)
            if magic != REQUEST_MAGIC:
                raise SnapdError(errno.EPROTO, f"request magic {magic:#x}")
            if not self._other(flags, command, cookie, offset, length):
                return start, True
            start += header_bytes
        return start, False

    def _take_reads(self, received: memoryview, start: int, end: int) -> tuple[int, bool]:
        """Begin READs of whole sectors that fit into a bio, up to the first request that is anything else."""
        unpack, header_bytes, pack_header = REQUEST.unpack_from, REQUEST.size, REPLY.pack_into
        path, client, form, memory = self._path, self._client, self._form, self._memory
        size_bytes, is_local, read_header_bytes = path.size_bytes, path.is_local, form.read_header_bytes
        read_from_store, read_from_target, structured = path.read_from_store, path.read_from_target, form.structured
        remote, local = self._remote, self._local
        free_bytes, spent_bytes = client.free_credit_bytes, 0
        refused = False
        while end - start >= header_bytes:
            magic, flags, command, cookie, offset, length = unpack(received, start)
            if (
                magic != REQUEST_MAGIC
                or command
                or flags & ~_READ_FLAGS
                or not 0 < length <= MAX_BIO_BYTES
                or (offset | length) & (SECTOR_BYTES - 1)
                or offset + length > size_bytes
            ):
                break
            on_base = is_local(offset, length)
            batch = local if on_base else remote
            reply_bytes = read_header_bytes + length
            if batch is None or batch.cursor + reply_bytes > batch.limit:
                self._seal(batch)
                ring = path.local if on_base else path.arena
                batch = self._new_batch(ring, reply_bytes)
                if on_base:
                    self._local = local = batch
                else:
                    self._remote = remote = batch
                if batch is None:
                    client.wait_for_room(ring)
                    refused = True
                    break
            charge_bytes = length if length > MIN_CHARGE_BYTES else MIN_CHARGE_BYTES
            if charge_bytes <= free_bytes:
                free_bytes -= charge_bytes
                spent_bytes += charge_bytes
            else:
                client.take_credit(spent_bytes)
                spent_bytes = 0
                if not client.admit(charge_bytes):
                    refused = True
                    break
                free_bytes = client.free_credit_bytes
            start += header_bytes
            at = batch.cursor
            batch.cursor = at + reply_bytes
            batch.charge_bytes += charge_bytes
            replies = batch.replies
            tag = len(replies)
            replies.append(at)
            if structured:
                form.write_read_header(memory, at, cookie, offset, length)
            else:
                pack_header(memory, at, REPLY_MAGIC, 0, cookie)
            at += read_header_bytes
            if on_base:
                read_from_store(batch, tag, at, offset, length)
            elif length <= _UNCUT_BYTES:
                read_from_target(batch, tag, at, offset, length)
            else:
                path.read(batch, tag, at, offset, length)
        client.take_credit(spent_bytes)
        return start, refused

    def _new_batch(self, ring: Arena, reply_bytes: int) -> ReplyBatch | None:
        """An open batch at the end of `ring` with room for a reply."""
        region = self._path.allocate(ring, max(reply_bytes, min(BATCH_BYTES, ring.room())))
        return None if region is None else ReplyBatch(region, self._batch_ready, self._started_us)

    def _seal_all(self) -> None:
        """Close the open batches: others may begin at the end of their rings."""
        self._seal(self._remote)
        self._seal(self._local)
        self._remote = self._local = None

    def _seal(self, batch: ReplyBatch | None) -> None:
        """Close a batch, and give back what it did not use."""
        if batch is None:
            return
        assert batch.region is not None
        if batch.replies:
            batch.region.shrink(batch.cursor)
            batch.seal()
        else:
            batch.region.free()

    def _batch_ready(self, batch: Batch) -> None:
        assert isinstance(batch, ReplyBatch)
        assert batch.region is not None
        us = self._clock.now_us() - batch.started_us
        payload_bytes = batch.cursor - batch.region.start - len(batch.replies) * self._form.read_header_bytes
        self._traffic.count_reads(len(batch.replies), payload_bytes, us, len(batch.errors))
        if batch.errors:
            pieces = list(batch.pieces(self._memory, self._form))
        else:
            pieces = [self._memory[batch.region.start : batch.region.end]]
        self._client.send(pieces, batch.charge_bytes, batch.region)

    def _other(self, flags: int, command: int, cookie: int, offset: int, length: int) -> bool:
        """Any request that the loop above does not do itself; False when it has to wait."""
        if command == Command.DISC:
            self.disconnected = True
            return True
        if command == Command.WRITE and length > MAX_REQUEST_BYTES:
            raise SnapdError(errno.EPROTO, f"write of {length} bytes: at most {MAX_REQUEST_BYTES}")
        number = self._objection(flags, command, offset, length)
        # A write pays for each of its pieces.
        charge_bytes = max(length, MIN_CHARGE_BYTES) if command == Command.READ and not number else MIN_CHARGE_BYTES
        if not self._client.admit(charge_bytes):
            return False
        if number:
            if command == Command.WRITE:
                self._skip_bytes = length
            self._traffic.errors += 1
            self._client.send([self._form.plain(cookie, number)], charge_bytes, None)
            return True
        self._seal_all()
        if command == Command.BLOCK_STATUS:
            self._report_allocation(cookie, offset, length, charge_bytes, 1 if flags & _REQ_ONE else _EXTENTS)
            return True
        request = Single(self._single_ready, Command(command), cookie, length, charge_bytes, self._started_us)
        self._begin(request, flags, offset)
        return True

    def _begin(self, request: Single, flags: int, offset: int) -> None:
        path, length, fua = self._path, request.length, bool(flags & _FUA)
        match request.command:
            case Command.READ:
                read = LargeRead(request, offset, self._form, path, self._large_read_done)
                self._large_reads.add(read)
                read.go_on()
                return
            case Command.WRITE:
                self._writing = Writing(request, offset, fua=fua, path=path, client=self._client)
                return
            case Command.FLUSH:
                path.flush(request, 0)
            case Command.TRIM:
                path.discard(request, 0, offset, length, fua=fua)
            case Command.WRITE_ZEROES:
                path.write_zeroes(request, 0, offset, length, may_unmap=not flags & _NO_HOLE, fua=fua)
        request.seal()

    def _objection(self, flags: int, command: int, offset: int, length: int) -> int:
        """Why a request is refused, as an errno number; 0 when it is not."""
        if command not in _ALLOWED_FLAGS or flags & ~_ALLOWED_FLAGS[Command(command)]:
            return errno.EINVAL
        if command == Command.FLUSH:
            return 0 if not offset and not length else errno.EINVAL
        if command == Command.BLOCK_STATUS and self._allocation is None:
            return errno.EINVAL
        if command in _CHANGES:
            if self._path.read_only:
                return errno.EPERM
            if (offset | length) & (SECTOR_BYTES - 1):
                return errno.EINVAL
            if offset + length > self._path.size_bytes:
                return errno.ENOSPC
        if not length or offset + length > self._path.size_bytes:
            return errno.EINVAL
        return errno.EOVERFLOW if command == Command.READ and length > MAX_REQUEST_BYTES else 0

    def _report_allocation(self, cookie: int, offset: int, length: int, charge_bytes: int, limit: int) -> None:
        assert self._allocation is not None
        try:
            extents = self._allocation.extents(offset, length, limit)
        except SnapdError as error:
            self._client.send([self._form.plain(cookie, error.errno or errno.EIO)], charge_bytes, None)
            return
        payload = STATUS_CHUNK.pack(ALLOCATION_CONTEXT_ID) + b"".join(EXTENT.pack(*extent) for extent in extents)
        self._client.send([self._form.chunk(cookie, Chunk.BLOCK_STATUS, payload)], charge_bytes, None)

    def _single_ready(self, batch: Batch) -> None:
        """A write, flush, trim or write-zeroes is over."""
        assert isinstance(batch, Single)
        number = batch.first_error
        us = self._clock.now_us() - batch.started_us
        self._traffic.count(_OPS[batch.command], batch.length, us, failed=bool(number))
        self._client.send([self._form.plain(batch.cookie, number)], batch.charge_bytes, None)

    def _large_read_done(self, read: LargeRead) -> None:
        request = read.request
        self._large_reads.discard(read)
        number = request.first_error
        us = self._clock.now_us() - request.started_us
        self._traffic.count_reads(1, request.length, us, bool(number))
        reply = self._form.plain(request.cookie, number) if number else memoryview(read.reply)
        self._client.send([reply], request.charge_bytes, None)

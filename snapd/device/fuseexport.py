"""The FUSE export of a device: one `/dev/fuse` descriptor, read and answered in the host's loop.

What the kernel has handed out it keeps until it is answered, so a host that takes the descriptor over asks for all of
it again before it reads anything: asked later, the requests of its own first reads would be taken back from it. That
makes replays of what a predecessor may have done already; every request we take is idempotent, and the predecessor and
its worker are fenced off.

A WRITE's payload is read to where it leaves for its store from, a READ's is written to the kernel from where it was
put. While there is no room for either, the descriptor is not read.
"""

import contextlib
import errno
import mmap
import os

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.device.batch import Batch
from snapd.device.datapath import LOCAL_BYTES, DataPath
from snapd.device.fuse import (
    FALLOCATE_IN,
    HEAD_BYTES,
    IN_HEADER,
    IO_IN,
    MAX_IO_BYTES,
    NOTIFY_RESEND,
    WRITE_OUT,
    FallocateMode,
    Opcode,
    Session,
    read_header,
    refusal,
    reply,
)
from snapd.device.loop import GONE, READABLE, Loop
from snapd.device.traffic import Traffic
from snapd.dmuser.arena import Arena, Region
from snapd.proc.log import Log

MAX_REQUESTS = 256
"""In flight at a time; a loop device alone has at most 128."""
_REQUESTS_A_ROUND = 64
_MADV_POPULATE_WRITE = 23


class Request(Batch):
    """A READ, WRITE, FSYNC or FALLOCATE of the kernel, answered by itself."""

    __slots__ = ("length", "op", "started_us", "unique")

    def __init__(self, export: "FuseExport", op: BioOp, unique: int, length: int, region: Region | None = None) -> None:
        super().__init__(region, export.answer)
        self.op = op
        self.unique = unique
        self.length = length
        self.started_us = export.clock.now_us()


class FuseExport:
    """Serves `path` through `fd`, a `/dev/fuse` descriptor that is mounted; it is not closed here.

    `in_flight` counts the requests that are not answered. Errors of the constructor: EPERM for a descriptor that is not
    mounted.
    """

    def __init__(self, loop: Loop, fd: int, path: DataPath, *, traffic: Traffic, clock: Clock, log: Log) -> None:
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.clock = clock
        self._loop = loop
        self._fd = fd
        self._path = path
        self._traffic = traffic
        self._log = log
        self._session = Session(path.size_bytes, read_only=path.read_only)
        self._memory = path.memory
        self._head = bytearray(HEAD_BYTES)
        self._is_open = True
        self._is_receiving = True
        self._is_full = False
        self._held: tuple[int, int, int] | None = None
        if path.read_only:
            # No payload comes in, but the kernel wants to see room for the largest.
            self._places = None
            self._nowhere = memoryview(mmap.mmap(-1, MAX_IO_BYTES))
        else:
            self._places = path.local if path.is_local(0, SECTOR_BYTES) else path.arena
        # A device that the host serves alone never uses the rest.
        _populate(path.memory, LOCAL_BYTES if path.is_local(0, path.size_bytes) else len(path.memory))
        os.set_blocking(fd, False)
        self._ask_again()
        loop.watch(fd, READABLE, self._on_events)

    def drain(self) -> None:
        """Take no new requests; those in flight are still answered."""
        if self._is_receiving:
            self._is_receiving = False
            self._loop.forget(self._fd)

    def close(self) -> None:
        """Answer nothing any more; the kernel keeps what is unanswered for the next host."""
        self.drain()
        self._is_open = False

    def answer(self, batch: Batch) -> None:
        """A request is done."""
        assert isinstance(batch, Request)
        number = batch.errors.get(0, 0)
        if number:
            self._send(refusal(batch.unique, number))
        elif batch.op is BioOp.READ:
            assert batch.region is not None
            start = batch.region.start
            self._send(read_header(batch.unique, batch.length), self._memory[start : start + batch.length])
        elif batch.op is BioOp.WRITE:
            self._send(reply(batch.unique, WRITE_OUT.pack(batch.length, 0)))
        else:
            self._send(reply(batch.unique))
        if batch.region is not None:
            batch.region.free()
        self.in_flight -= 1
        self.in_flight_bytes -= batch.length
        us = self.clock.now_us() - batch.started_us
        if batch.op is BioOp.READ:
            self._traffic.count_reads(1, batch.length, us, number != 0)
        else:
            self._traffic.count(batch.op, batch.length, us, failed=number != 0)
        if self._is_full:
            self._is_full = False
            self._resume()

    def _ask_again(self) -> None:
        try:
            os.write(self._fd, NOTIFY_RESEND)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise SnapdError.from_os(error, "use the FUSE descriptor") from error
            self._log.line("this kernel does not send FUSE requests again (Linux 6.9): they do not survive a restart")

    def _on_events(self, events: int) -> None:
        if events & GONE:
            self._unmounted()
            return
        place: Region | None = None
        for _ in range(_REQUESTS_A_ROUND):
            if self.in_flight >= MAX_REQUESTS:
                self._is_full = True
                self._loop.change(self._fd, 0)
                break
            if self._places is None:
                tail = self._nowhere
            else:
                place = place or self._path.allocate(self._places, MAX_IO_BYTES)
                if place is None:
                    self._wait_for_room(self._places)
                    break
                tail = self._memory[place.start : place.end]
            try:
                received_bytes = os.readv(self._fd, [self._head, tail])
            except BlockingIOError:
                break
            except FileNotFoundError:
                # Whoever asked has given up in this very moment.
                continue
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise SnapdError.from_os(error, "read a FUSE request") from error
                self._unmounted()
                break
            if self._take(received_bytes, tail, place):
                place = None
            if self._held or not self._is_open:
                break
        if place is not None:
            place.shrink(place.start)
            place.free()

    def _take(self, received_bytes: int, tail: memoryview, place: Region | None) -> bool:
        """Begin with the request that was received; true if it keeps `place`."""
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(self._head)
        if opcode == Opcode.READ:
            _, offset, length, *_ = IO_IN.unpack_from(self._head, IN_HEADER.size)
            left_bytes = self._path.size_bytes - offset
            return self._read(unique, offset, length if length <= left_bytes else max(0, left_bytes), place)
        if opcode == Opcode.WRITE:
            return self._write(unique, place)
        if opcode == Opcode.FSYNC:
            self._flush(unique)
        elif opcode == Opcode.FALLOCATE:
            self._allocate(unique)
        else:
            body = bytes(self._head[IN_HEADER.size : received_bytes]) + bytes(
                tail[: max(0, received_bytes - HEAD_BYTES)]
            )
            answer = self._session.answer(opcode, unique, node, body)
            if answer is not None:
                self._send(answer)
        return False

    def _read(self, unique: int, offset: int, length: int, place: Region | None) -> bool:
        if not length:
            self._send(reply(unique))
            return False
        if (offset | length) % SECTOR_BYTES or length > MAX_IO_BYTES:
            self._send(refusal(unique, errno.EINVAL))
            return False
        if place is None:
            # What the host serves itself must not wait for what a worker keeps.
            arena = self._path.local if self._path.is_local(offset, length) else self._path.arena
            place = self._path.allocate(arena, length)
            if place is None:
                self._held = (unique, offset, length)
                self._wait_for_room(arena)
                return False
        else:
            place.shrink(place.start + length)
        request = self._begin(Request(self, BioOp.READ, unique, length, place))
        self._path.read(request, 0, place.start, offset, length)
        request.seal()
        return True

    def _write(self, unique: int, place: Region | None) -> bool:
        _, offset, length, _, _, open_flags, _ = IO_IN.unpack_from(self._head, IN_HEADER.size)
        if place is None:
            self._send(refusal(unique, errno.EROFS))
            return False
        if not self._check_range(unique, offset, length):
            return False
        place.shrink(place.start + length)
        request = self._begin(Request(self, BioOp.WRITE, unique, length, place))
        self._path.write(request, 0, place.start, offset, length, fua=bool(open_flags & os.O_DSYNC))
        request.seal()
        return True

    def _flush(self, unique: int) -> None:
        request = self._begin(Request(self, BioOp.FLUSH, unique, 0))
        if not self._path.read_only:
            self._path.flush(request, 0)
        request.seal()

    def _allocate(self, unique: int) -> None:
        _, offset, length, mode, _ = FALLOCATE_IN.unpack_from(self._head, IN_HEADER.size)
        is_hole = mode == FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
        if self._path.read_only:
            self._send(refusal(unique, errno.EROFS))
        elif not is_hole and mode & ~FallocateMode.KEEP_SIZE != FallocateMode.ZERO_RANGE:
            self._send(refusal(unique, errno.EOPNOTSUPP))
        elif self._check_range(unique, offset, length):
            request = self._begin(Request(self, BioOp.WRITE_ZEROES, unique, 0))
            # A loop device punches a hole for a discard, which need not leave zeros, and for zeroing, which must.
            self._path.write_zeroes(request, 0, offset, length, may_unmap=is_hole, fua=False)
            request.seal()

    def _check_range(self, unique: int, offset: int, length: int) -> bool:
        """Whether it is one that the data path takes; refused if not."""
        if (offset | length) % SECTOR_BYTES or not length:
            self._send(refusal(unique, errno.EINVAL))
        elif offset + length > self._path.size_bytes:
            self._send(refusal(unique, errno.ENOSPC))
        else:
            return True
        return False

    def _begin(self, request: Request) -> Request:
        self.in_flight += 1
        self.in_flight_bytes += request.length
        return request

    def _wait_for_room(self, ring: Arena) -> None:
        self._loop.change(self._fd, 0)
        self._path.wait_for_room(self._resume, ring)

    def _resume(self) -> None:
        if not self._is_receiving:
            return
        held, self._held = self._held, None
        if held is None or self._read(*held, None):
            self._loop.change(self._fd, READABLE)

    def _send(self, header: bytes, payload: memoryview | None = None) -> None:
        if not self._is_open:
            return
        try:
            os.writev(self._fd, (header,) if payload is None else (header, payload))
        except FileNotFoundError:
            # Whoever asked has given up, or a predecessor's answer was on its way when it died.
            pass
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._unmounted()
            else:
                self._log.line(f"the kernel does not take an answer: {os.strerror(error.errno or errno.EIO)}")

    def _unmounted(self) -> None:
        if self._is_open:
            self._log.line("unmounted")
            self.close()


def _populate(memory: memoryview, length: int) -> None:
    """Have every page of the last `length` bytes of the arena mapped.

    The kernel copies requests and answers within a system call of ours. A page that it had to map first would fail the
    copy if this process is being killed just then, and with it the request, which would not be sent again.
    """
    assert isinstance(memory.obj, mmap.mmap)
    # Linux 5.14: an older one does not send anything again anyway.
    with contextlib.suppress(OSError):
        memory.obj.madvise(_MADV_POPULATE_WRITE, len(memory) - length, length)

"""One client of the export: handshake, requests in, replies out.

Everything that has arrived is parsed in one go, and replies leave in any order, as many in one send as there are.
A connection that has used up its credit is not read from until replies have left; one that takes no reply for
`STALL_MS`, or does not finish its handshake in that time, is cut. What a client sends can end its own connection,
nothing else.
"""

import contextlib
import errno
import fcntl
import socket
import sys
import termios
from collections.abc import Callable

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.device.credits import Credits
from snapd.device.loop import GONE, READABLE, WRITABLE, Loop
from snapd.device.nbd import MAX_REQUEST_BYTES, REPLY, REPLY_MAGIC, REQUEST, REQUEST_MAGIC, Command, Handshake
from snapd.device.readpath import ReadPath
from snapd.dmuser.outbox import Outbox

CREDIT_BYTES = 4 << 20
STALL_MS = 30_000
MIN_CHARGE_BYTES = 4096
"""What the smallest request costs, so that credit also bounds their number."""
RECEIVE_BYTES = 1 << 20
SEND_BUFFER_BYTES = 4 << 20

_CHANGES = frozenset({int(Command.WRITE), int(Command.TRIM), int(Command.WRITE_ZEROES)})


class Read:
    """A READ in progress: the reply with its header already in front of the payload (a `Reading`)."""

    __slots__ = ("charge_bytes", "connection", "cookie", "number", "pieces", "reply")

    def __init__(self, connection: "Connection", cookie: int, length: int, charge_bytes: int) -> None:
        self.connection = connection
        self.cookie = cookie
        self.charge_bytes = charge_bytes
        self.number = 0
        self.pieces = 0
        self.reply = bytearray(REPLY.size + length)
        REPLY.pack_into(self.reply, 0, REPLY_MAGIC, 0, cookie)

    def piece_done(self, number: int) -> None:
        """Whatever a piece failed with, the client is told EIO for this request alone."""
        if number:
            self.number = errno.EIO
        self.pieces -= 1
        if not self.pieces:
            self.connection.read_done(self)


class Connection:
    """A connected client. `on_dirty` is told when there is something to `flush`, `on_close` when it is over."""

    def __init__(
        self,
        client: socket.socket,
        *,
        loop: Loop,
        size_bytes: int,
        read_path: ReadPath,
        credits: "Credits[Connection]",
        clock: Clock,
        on_dirty: "Callable[[Connection], None]",
        on_close: "Callable[[Connection, str], None]",
    ) -> None:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.is_open = True
        self.in_flight_bytes = 0
        self._socket = client
        self._loop = loop
        self._size_bytes = size_bytes
        self._read_path = read_path
        self._credits = credits
        self._clock = clock
        self._on_dirty = on_dirty
        self._on_close = on_close
        self._handshake = Handshake(size_bytes)
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        self._unread_payload_bytes = 0
        self._refused = False
        self._outbox: Outbox[int] = Outbox()
        self._deadline_ms: int | None = clock.now_ms() + STALL_MS
        self._undrained_bytes = 0
        self._interest = READABLE
        loop.watch(client.fileno(), READABLE, self._on_events)
        self._outbox.put(Handshake.greeting, None)
        on_dirty(self)

    def next_deadline_ms(self) -> int | None:
        """When the client must have finished its handshake, or taken something."""
        return self._deadline_ms

    def expire(self) -> None:
        """Cut the client if its time is over and it has taken nothing meanwhile."""
        if self._deadline_ms is None or self._clock.now_ms() < self._deadline_ms:
            return
        # The socket calls itself writable again only when most of its buffer is free: a slow client may be draining it.
        if self._handshake.finished and self._undrained() < self._undrained_bytes:
            self._expect_progress()
        else:
            self.close(f"no progress for {STALL_MS} ms")

    def flush(self) -> bool:
        """Send what there is and go on with requests that waited for credit; true if there were any."""
        if not self.is_open:
            return False
        try:
            sent_bytes, charges = self._outbox.send(self._socket)
        except OSError:
            self.close("")
            return False
        for charge_bytes in charges:
            self.in_flight_bytes -= charge_bytes
            self._credits.release(charge_bytes)
        if self._handshake.finished:
            if not self._outbox:
                self._deadline_ms = None
            elif sent_bytes or self._deadline_ms is None:
                self._expect_progress()
        elif self._handshake.aborted and not self._outbox:
            self.close("")
            return False
        parsed = self._refused and bool(charges) and self._parse()
        self._update_interest()
        return parsed

    def resume(self) -> None:
        """The export has credit for the request that waited for it."""
        self._parse()
        self._on_dirty(self)

    def read_done(self, read: Read) -> None:
        """All pieces of a READ are in place, or it has failed."""
        if not self.is_open:
            self._credits.release(read.charge_bytes)
        elif read.number:
            self._reply(read.cookie, read.number, read.charge_bytes)
        else:
            self._outbox.put(read.reply, read.charge_bytes)
            self._on_dirty(self)

    def close(self, reason: str) -> None:
        """Cut the client off; reads in progress give their credit back when they end."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.forget(self._socket.fileno())
        with contextlib.suppress(OSError):
            # Before the close: a child may hold a copy of the descriptor.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._credits.leave_line(self)
        for charge_bytes in self._outbox.clear():
            self._credits.release(charge_bytes)
        self._on_close(self, reason)

    def _on_events(self, events: int) -> None:
        if events & GONE:
            self.close("")
            return
        if events & WRITABLE:
            self._on_dirty(self)
        if events & READABLE and not self._refused:
            self._receive()

    def _receive(self) -> None:
        held = self._end - self._start
        if held and self._start:
            self._received[:held] = self._received[self._start : self._end]
        self._start, self._end = 0, held
        try:
            got = self._socket.recv_into(self._received[held:])
        except BlockingIOError:
            return
        except OSError:
            got = 0
        if not got:
            self.close("")
            return
        self._end += got
        self._parse()
        if self._refused:
            self._on_dirty(self)

    def _parse(self) -> bool:
        """Take in what has been received; true if a request was among it."""
        if not self.is_open:
            return False
        self._refused = False
        try:
            if not self._handshake.finished:
                self._negotiate()
            return self._handshake.finished and self._take_requests()
        except SnapdError as error:
            self.close(str(error))
            return False

    def _negotiate(self) -> None:
        used, replies = self._handshake.feed(self._received[self._start : self._end])
        self._start += used
        if replies:
            self._outbox.put(replies, None)
            self._on_dirty(self)
        if self._handshake.finished:
            self._deadline_ms = None

    def _take_requests(self) -> bool:
        received, unpack, header_bytes = self._received, REQUEST.unpack_from, REQUEST.size
        taken = False
        while self.is_open:
            if self._unread_payload_bytes:
                skipped = min(self._unread_payload_bytes, self._end - self._start)
                self._start += skipped
                self._unread_payload_bytes -= skipped
            if self._end - self._start < header_bytes:
                break
            magic, flags, command, cookie, offset, length = unpack(received, self._start)
            if magic != REQUEST_MAGIC:
                raise SnapdError(errno.EPROTO, f"request magic {magic:#x}")
            if command == Command.DISC:
                self.close("")
                break
            if command == Command.WRITE and length > MAX_REQUEST_BYTES:
                raise SnapdError(errno.EPROTO, f"write of {length} bytes: at most {MAX_REQUEST_BYTES}")
            is_good = command == Command.READ and not flags and self._is_readable(offset, length)
            charge_bytes = max(length, MIN_CHARGE_BYTES) if is_good else MIN_CHARGE_BYTES
            if not self._admit(charge_bytes):
                self._refused = True
                break
            self._start += header_bytes
            taken = True
            if is_good:
                read = Read(self, cookie, length, charge_bytes)
                self._read_path.read(read, memoryview(read.reply)[REPLY.size :], offset)
                continue
            if command == Command.WRITE:
                self._unread_payload_bytes = length
            self._reply(cookie, errno.EPERM if command in _CHANGES else errno.EINVAL, charge_bytes)
        return taken

    def _is_readable(self, offset: int, length: int) -> bool:
        return 0 < length <= MAX_REQUEST_BYTES and offset + length <= self._size_bytes

    def _reply(self, cookie: int, number: int, charge_bytes: int) -> None:
        self._outbox.put(REPLY.pack(REPLY_MAGIC, number, cookie), charge_bytes)
        self._on_dirty(self)

    def _admit(self, charge_bytes: int) -> bool:
        if self.in_flight_bytes and self.in_flight_bytes + charge_bytes > CREDIT_BYTES:
            return False
        if not self._credits.admit(self, charge_bytes):
            return False
        self.in_flight_bytes += charge_bytes
        return True

    def _expect_progress(self) -> None:
        self._deadline_ms = self._clock.now_ms() + STALL_MS
        self._undrained_bytes = self._undrained()

    def _undrained(self) -> int:
        """Bytes in the socket that the client has not taken, as the kernel counts them."""
        return int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _update_interest(self) -> None:
        if not self.is_open:
            return
        interest = (0 if self._refused else READABLE) | (WRITABLE if self._outbox else 0)
        if interest != self._interest:
            self._interest = interest
            self._loop.change(self._socket.fileno(), interest)

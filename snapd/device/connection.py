"""One client of the NBD export: its socket, its handshake, its credit, and what waits to leave.

Everything that has arrived is parsed in one go, and replies leave in any order, as many in one send as there are.
A connection that has used up its credit is not read from until replies have left; one that takes no reply for
`STALL_MS`, does not finish its handshake or stops inside a write for that long, is cut. What a client sends can end
its own connection, nothing else.
"""

import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Callable

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.device.allocation import Allocation
from snapd.device.credits import Credits
from snapd.device.datapath import DataPath
from snapd.device.handshake import Handshake
from snapd.device.loop import GONE, READABLE, WRITABLE, Loop
from snapd.device.replies import ReplyForm
from snapd.device.requests import Requests
from snapd.device.traffic import Traffic
from snapd.dmuser.arena import Arena, Region
from snapd.dmuser.outbox import Outbox

CREDIT_BYTES = 4 << 20
OWN_CREDIT_BYTES = 256 << 10
"""So much of it is never shared: whatever others hold and do not take, a request of this size is served."""
STALL_MS = 30_000
RECEIVE_BYTES = 64 << 10
SEND_BUFFER_BYTES = 4 << 20


class Sent:
    """A reply on its way: what is given back when it has left."""

    __slots__ = ("charge_bytes", "region")

    def __init__(self, charge_bytes: int, region: Region | None) -> None:
        self.charge_bytes = charge_bytes
        self.region = region


class Connection:
    """A connected client. `on_dirty` is told when there is something to `flush`, `on_close` when it is over."""

    def __init__(
        self,
        client: socket.socket,
        *,
        loop: Loop,
        path: DataPath,
        allocation: Allocation,
        credits: "Credits[Connection]",
        clock: Clock,
        traffic: Traffic,
        on_dirty: "Callable[[Connection], None]",
        on_close: "Callable[[Connection, str], None]",
    ) -> None:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_open = True
        self.in_flight_bytes = 0
        self._socket = client
        self._loop = loop
        self._path = path
        self._allocation = allocation
        self._credits = credits
        self._clock = clock
        self._traffic = traffic
        self._on_dirty = on_dirty
        self._on_close = on_close
        self._handshake = Handshake(path.size_bytes, read_only=path.read_only, can_multi_conn=True)
        self._requests: Requests | None = None
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        self._refused = False
        self._draining = False
        self._has_freed = False
        self._waits_for_room = False
        self._outbox: Outbox[Sent] = Outbox()
        self._deadline_ms: int | None = clock.now_ms() + STALL_MS
        self._undrained_bytes = 0
        self._interest = READABLE
        loop.watch(client.fileno(), READABLE, self._on_events)
        self._outbox.put(Handshake.greeting, None)
        on_dirty(self)

    @property
    def has_negotiated(self) -> bool:
        """Whether the handshake is over."""
        return self._requests is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self.in_flight_bytes and not self._outbox

    def next_deadline_ms(self) -> int | None:
        """When the client must have finished its handshake or its write, or taken something."""
        return self._deadline_ms

    def expire(self) -> None:
        """Cut the client if its time is over and it has done nothing meanwhile."""
        if self._deadline_ms is None or self._clock.now_ms() < self._deadline_ms:
            return
        # The socket calls itself writable again only when most of its buffer is free: a slow client may be draining it.
        if self._outbox and self._requests is not None and self._undrained() < self._undrained_bytes:
            self._expect_progress()
        else:
            self.close(f"no progress for {STALL_MS} ms")

    def drain(self) -> None:
        """Take no more requests: what has not been begun, or not come whole, goes unanswered."""
        self._draining = True
        self._credits.leave_line(self)
        if self._requests is not None:
            self._requests.drop_write()
        self._update_interest()

    def flush(self) -> bool:
        """Send what there is and go on with requests that waited for credit; true if there were any."""
        if not self.is_open:
            return False
        try:
            sent_bytes, left = self._outbox.send(self._socket)
        except OSError:
            self.close("")
            return False
        for sent in left:
            self._give_back(sent)
        if self._requests is not None:
            if not self._outbox:
                self._deadline_ms = None
                if self._owes_payload:
                    self._expect_progress()
            elif sent_bytes or self._deadline_ms is None:
                self._expect_progress()
        elif self._handshake.aborted and not self._outbox:
            self.close("")
            return False
        parsed = self._refused and self._has_freed and self._parse()
        self._update_interest()
        return parsed

    def resume(self) -> None:
        """There is credit for the request that waited for it."""
        if self.is_open:
            self._parse()
            self._on_dirty(self)

    def unpin(self) -> None:
        """Copy out of the arena what the client has not taken yet: others need the room."""
        for sent in self._outbox.copy_out():
            if sent.region is not None:
                sent.region.free()
                sent.region = None

    @property
    def free_credit_bytes(self) -> int:
        """What may be taken with `take_credit` right now."""
        own_bytes = max(0, OWN_CREDIT_BYTES - self.in_flight_bytes)
        return min(CREDIT_BYTES - self.in_flight_bytes, own_bytes + self._credits.free_bytes)

    def take_credit(self, charge_bytes: int) -> None:
        """Take so much of `free_credit_bytes`."""
        self._credits.take(charge_bytes, self._own_part(charge_bytes))
        self.in_flight_bytes += charge_bytes

    def admit(self, charge_bytes: int) -> bool:
        """Take credit for a request, or stand in line for it."""
        if self.in_flight_bytes and self.in_flight_bytes + charge_bytes > CREDIT_BYTES:
            return False
        if not self._credits.admit(self, charge_bytes, self._own_part(charge_bytes)):
            return False
        self.in_flight_bytes += charge_bytes
        return True

    def release(self, charge_bytes: int) -> None:
        """Give credit back; a request of ours that waits for it is tried again."""
        self.in_flight_bytes -= charge_bytes
        self._credits.release(charge_bytes, self._own_part(charge_bytes))
        self._has_freed = True
        if self._refused and self.is_open:
            self._on_dirty(self)

    def wait_for_room(self, ring: Arena) -> None:
        """Be resumed when this part of the arena has room."""
        # Not one for credit meanwhile: it would be offered some again and again.
        self._credits.leave_line(self)
        if not self._waits_for_room:
            self._waits_for_room = True
            self._path.wait_for_room(self._resume_with_room, ring)

    def send(self, pieces: list[memoryview | bytes], charge_bytes: int, region: Region | None) -> None:
        """Send a reply, then give its credit and its region back."""
        sent = Sent(charge_bytes, region)
        if not self.is_open:
            self._give_back(sent)
            return
        for piece in pieces[:-1]:
            self._outbox.put(piece, None)
        self._outbox.put(pieces[-1], sent)
        self._on_dirty(self)

    def close(self, reason: str) -> None:
        """Cut the client off; what is in flight gives its credit back when it ends."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.forget(self._socket.fileno())
        with contextlib.suppress(OSError):
            # Before the close: a child may hold a copy of the descriptor.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._credits.leave_line(self)
        if self._requests is not None:
            self._requests.close()
        for sent in self._outbox.clear():
            self._give_back(sent)
        self._on_close(self, reason)

    def _resume_with_room(self) -> None:
        self._waits_for_room = False
        self.resume()

    def _give_back(self, sent: Sent) -> None:
        self._has_freed = True
        self.in_flight_bytes -= sent.charge_bytes
        self._credits.release(sent.charge_bytes, self._own_part(sent.charge_bytes))
        if sent.region is not None:
            sent.region.free()

    def _own_part(self, charge_bytes: int) -> int:
        """How much of so many bytes, beyond what is in flight, is our own credit."""
        return min(charge_bytes, max(0, OWN_CREDIT_BYTES - self.in_flight_bytes))

    def _on_events(self, events: int) -> None:
        if events & GONE:
            self.close("")
            return
        if events & WRITABLE:
            self._on_dirty(self)
        if events & READABLE and not self._refused and not self._draining:
            self._receive()

    def _receive(self) -> None:
        held = self._end - self._start
        place = None
        if held:
            if self._start:
                self._received[:held] = self._received[self._start : self._end]
        elif self._requests is not None:
            place = self._requests.payload_place()
        self._start, self._end = 0, held
        try:
            got = self._socket.recv_into(self._received[held:] if place is None else place)
        except BlockingIOError:
            return
        except OSError:
            got = 0
        if not got:
            self.close("")
            return
        if place is None or self._requests is None:
            self._end += got
        else:
            self._requests.payload_received(got)
        self._parse()
        if self._refused:
            self._on_dirty(self)

    def _parse(self) -> bool:
        """Take in what has been received; true if a request was among it."""
        if not self.is_open or self._draining:
            return False
        self._refused = self._has_freed = False
        try:
            if self._requests is None:
                self._negotiate()
            if self._requests is None:
                return False
            start = self._start
            self._start, self._refused = self._requests.take(self._received, start, self._end)
        except SnapdError as error:
            self.close(str(error))
            return False
        if self._requests.disconnected:
            self.close("")
            return False
        if self._owes_payload and not self._outbox:
            self._expect_progress()
        return self._start > start

    def _negotiate(self) -> None:
        handshake = self._handshake
        used, replies = handshake.feed(self._received[self._start : self._end])
        self._start += used
        if replies:
            self._outbox.put(replies, None)
            self._on_dirty(self)
        if handshake.finished:
            self._deadline_ms = None
            self._requests = Requests(
                self,
                self._path,
                self._allocation if handshake.allocation_context else None,
                ReplyForm(structured=handshake.structured),
                self._clock,
                self._traffic,
            )

    @property
    def _owes_payload(self) -> bool:
        """Whether it is the client's turn to go on with a write; not when that waits for credit or room."""
        return self._requests is not None and self._requests.is_inside_write and not self._refused

    def _expect_progress(self) -> None:
        self._deadline_ms = self._clock.now_ms() + STALL_MS
        self._undrained_bytes = self._undrained()

    def _undrained(self) -> int:
        """Bytes in the socket that the client has not taken, as the kernel counts them."""
        return int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _update_interest(self) -> None:
        if not self.is_open:
            return
        interest = (0 if self._refused or self._draining else READABLE) | (WRITABLE if self._outbox else 0)
        if interest != self._interest:
            self._interest = interest
            self._loop.change(self._socket.fileno(), interest)

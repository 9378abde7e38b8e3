"""The NBD export of a device: its listeners, its clients, and the credit they share."""

import socket
from collections.abc import Callable, Sequence

from snapd.block.clock import Clock
from snapd.device.allocation import Allocation
from snapd.device.connection import Connection
from snapd.device.credits import Credits
from snapd.device.datapath import DataPath
from snapd.device.loop import READABLE, Loop
from snapd.device.traffic import Traffic
from snapd.proc.log import Log

CREDIT_BYTES = 16 << 20
MAX_CONNECTIONS = 64


class Export:
    """Serves `path` to whoever connects to `listeners`, which it does not close."""

    def __init__(
        self,
        loop: Loop,
        listeners: Sequence[socket.socket],
        *,
        path: DataPath,
        allocation: Allocation,
        clock: Clock,
        traffic: Traffic,
        log: Log,
    ) -> None:
        # A dictionary for its order: the oldest comes first.
        self.connections: dict[Connection, None] = {}
        self._loop = loop
        self._listeners = listeners
        self._path = path
        self._allocation = allocation
        self._clock = clock
        self._traffic = traffic
        self._log = log
        self._credits: Credits[Connection] = Credits(CREDIT_BYTES)
        # A dictionary for its order: who became dirty first is flushed first.
        self._dirty: dict[Connection, None] = {}
        for listener in listeners:
            listener.setblocking(False)
            loop.watch(listener.fileno(), READABLE, self._acceptor(listener))

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of requests whose replies have not left yet."""
        return self._credits.in_flight_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no client has a request in flight."""
        return all(connection.is_idle for connection in self.connections)

    @property
    def has_replies(self) -> bool:
        """Whether a `flush` would do something."""
        return bool(self._dirty)

    def flush(self) -> bool:
        """Send the replies that are ready; true if room for them let further requests in."""
        dirty, self._dirty = self._dirty, {}
        parsed = False
        for connection in dirty:
            parsed = connection.flush() or parsed
        while (connection_in_line := self._credits.next_in_line()) is not None:
            connection_in_line.resume()
            parsed = True
        if self._path.is_short_of_room:
            for connection in self.connections:
                connection.unpin()
        return self._path.serve_room_waiters() or parsed or bool(self._dirty)

    def next_deadline_ms(self) -> int | None:
        """When some client will have been idle for too long."""
        deadlines = (connection.next_deadline_ms() for connection in self.connections)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire(self) -> None:
        """Cut the clients whose time is over."""
        for connection in list(self.connections):
            connection.expire()

    def drain(self) -> None:
        """Accept nobody, and take no more requests; what is in flight goes on."""
        for listener in self._listeners:
            self._loop.forget(listener.fileno())
        self._listeners = ()
        for connection in self.connections:
            connection.drain()

    def close(self) -> None:
        """Cut everybody off; after `drain`."""
        for connection in list(self.connections):
            connection.close("")

    def _acceptor(self, listener: socket.socket) -> Callable[[int], None]:
        return lambda _events: self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._log.line(f"accept a client: {error}")
            return
        if len(self.connections) >= MAX_CONNECTIONS:
            self._make_room()
        if len(self.connections) >= MAX_CONNECTIONS:
            self._log.line(f"client refused: {MAX_CONNECTIONS} are connected")
            client.close()
            return
        connection = Connection(
            client,
            loop=self._loop,
            path=self._path,
            allocation=self._allocation,
            credits=self._credits,
            clock=self._clock,
            traffic=self._traffic,
            on_dirty=self._mark_dirty,
            on_close=self._on_close,
        )
        self.connections[connection] = None

    def _make_room(self) -> None:
        """Cut the oldest client that has not even negotiated: those could keep all others out."""
        strangers = (connection for connection in self.connections if not connection.has_negotiated)
        if (oldest := next(strangers, None)) is not None:
            oldest.close("others want to connect")

    def _mark_dirty(self, connection: Connection) -> None:
        self._dirty[connection] = None

    def _on_close(self, connection: Connection, reason: str) -> None:
        self.connections.pop(connection, None)
        self._dirty.pop(connection, None)
        if reason:
            self._log.line(f"client cut off: {reason}")

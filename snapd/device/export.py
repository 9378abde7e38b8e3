"""The NBD export of a device: its listener, its clients, and the credit they share."""

import contextlib
import socket

from snapd.block.clock import Clock
from snapd.device.connection import Connection
from snapd.device.credits import Credits
from snapd.device.loop import READABLE, Loop
from snapd.device.readpath import ReadPath
from snapd.proc.log import Log

CREDIT_BYTES = 16 << 20
MAX_CONNECTIONS = 64


class Export:
    """Serves `size_bytes` through `read_path` to whoever connects to `listener`, which it does not close."""

    def __init__(
        self, loop: Loop, listener: socket.socket, *, size_bytes: int, read_path: ReadPath, clock: Clock, log: Log
    ) -> None:
        listener.setblocking(False)
        self.connections: set[Connection] = set()
        self._loop = loop
        self._listener = listener
        self._size_bytes = size_bytes
        self._read_path = read_path
        self._clock = clock
        self._log = log
        self._credits: Credits[Connection] = Credits(CREDIT_BYTES)
        # A dictionary for its order: who became dirty first is flushed first.
        self._dirty: dict[Connection, None] = {}
        loop.watch(listener.fileno(), READABLE, self._accept)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of requests whose replies have not left yet."""
        return self._credits.in_flight_bytes

    def flush(self) -> bool:
        """Send the replies that are ready; true if room for them let further requests in."""
        dirty, self._dirty = self._dirty, {}
        parsed = False
        for connection in dirty:
            parsed = connection.flush() or parsed
        while (connection_in_line := self._credits.next_in_line()) is not None:
            connection_in_line.resume()
            parsed = True
        return parsed or bool(self._dirty)

    def next_deadline_ms(self) -> int | None:
        """When some client will have been idle for too long."""
        deadlines = (connection.next_deadline_ms() for connection in self.connections)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire(self) -> None:
        """Cut the clients whose time is over."""
        for connection in list(self.connections):
            connection.expire()

    def close(self) -> None:
        """Cut everybody off and accept nobody any more."""
        self._loop.forget(self._listener.fileno())
        for connection in list(self.connections):
            connection.close("")

    def _accept(self, _events: int) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._log.line(f"accept a client: {error}")
            return
        if len(self.connections) >= MAX_CONNECTIONS:
            self._log.line(f"client refused: {MAX_CONNECTIONS} are connected")
            client.close()
            return
        connection = Connection(
            client,
            loop=self._loop,
            size_bytes=self._size_bytes,
            read_path=self._read_path,
            credits=self._credits,
            clock=self._clock,
            on_dirty=self._mark_dirty,
            on_close=self._on_close,
        )
        self.connections.add(connection)

    def _mark_dirty(self, connection: Connection) -> None:
        self._dirty[connection] = None

    def _on_close(self, connection: Connection, reason: str) -> None:
        with contextlib.suppress(KeyError):
            self.connections.remove(connection)
        self._dirty.pop(connection, None)
        if reason:
            self._log.line(f"client cut off: {reason}")

"""A supervised process as the event loop sees it: its exit as a future, its control messages as calls and events."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.proc import control
from snapd.proc.control import Message

_REPLY_TIMEOUT_S = 10.0


class Watch:
    """Tells when a process has exited; works for our children and for processes another daemon started."""

    def __init__(self, pid: int, pidfd: int, *, child: bool) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    async def exited(self) -> None:
        """Return when the process has exited; for any number of waiters, and safe to cancel."""
        await asyncio.shield(self._exited)

    def kill(self) -> None:
        """SIGKILL; harmless when it has exited."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def detach(self) -> None:
        """Stop watching, and leave the process alone."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        if self._child:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self.detach()
        if not self._exited.done():
            self._exited.set_result(None)


class ControlConnection:
    """One end of a control connection: calls that wait for their reply, and events that arrive unasked."""

    def __init__(self, connection: socket.socket, on_event: Callable[[Message], None]) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._on_event = on_event
        self._lock = asyncio.Lock()
        # A reply that comes after its call gave up must not be taken for the next one's.
        self._last_id = 0
        self._reply: asyncio.Future[tuple[Message, list[int]]] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._on_readable)

    def close(self) -> None:
        """Hang up; a call that waits fails with ENOTCONN."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(SnapdError(errno.ENOTCONN, "the process has hung up"))

    async def call(
        self, message: Message, fds: list[int] | None = None, *, timeout_s: float = _REPLY_TIMEOUT_S
    ) -> tuple[Message, list[int]]:
        """Send a verb and return its reply with the descriptors; the peer's errors are raised as `SnapdError`."""
        async with self._lock:
            if self._socket.fileno() < 0:
                raise SnapdError(errno.ENOTCONN, "the process has hung up")
            self._reply = self._loop.create_future()
            self._last_id += 1
            try:
                control.send(self._socket, {**message, "id": self._last_id}, fds or [])
                reply, received = await asyncio.wait_for(self._reply, timeout_s)
            except TimeoutError as error:
                raise SnapdError(errno.ETIMEDOUT, f"no answer to {message.get('verb')}") from error
            except OSError as error:
                raise SnapdError.from_os(error, f"send {message.get('verb')}") from error
            finally:
                self._reply = None
        if not reply.get("ok"):
            raise SnapdError(int(reply.get("errno", errno.EIO)), str(reply.get("message", "refused")))
        return reply, received

    def tell(self, message: Message) -> None:
        """Send without waiting for anything; a peer that is gone is found out elsewhere."""
        with contextlib.suppress(OSError):
            control.send(self._socket, message)

    def drain(self) -> None:
        """Deliver what a process that has exited sent last: its exit may be noticed before its words."""
        while self._on_readable():
            pass

    def _on_readable(self) -> bool:
        """Deliver one message; False when there is none."""
        try:
            received = control.receive(self._socket)
        except BlockingIOError:
            return False
        except (OSError, SnapdError):
            received = None
        if received is None:
            self.close()
            return False
        if "event" in received[0]:
            self._on_event(received[0])
        elif self._reply is not None and not self._reply.done() and received[0].get("id") == self._last_id:
            self._reply.set_result(received)
        else:
            for fd in received[1]:
                os.close(fd)
        return True

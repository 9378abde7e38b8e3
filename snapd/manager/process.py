"""A supervised process as the event loop sees it: its exit to wait for, its control messages as calls and events.

Invariant: a successor is started only when its predecessor, also one that another daemon started, is gone.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.proc import control, fence
from snapd.proc.child import Child
from snapd.proc.control import Message

_REPLY_TIMEOUT_S = 10.0
_EVICT_TIMEOUT_MS = 5000


class Process:
    """A process and the control connection to it; started here behind its fence, or adopted."""

    def __init__(self, watch: "Watch", control_connection: "ControlConnection") -> None:
        self.control = control_connection
        self._watch = watch

    @classmethod
    async def spawn(
        cls,
        module: str,
        arguments: list[str],
        fds: list[int],
        fence_path: str,
        on_event: Callable[[Message], None],
    ) -> "Process":
        """Start `module` with control connection, `fds` and fence as its descriptors; a predecessor is evicted."""
        await asyncio.to_thread(evict, fence_path)
        ours, theirs = control.pair()
        try:
            child = Child.spawn_fenced(module, arguments, [theirs.fileno(), *fds], fence_path)
        except SnapdError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(Watch(child.pid, child.pidfd, child=True), ControlConnection(ours, on_event))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._watch.pid

    async def exited(self) -> None:
        """Return when it has exited, and what it said last was delivered."""
        await self._watch.exited()
        self.control.drain()

    def kill(self) -> None:
        """SIGKILL; harmless when it has exited."""
        self._watch.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to stop and wait for its exit; killed when it takes longer."""
        self.control.tell({"verb": "stop"})
        try:
            await asyncio.wait_for(self._watch.exited(), timeout_s)
        except TimeoutError:
            self.kill()
            await self._watch.exited()
        self.forget()

    def forget(self) -> None:
        """Hang up and stop watching; a process that runs goes on."""
        self.control.close()
        self._watch.detach()


def evict(fence_path: str) -> None:
    """Kill the holder of a fence and wait for its exit; ETIMEDOUT when it does not go. Blocks."""
    try:
        fd = os.open(fence_path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not fence.evict(fd, _EVICT_TIMEOUT_MS):
            raise SnapdError(errno.ETIMEDOUT, f"the process that holds {fence_path} does not exit")
    finally:
        os.close(fd)


class Watch:
    """Tells when a process has exited; works for our children and for processes another daemon started."""

    def __init__(self, pid: int, pidfd: int, *, child: bool) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    async def exited(self) -> int:
        """Return when the process has exited; for any number of waiters, and safe to cancel.

        The status is as a shell's (128 + signal), 0 for one that is not our child.
        """
        return await asyncio.shield(self._exited)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; harmless when it has exited."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def detach(self) -> None:
        """Stop watching, and leave the process alone."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_exit(self) -> None:
        result = None
        if self._child:
            with contextlib.suppress(ChildProcessError):
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self.detach()
        if not self._exited.done():
            normal = result is None or result.si_code == os.CLD_EXITED
            status = 0 if result is None else result.si_status
            self._exited.set_result(status if normal else 128 + status)


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

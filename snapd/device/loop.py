"""The device host's event loop: one epoll set, and who handles which descriptor."""

import select
import time
from collections.abc import Callable

Handler = Callable[[int], None]
"""Called with the epoll events."""

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR


class Loop:
    """Level-triggered readiness for one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._forgotten: set[int] = set()

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` whenever one of `events` (or `GONE`) holds for `fd`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Watch for other events; 0 leaves `GONE`."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching; before the descriptor is closed."""
        del self._handlers[fd]
        self._forgotten.add(fd)
        self._epoll.unregister(fd)

    def run_once(self, timeout_ms: int | None, spin_us: int = 0) -> None:
        """Wait for events, or for so long, and handle them; None waits without limit.

        The first `spin_us` are spent looking again and again instead of sleeping.
        """
        self._forgotten.clear()
        ready = self._spin(spin_us) if spin_us else []
        for fd, events in ready or self._epoll.poll(None if timeout_ms is None else timeout_ms / 1000):
            # A number that was closed in this round may stand for something new by now.
            if fd not in self._forgotten:
                self._handlers[fd](events)

    def _spin(self, us: int) -> list[tuple[int, int]]:
        poll, now = self._epoll.poll, time.monotonic_ns
        end = now() + us * 1000
        while not (ready := poll(0)):
            if now() > end:
                break
        return ready

"""What may take long and has no answer until it is done: flush, discard and zero of the device's own store.

One thread does them in order, so that the loop goes on serving reads; it wakes the loop through an eventfd. How much
can be waiting is bounded by the exports' credit.
"""

import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.device.loop import READABLE, Loop

Work = Callable[[], None]
Done = Callable[[int], None]


class SlowIo:
    """Runs work aside; `done(errno)` is called on the loop's thread."""

    def __init__(self, loop: Loop) -> None:
        self._work: queue.SimpleQueue[tuple[Work, Done]] = queue.SimpleQueue()
        self._finished: deque[tuple[Done, int]] = deque()
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        loop.watch(self._event_fd, READABLE, self._on_event)

    def submit(self, work: Work, done: Done) -> None:
        """Have `work` done; what it raises becomes the errno."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="slow I/O", daemon=True)
            self._thread.start()
        self._work.put((work, done))

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            number = 0
            try:
                work()
            except SnapdError as error:
                number = error.errno or errno.EIO
            self._finished.append((done, number))
            os.eventfd_write(self._event_fd, 1)

    def _on_event(self, _events: int) -> None:
        os.eventfd_read(self._event_fd)
        while self._finished:
            done, number = self._finished.popleft()
            done(number)

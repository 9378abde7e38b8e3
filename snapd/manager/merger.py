"""The daemon's side of one merger: start, progress, restart, stop.

Invariant: a merger is restarted from its last durable span until it says how it ended; a successor waits on the fence
until the predecessor is gone.
"""

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.manager.paths import DevicePaths
from snapd.manager.process import Process
from snapd.manager.resources import Resources
from snapd.proc.control import Message
from snapd.proc.deaths import DeathCount

_STOP_TIMEOUT_S = 10.0


class MergerProcess:
    """One merge being worked on.

    `on_progress(merged_bytes)` and `on_end(failure)` run on the event loop; `on_end` is awaited once, with
    None after a merge whose read-back matched, else with the error.
    """

    def __init__(
        self,
        uuid: str,
        paths: DevicePaths,
        resources: Resources,
        on_progress: Callable[[int], None],
        on_end: Callable[[SnapdError | None], Awaitable[None]],
    ) -> None:
        self._uuid = uuid
        self._paths = paths
        self._resources = resources
        self._on_progress = on_progress
        self._on_end = on_end
        self._clock = SystemClock()
        self._deaths = DeathCount()
        self._process: Process | None = None
        self._merged = False
        self._failure: SnapdError | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pid(self) -> int:
        """Process id of the merger; 0 while none runs."""
        return self._process.pid if self._process is not None else 0

    async def stop(self) -> None:
        """Have the merger stop at its next span, and wait for its exit; killed when it takes too long."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._process is not None:
            await self._process.stop(_STOP_TIMEOUT_S)
            self._process = None

    async def _run(self) -> None:
        while not self._merged and self._failure is None:
            try:
                self._process = await self._spawn()
                await self._process.exited()
                self._process.forget()
            except SnapdError as error:
                self._failure = error
            self._process = None
            ended = self._merged or self._failure is not None
            if not ended and self._deaths.is_crash_loop(self._clock.now_ms()):
                self._failure = SnapdError(errno.EIO, f"the merger died {self._deaths.total} times")
        await self._on_end(self._failure)

    async def _spawn(self) -> Process:
        resources = self._resources
        fds = [
            resources.cow_fd,
            resources.base_fd,
            resources.extent_map_fd,
            resources.shared_map_fd,
            resources.undo_fd,
        ]
        arguments = ["--snapshot", self._uuid]
        return await Process.spawn("snapd.merge", arguments, fds, self._paths.merger_fence, self._on_message)

    def _on_message(self, message: Message) -> None:
        event = message["event"]
        if event == "progress" and message["phase"] == "merge":
            self._on_progress(int(message["done_bytes"]))
        elif event == "merged":
            self._merged = True
        elif event == "failed":
            self._failure = SnapdError(int(message["errno"]), str(message["message"]))

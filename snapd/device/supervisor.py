"""The supervisor: keeps one worker behind the target.

A successor is started only when its predecessor's exit has been seen and its last answers have been taken in
(DMU-185); a worker that hangs up, answers nonsense or keeps a request for too long is killed first (DMU-184).

Five workers within a minute that die without having answered anything are a crash loop: no further one is started, and
the target fails everything at once. A worker that has answered shows that workers can serve, so whatever ended it, it
is replaced at once, however often. One that somebody killed while requests waited for it shows nothing, and does not
count; but when nobody has answered for `KILLED_MS` of that, it is a crash loop too. A request that ends each worker it
is given to fails by itself after so many replays (DMU-148). Where workers are not to be replaced, everything fails
after the first death.
"""

import signal
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.device.loop import READABLE, WRITABLE, Loop
from snapd.dmuser.arenachannel import ArenaChannel
from snapd.dmuser.target import Target
from snapd.proc.deaths import CRASH_LOOP_DEATHS, CRASH_LOOP_MS, DeathCount
from snapd.proc.log import Log

START_RETRY_MS = 1000
"""Pause after a start that failed in this process, for want of memory or descriptors."""
KILLED_MS = 10_000
"""So long are workers replaced that are killed under waiting requests, without one that has answered."""
EXIT_MS = 500
"""So long may a worker take to exit after it has hung up; then it is killed."""
_KILLED = 128 + signal.SIGKILL
STOP_TIMEOUT_MS = 5000


class WorkerState(StrEnum):
    """What stands behind the target."""

    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"
    CRASH_LOOP = "CRASH_LOOP"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class Process(Protocol):
    """A started worker (`snapd.proc.child.Child`)."""

    pid: int
    pidfd: int

    def kill(self) -> None: ...

    def wait(self, timeout_ms: int | None = None) -> int: ...


class Supervisor:
    """Starts workers, and replaces them if `replaces`.

    `start_worker` returns a process and the target's channel to it.
    """

    def __init__(
        self,
        loop: Loop,
        target: Target,
        start_worker: Callable[[], tuple[Process, ArenaChannel]],
        clock: Clock,
        log: Log,
        *,
        replaces: bool,
    ) -> None:
        self.state = WorkerState.RESTARTING
        self.restarts = 0
        self._loop = loop
        self._target = target
        self._start_worker = start_worker
        self._clock = clock
        self._log = log
        self._replaces = replaces
        self._process: Process | None = None
        self._channel: ArenaChannel | None = None
        self._channel_interest = READABLE
        self._has_answered = False
        self._was_killed = self._killed_by_us = False
        self._killed_since_ms: int | None = None
        self._exit_deadline_ms: int | None = None
        self._deaths = DeathCount()
        self._retry_ms: int | None = None

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start a worker."""
        self._retry_ms = None
        self._has_answered = self._was_killed = self._killed_by_us = False
        try:
            self._process, self._channel = self._start_worker()
        except SnapdError as error:
            self._log.line(f"no worker: {error}")
            if self._counts_death():
                self._retry_ms = self._clock.now_ms() + START_RETRY_MS
            return
        self.state = WorkerState.RUNNING
        self._channel_interest = READABLE
        self._loop.watch(self._process.pidfd, READABLE, self._on_exit)
        self._loop.watch(self._channel.fileno(), READABLE, self._on_channel)

    def send(self) -> None:
        """Hand the target's messages to the worker, as far as its socket takes them."""
        channel = self._channel
        if channel is None or not (self._target.queued or channel.wants_to_send):
            return
        channel.send()
        interest = READABLE | (WRITABLE if channel.wants_to_send else 0)
        if interest != self._channel_interest:
            self._channel_interest = interest
            self._loop.change(channel.fileno(), interest)

    def next_deadline_ms(self) -> int | None:
        """When `expire` will have something to do."""
        deadlines = (self._retry_ms, self._exit_deadline_ms, self._target.next_deadline_ms())
        return min((d for d in deadlines if d is not None), default=None)

    def expire(self) -> None:
        """Replace a worker that is stuck, try a failed start again, and let the target's timers run."""
        if self._target.stuck_channel() is not None:
            self._drop_worker("stuck: a request has not been answered in time")
        self._target.expire()
        if self._exit_deadline_ms is not None and self._exit_deadline_ms <= self._clock.now_ms():
            self._kill()
        if self._retry_ms is not None and self._retry_ms <= self._clock.now_ms():
            self.restarts += 1
            self.start()

    def stop(self) -> None:
        """End the worker; `SnapdError` (ETIMEDOUT) when it does not go."""
        self.state = WorkerState.STOPPED
        self._retry_ms = None
        self._close_channel()
        if self._process is not None:
            self._process.kill()
            self._loop.forget(self._process.pidfd)
            self._process.wait(STOP_TIMEOUT_MS)
            self._process = None

    def _on_channel(self, _events: int) -> None:
        if self._channel is None:
            return
        try:
            if not self._channel.receive():
                self._drop_worker("")
        except SnapdError as error:
            self._drop_worker(f"broke the protocol: {error}")

    def _drop_worker(self, reason: str) -> None:
        """Take no more from this worker and see to it that it goes; its exit brings the successor."""
        if reason:
            self._log.line(f"worker {self.worker_pid} {reason}")
        self.state = WorkerState.RESTARTING
        self._close_channel()
        if self._process is None:
            self._replace()
        elif reason:
            self._kill()
        else:
            # Whoever was killed hangs up just before it is reported; let it tell how it ended.
            self._exit_deadline_ms = self._clock.now_ms() + EXIT_MS

    def _kill(self) -> None:
        """Kill the worker ourselves, which then says nothing of who ended it."""
        self._exit_deadline_ms = None
        self._killed_by_us = True
        if self._process is not None:
            self._process.kill()

    def _on_exit(self, _events: int) -> None:
        assert self._process is not None
        pid = self._process.pid
        self._loop.forget(self._process.pidfd)
        status = self._process.wait(0)
        self._process = None
        self._exit_deadline_ms = None
        self._was_killed = status == _KILLED and not self._killed_by_us
        self._log.line(f"worker {pid} ended with status {status}")
        self.state = WorkerState.RESTARTING
        # Its last answers may still lie in the socket; the end of the stream follows them.
        if self._channel is None:
            self._replace()

    def _replace(self) -> None:
        if self._counts_death():
            self.restarts += 1
            self.start()

    def _counts_death(self) -> bool:
        """A worker has died; whether there shall be another one. If not, requests fail at once from now on."""
        if not self._replaces:
            self.state = WorkerState.FAILED
            self._log.line("the worker is gone and is not replaced: requests fail from now on")
            self._target.give_up()
            return False
        if self._has_answered:
            self._killed_since_ms = None
            return True
        if self._is_crash_loop():
            self.state = WorkerState.CRASH_LOOP
            self._log.line(
                f"{CRASH_LOOP_DEATHS} workers died within {CRASH_LOOP_MS} ms, or were killed for {KILLED_MS} ms, before"
                " one answered anything: requests fail from now on"
            )
            self._target.give_up()
            return False
        return True

    def _is_crash_loop(self) -> bool:
        """Whether the death of a worker that had answered nothing was one too many."""
        now_ms = self._clock.now_ms()
        if not (self._was_killed and self._target.queued):
            return self._deaths.is_crash_loop(now_ms)
        if self._killed_since_ms is None:
            self._killed_since_ms = now_ms
        return now_ms - self._killed_since_ms >= KILLED_MS

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._has_answered = self._channel.has_answered
            self._loop.forget(self._channel.fileno())
            self._channel.close()
            self._channel = None

"""The device host: one thread, one loop, one device.

Each round: handle what is ready, hand the worker its messages (so that it works meanwhile), read what is passed
down, send the replies, wait for what had to come from the disk, and take in the requests that waited for the room this
made. The host never opens, stats or syncs its own export: a process that waits for itself cannot be killed.
"""

import errno
import os
import signal
import socket
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.block.file import FileStore, file_store
from snapd.cow.image.extentmap import ExtentMap
from snapd.device.allocation import Allocation
from snapd.device.config import Descriptors, DeviceConfig, Policy, Route
from snapd.device.control import ControlPort
from snapd.device.datapath import DataPath
from snapd.device.export import Export
from snapd.device.loop import READABLE, Loop
from snapd.device.routes import Routes, SnapshotRoutes, WholeRoute
from snapd.device.slowio import SlowIo
from snapd.device.supervisor import Process, Supervisor
from snapd.device.traffic import Traffic
from snapd.dmuser.arena import map_arena
from snapd.dmuser.arenachannel import ArenaChannel
from snapd.dmuser.target import Target
from snapd.merge.sharedmap import SharedMap
from snapd.proc import fence
from snapd.proc.child import Child
from snapd.proc.control import Message
from snapd.proc.log import Log

if TYPE_CHECKING:
    from snapd.device.daemons import Daemons
    from snapd.device.fuseexport import FuseExport

DRAIN_MS = 5000
"""So long may requests in flight take when the host is told to stop."""
SPIN_US, SPIN_BYTES = 50, 8 << 10
"""With no more in flight than that the loop stays awake for so long: a sleep would cost as much as the request."""
EVICT_MS = 5000
TIMER_MS = 10
"""Timers run so late at most, and so seldom while requests keep coming: looking at them costs as much as a request."""

_WORKERS_SHARE = ("base", "cow", "extent_map", "shared_map", "undo_directory")


class Host:
    """Everything one device consists of; `run` serves it until `stop` or SIGTERM.

    Errors of the constructor, after which nothing serves: EBADMSG for a damaged map, EINVAL when the maps, the
    snapshot and the size do not belong together, or a descriptor is missing.
    """

    def __init__(
        self, config: DeviceConfig, descriptors: Descriptors, connection: socket.socket, clock: Clock, log: Log
    ) -> None:
        descriptors.check(config.route)
        self._config = config
        self._descriptors = descriptors
        self._clock = clock
        self._started_ms = clock.now_ms()
        self._log = log
        self._loop = Loop()
        self._stop_deadline_ms: int | None = None
        self._next_timers_ms = 0
        self._traffic = Traffic()
        replaces = config.policy is Policy.RESTART
        self._target = Target(
            clock,
            attach_timeout_ms=config.attach_timeout_ms,
            restart_grace_ms=config.restart_grace_ms if replaces else 0,
            request_timeout_ms=config.request_timeout_ms if replaces else 0,
        )
        self._backing = self._make_backing(replaces=replaces)
        # First of all: a worker needs a while to come up.
        if self._backing is not None:
            self._backing.start()
        try:
            self._path, allocation = self._make_path()
            self._export = Export(
                self._loop,
                [socket.socket(fileno=fd) for fd in self._given("nbd_listener", "nbd_tcp_listener")],
                path=self._path,
                allocation=allocation,
                clock=clock,
                traffic=self._traffic,
                log=log,
            )
            self._fuse = [self._serve_fuse(fd) for fd in self._given("fuse")]
            self._control = ControlPort(
                self._loop, socket.socket(fileno=descriptors["control_listener"]), connection, self._do_verb
            )
        except SnapdError:
            if self._backing is not None:
                self._backing.stop()
            raise
        self._watch_for_sigterm()

    def run(self) -> None:
        """Serve until told to stop; ETIMEDOUT when the worker could not be ended."""
        while self._stop_deadline_ms is None or not self._is_done():
            self._settle()
            self._loop.run_once(self._run_timers(), self._spin_us())
        self._export.close()
        self._target.destroy()
        if self._backing is not None:
            self._backing.stop()

    def _settle(self) -> None:
        path, backing, export = self._path, self._backing, self._export
        while True:
            path.submit_waiting()
            if backing is not None:
                backing.send()
            if path.can_submit:
                continue
            path.read_local()
            parsed = export.flush()
            path.read_cold()
            if not (parsed or path.can_submit or path.can_read_local or export.has_replies):
                return

    def _run_timers(self) -> int | None:
        """Do what is due; returns for how long the loop may wait."""
        now_ms = self._clock.now_ms()
        if now_ms < self._next_timers_ms:
            return self._next_timers_ms - now_ms
        self._next_timers_ms = now_ms + TIMER_MS
        self._export.expire()
        deadlines = [self._export.next_deadline_ms(), self._stop_deadline_ms]
        if self._backing is not None:
            self._backing.expire()
            deadlines.append(self._backing.next_deadline_ms())
        nearest = min((d for d in deadlines if d is not None), default=None)
        # What has just been answered waits to leave.
        if self._export.has_replies:
            return 0
        return None if nearest is None else max(0, nearest - now_ms)

    def _spin_us(self) -> int:
        """For how long the next event is worth waiting for awake: one request at a time comes back within that."""
        is_busy = self._export.in_flight_bytes > SPIN_BYTES or any(fuse.in_flight > 1 for fuse in self._fuse)
        return 0 if is_busy else SPIN_US

    def _is_done(self) -> bool:
        """Whether what was in flight when we were told to stop is answered, or has had its time."""
        assert self._stop_deadline_ms is not None
        is_idle = self._export.is_idle and not any(fuse.in_flight for fuse in self._fuse)
        return is_idle or self._clock.now_ms() >= self._stop_deadline_ms

    def _stop(self) -> None:
        """Take no more requests; what is in flight is finished, for a while."""
        if self._stop_deadline_ms is None:
            self._stop_deadline_ms = self._clock.now_ms() + DRAIN_MS
            self._export.drain()
            for fuse in self._fuse:
                fuse.drain()

    def _watch_for_sigterm(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._wakeup = ours, theirs

        def on_wakeup(_events: int) -> None:
            ours.recv(16)
            self._stop()

        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        signal.set_wakeup_fd(theirs.fileno())
        self._loop.watch(ours.fileno(), READABLE, on_wakeup)

    def _do_verb(self, message: Message) -> tuple[Message, Sequence[int]]:
        match message.get("verb"):
            case "status":
                return self._status(), ()
            case "stats":
                return self._status() | self._traffic.to_dict(), ()
            case "set":
                return self._set(message.get("attach_timeout_ms")), ()
            case "adopt":
                given = self._descriptors
                fields = {"pid": os.getpid(), "device": self._config.to_dict(), "descriptors": given.names}
                return fields, given.fds
            case "stop":
                self._stop()
                return {}, ()
            case verb:
                raise SnapdError(errno.EINVAL, f"unknown verb {verb!r}")

    def _set(self, attach_timeout_ms: Any) -> Message:
        if type(attach_timeout_ms) is not int or attach_timeout_ms < 0:
            raise SnapdError(errno.EINVAL, f"attach_timeout_ms cannot be {attach_timeout_ms!r}")
        self._target.attach_timeout_ms = attach_timeout_ms
        return {}

    def _status(self) -> Message:
        backing = self._backing
        return {
            "pid": os.getpid(),
            "uptime_ms": self._clock.now_ms() - self._started_ms,
            "state": "RUNNING" if backing is None else str(backing.state),
            "attach_state": "none" if backing is None else self._target.state,
            "attach_timeout_ms": self._target.attach_timeout_ms,
            "worker_pid": 0 if backing is None else backing.worker_pid,
            "worker_restarts": 0 if backing is None else backing.restarts,
            "connections": len(self._export.connections),
            "queued": self._target.queued + self._path.waiting,
            "in_flight": self._target.in_flight,
            "in_flight_bytes": self._export.in_flight_bytes + sum(fuse.in_flight_bytes for fuse in self._fuse),
            "reads_passed_down": self._path.reads_passed_down,
            "reads_to_worker": self._path.reads_to_worker,
        }

    def _serve_fuse(self, fd: int) -> "FuseExport":
        # Here, not above, as the listener below: most devices have no use for it, and a start must be quick.
        from snapd.device.fuseexport import FuseExport

        return FuseExport(self._loop, fd, self._path, traffic=self._traffic, clock=self._clock, log=self._log)

    def _make_backing(self, *, replaces: bool) -> "Supervisor | Daemons | None":
        """Who answers the target's messages."""
        match self._config.route:
            case Route.RAW:
                return None
            case Route.EXTERNAL:
                from snapd.device.daemons import Daemons
                from snapd.dmuser.listener import ChannelListener

                listener = ChannelListener(self._target, socket.socket(fileno=self._descriptors["daemon_listener"]))
                return Daemons(self._loop, self._target, listener, self._log)
            case _:
                # A worker of a device host that died may still be there; its successor waits for its exit.
                # It may also be writing to the arena still, where the next requests are about to be put.
                if not fence.evict(self._descriptors["worker_fence"], EVICT_MS):
                    raise SnapdError(errno.ETIMEDOUT, f"the last host's worker lives on after {EVICT_MS} ms")
                return Supervisor(
                    self._loop, self._target, self._start_worker, self._clock, self._log, replaces=replaces
                )

    def _make_path(self) -> tuple[DataPath, Allocation]:
        config, given = self._config, self._descriptors
        store: FileStore | None = None
        routes: Routes
        if config.route is Route.EXTERNAL:
            routes, allocation = WholeRoute(is_local=False), Allocation(None)
        else:
            store = file_store(given["base"], "the base" if config.route is Route.SNAPSHOT else "the store")
            if config.route is Route.SNAPSHOT:
                extent_map, shared = _load_maps(config, given)
                routes, allocation = SnapshotRoutes(shared, extent_map.block_size), Allocation(store, extent_map)
            else:
                if store.size() < config.size_bytes:
                    raise SnapdError(
                        errno.EINVAL, f"a device of {config.size_bytes} bytes on a store of {store.size()}"
                    )
                routes, allocation = WholeRoute(is_local=config.route is Route.RAW), Allocation(store)
        path = DataPath(
            size_bytes=config.size_bytes,
            read_only=config.read_only,
            routes=routes,
            memory=map_arena(given["arena"]),
            shares_memory=config.route is not Route.EXTERNAL,
            target=None if config.route is Route.RAW else self._target,
            store=store,
            slow=SlowIo(self._loop),
        )
        return path, allocation

    def _given(self, *names: str) -> list[int]:
        return [fd for name in names if (fd := self._descriptors.get(name)) is not None]

    def _start_worker(self) -> tuple[Process, ArenaChannel]:
        given = self._descriptors
        names = ["arena", *(name for name in _WORKERS_SHARE if given.get(name) is not None)]
        arguments = ["--inherited", ",".join(["channel", *names, "fence"])]
        if self._config.read_only and self._config.route is Route.WORKER:
            arguments.append("--read-only")
        ours, theirs = socket.socketpair()
        try:
            fds = (theirs.fileno(), *(given[name] for name in names))
            child = Child.spawn_fenced("snapd.worker", arguments, fds, fence.path_of(given["worker_fence"]))
        except SnapdError:
            ours.close()
            raise
        finally:
            theirs.close()
        return child, ArenaChannel(self._target, ours)


def _load_maps(config: DeviceConfig, descriptors: Descriptors) -> tuple[ExtentMap, SharedMap]:
    extent_map = ExtentMap.load(descriptors["extent_map"])
    shared = SharedMap(descriptors["shared_map"])
    if shared.snapshot != uuid.UUID(config.snapshot):
        raise SnapdError(errno.EINVAL, f"shared map of snapshot {shared.snapshot}, not {config.snapshot}")
    image_bytes = extent_map.block_count * extent_map.block_size
    if shared.block_count != extent_map.block_count or config.size_bytes != image_bytes:
        raise SnapdError(
            errno.EINVAL,
            f"a device of {config.size_bytes} bytes over maps of {image_bytes} bytes and {shared.block_count} blocks",
        )
    return extent_map, shared

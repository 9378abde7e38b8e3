"""The daemon's side of one device host: start, adopt, restart, stop.

Invariant: a successor starts only after the predecessor's exit was seen (the fence also covers a predecessor that
another daemon started); it is handed the very same descriptors, so the same NBD URI answers again.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, DeviceConfig
from snapd.manager.paths import DevicePaths, device_id
from snapd.manager.process import ControlConnection, Process, Watch, evict
from snapd.manager.records import SnapshotRecord
from snapd.manager.resources import Listeners, Resources
from snapd.proc import control
from snapd.proc.deaths import DeathCount

_ADOPT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 5.0
_STATUS_TIMEOUT_S = 1.0


class DeviceHost:
    """A running (or restarting) device host and what it was given.

    `on_change` is called whenever what `show` would say has changed.
    """

    def __init__(
        self,
        record: SnapshotRecord,
        paths: DevicePaths,
        resources: Resources,
        listeners: Listeners,
        worker_fence_fd: int,
        on_change: Callable[[], None],
    ) -> None:
        self._config = DeviceConfig(device_id(record.uuid), record.uuid, record.new_size_bytes)
        self._paths = paths
        self._resources = resources
        self._listeners = listeners
        self._worker_fence_fd = worker_fence_fd
        self._on_change = on_change
        self._clock = SystemClock()
        self._deaths = DeathCount()
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.state = "RESTARTING"

    @classmethod
    async def start(
        cls, record: SnapshotRecord, paths: DevicePaths, resources: Resources, on_change: Callable[[], None]
    ) -> "DeviceHost":
        """Start a device host over `resources`; returns when it serves."""
        listeners = Listeners.create(paths)
        worker_fence_fd = os.open(paths.worker_fence, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        host = cls(record, paths, resources, listeners, worker_fence_fd, on_change)
        try:
            await host._spawn()
        except SnapdError:
            if host._process is not None:
                host._process.kill()
            await host.stop()
            raise
        host._supervise()
        return host

    @classmethod
    async def adopt(
        cls, record: SnapshotRecord, paths: DevicePaths, on_change: Callable[[], None]
    ) -> "tuple[DeviceHost, Resources] | None":
        """Take over the device host that a former daemon left behind; None when there is none, or it is stuck."""
        try:
            connection = control.connect(paths.control, _ADOPT_TIMEOUT_S)
        except OSError:
            return None
        link = ControlConnection(connection, lambda _: None)
        try:
            reply, fds = await link.call({"verb": "adopt"}, timeout_s=_ADOPT_TIMEOUT_S)
        except SnapdError:
            link.close()
            return None
        if len(fds) != len(Descriptors._fields) or reply["device"]["snapshot"] != record.uuid:
            link.close()
            for fd in fds:
                os.close(fd)
            return None
        given = Descriptors.from_message(fds)
        resources = Resources(given.cow, given.base, given.extent_map, given.shared_map, given.undo_directory)
        listeners = Listeners(
            nbd=socket.socket(fileno=given.nbd_listener), control=socket.socket(fileno=given.control_listener)
        )
        host = cls(record, paths, resources, listeners, given.worker_fence, on_change)
        pid = int(reply["pid"])
        # The connection is open, so the process that answered is alive and the pid is its own.
        host._process = Process(Watch(pid, os.pidfd_open(pid), child=False), link)
        host.state = "SERVING"
        host._supervise()
        return host, resources

    @property
    def nbd_uri(self) -> str:
        """Where clients connect."""
        return f"nbd+unix:///?socket={self._paths.nbd}"

    @property
    def pid(self) -> int:
        """Process id of the host; 0 while it is being replaced."""
        return self._process.pid if self._process is not None else 0

    @property
    def restarts(self) -> int:
        """How often the host has died under this daemon."""
        return self._deaths.total

    async def status(self) -> dict[str, Any]:
        """What the host says of itself; empty while it is being replaced."""
        if self._process is None:
            return {}
        try:
            reply, _ = await self._process.control.call({"verb": "status"}, timeout_s=_STATUS_TIMEOUT_S)
        except SnapdError:
            return {}
        return reply

    async def has_failed(self) -> bool:
        """Whether host or worker died so often that nobody answers any more."""
        return self.state == "FAILED" or (await self.status()).get("state") == "CRASH_LOOP"

    async def stop(self) -> None:
        """End the export: clients are cut off, the host and its worker exit, the sockets' names go."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._process is not None:
            await self._process.stop(_STOP_TIMEOUT_S)
            self._process = None
        self._listeners.close(self._paths)
        os.close(self._worker_fence_fd)

    def detach(self) -> None:
        """Leave the host running for the next daemon."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._process is not None:
            self._process.forget()

    async def _spawn(self) -> None:
        await asyncio.to_thread(evict_hosts, self._paths)
        self._process = await Process.spawn("snapd.device", [], [], self._paths.host_fence, lambda _: None)
        resources = self._resources
        given = Descriptors(
            cow=resources.cow_fd,
            base=resources.base_fd,
            extent_map=resources.extent_map_fd,
            shared_map=resources.shared_map_fd,
            undo_directory=resources.undo_fd,
            worker_fence=self._worker_fence_fd,
            nbd_listener=self._listeners.nbd.fileno(),
            control_listener=self._listeners.control.fileno(),
        )
        await self._process.control.call({"verb": "start", "device": self._config.to_dict()}, list(given))
        self.state = "SERVING"

    def _supervise(self) -> None:
        self._supervisor = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        while True:
            assert self._process is not None
            await self._process.exited()
            self._process.forget()
            self._process = None
            if self._deaths.is_crash_loop(self._clock.now_ms()):
                self.state = "FAILED"
                # Nobody will answer: better refused at connect than a client that waits for ever.
                self._listeners.close(self._paths)
                self._on_change()
                return
            self.state = "RESTARTING"
            self._on_change()
            try:
                await self._spawn()
            except SnapdError:
                if self._process is None:
                    self.state = "FAILED"
                    self._on_change()
                    return
                # It started and died, or hung, before it served: its exit is the next thing to be seen.
                self._process.kill()
                continue
            self._on_change()


def evict_hosts(paths: DevicePaths) -> None:
    """Kill a device host and a worker that nobody could adopt; returns when both are gone. Blocks."""
    for path in (paths.host_fence, paths.worker_fence):
        evict(path)

"""The daemon's side of one device host: start, adopt, restart, stop.

Invariant: a successor starts only after the predecessor's exit was seen (the fence also covers a predecessor that
another daemon started); it is handed the very same descriptors, so the same NBD URI answers again, and a loop device
goes on. A device that has FAILED hangs nobody: its sockets and its loop device are gone.
"""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, DeviceConfig, Route
from snapd.manager.devicereport import DeviceReport
from snapd.manager.hostfiles import HostFiles
from snapd.manager.loopdevice import LoopExport
from snapd.manager.paths import DevicePaths
from snapd.manager.process import ControlConnection, Process, Watch, evict
from snapd.manager.records import DeviceRecord, ExportKind, ExportRecord
from snapd.manager.states import DeviceState
from snapd.proc import control
from snapd.proc.deaths import DeathCount

_ADOPT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0
"""Longer than a device host drains."""
_STATS_TIMEOUT_S = 1.0
_STORES = ("base", "cow", "extent_map", "shared_map", "undo_directory")
_STATES = {"RUNNING": DeviceState.SERVING, "RESTARTING": DeviceState.RESTARTING}
"""What a host says of its worker; anything else is the end of it."""

_log = logging.getLogger("snapd.manager")


class DeviceHost:
    """A running (or restarting) device host and what it was given; `Device` for every export but DM.

    `stores` are borrowed descriptors, by the names of `snapd.device.config`. `on_change` is called whenever what
    `show` would say has changed.
    """

    def __init__(
        self,
        record: DeviceRecord,
        paths: DevicePaths,
        stores: Mapping[str, int],
        files: HostFiles,
        loop: LoopExport | None,
        on_change: Callable[[], None],
    ) -> None:
        self._record = record
        self._attach_timeout_ms = record.export.attach_timeout_ms
        self._paths = paths
        self._stores = stores
        self._files = files
        self._loop = loop
        self._on_change = on_change
        self._clock = SystemClock()
        self._deaths = DeathCount()
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._state = DeviceState.RESTARTING

    @classmethod
    async def start(
        cls, record: DeviceRecord, paths: DevicePaths, stores: Mapping[str, int], on_change: Callable[[], None]
    ) -> "DeviceHost":
        """Start a device host over `stores`; returns when it serves."""
        files = HostFiles.create(record, paths)
        host = cls(files.settle(record), paths, stores, files, None, on_change)
        try:
            await host._open()
        except SnapdError:
            files.close(paths)
            raise
        return host

    @classmethod
    async def adopt(
        cls, record: DeviceRecord, paths: DevicePaths, on_change: Callable[[], None]
    ) -> "tuple[DeviceHost, dict[str, int]] | None":
        """Take over the device host that a former daemon left behind; None when there is none, or it is stuck.

        With it come the descriptors of its stores, which are the caller's.
        """
        try:
            connection = control.connect(paths.control, _ADOPT_TIMEOUT_S)
        except OSError:
            return None
        link = ControlConnection(connection, lambda _: None)
        fds: list[int] = []
        try:
            reply, fds = await link.call({"verb": "adopt"}, timeout_s=_ADOPT_TIMEOUT_S)
            given = Descriptors.from_message(reply.get("descriptors"), fds)
            given.check(record.route)
            if DeviceConfig.from_dict(reply.get("device")).device != record.id:
                raise SnapdError(errno.EINVAL, f"the device host in {paths.directory} is not that of {record.id}")
            loop = await _adopt_loop(record, paths, given)
        except SnapdError:
            link.close()
            for fd in fds:
                os.close(fd)
            return None
        stores = {name: given[name] for name in _STORES if given.get(name) is not None}
        host = cls(record, paths, stores, HostFiles.adopt(given), loop, on_change)
        pid = int(reply["pid"])
        # The connection is open, so the process that answered is alive and the pid is its own.
        host._process = Process(Watch(pid, os.pidfd_open(pid), child=False), link)
        host._state = DeviceState.SERVING
        host._supervise()
        if record.route is not Route.RAW:
            # The former daemon may have ended between the record and the host.
            with contextlib.suppress(SnapdError):
                await host.set_attach_timeout(record.export.attach_timeout_ms)
        return host, stores

    @property
    def export(self) -> ExportRecord:
        """As it turned out, with the port that was free."""
        return self._record.export

    async def report(self) -> DeviceReport:
        """What the host says of itself, and what we know without it."""
        said = await self._ask()
        state = self._state
        if state is DeviceState.SERVING and said is not None:
            state = _STATES.get(str(said.get("state")), DeviceState.FAILED)
        return DeviceReport(
            state=state,
            nbd_uri=f"nbd+unix:///?socket={self._paths.nbd}",
            nbd_tcp_uri=f"nbd://{self.export.tcp_address}" if self.export.tcp_address else "",
            loop_path=self._loop.loop if self._loop is not None else "",
            daemon_socket=self._paths.daemon if self._record.route is Route.EXTERNAL else "",
            host_pid=self._process.pid if self._process is not None else 0,
            worker_pid=int((said or {}).get("worker_pid") or 0),
            worker_restarts=int((said or {}).get("worker_restarts", 0)),
            host_restarts=self._deaths.total,
            attach_state=str((said or {}).get("attach_state") or "none"),
            counters=said,
        )

    async def set_attach_timeout(self, timeout_ms: int) -> None:
        """At once, and for every host to come; EOPNOTSUPP for a device without a target."""
        if self._record.route is Route.RAW:
            raise SnapdError(errno.EOPNOTSUPP, f"device {self._record.id} has no daemon to attach: its route is raw")
        self._attach_timeout_ms = timeout_ms
        if self._process is not None:
            await self._process.control.call({"verb": "set", "attach_timeout_ms": timeout_ms})

    async def renew(self) -> None:
        """Start a host anew, at the same places, after one host or worker too many has died.

        A loop device that is there still, since only the worker has died, goes on.
        """
        await self._leave()
        if self._loop is not None and self._loop.fuse_fd is None:
            await self._drop_loop()
        self._files.close(self._paths)
        self._files = HostFiles.create(self._record, self._paths)
        self._deaths = DeathCount()
        try:
            await self._open()
        except SnapdError:
            await self._fail()
            raise

    async def stop(self) -> None:
        """End the export: the host finishes what is in flight, it and its worker exit, the sockets' names go.

        EBUSY, with nothing changed, as long as somebody uses the loop device.
        """
        if self._loop is not None and self._state is not DeviceState.FAILED:
            await self._loop.detach()
            self._loop = None
        await self._leave()
        await self._drop_loop()
        self._files.close(self._paths)

    def detach(self) -> None:
        """Leave the host running for the next daemon."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._process is not None:
            self._process.forget()
        if self._loop is not None:
            self._loop.close()

    async def _open(self) -> None:
        """Spawn, and have what the export needs around it; nothing is left of it after an error."""
        try:
            if self._record.export.kind is ExportKind.LOOP and self._loop is None:
                self._loop = await LoopExport.open(self._paths.directory, read_only=self._record.read_only)
            await self._spawn()
            if self._loop is not None and not self._loop.loop:
                await self._loop.attach()
        except SnapdError:
            if self._process is not None:
                self._process.kill()
            await self._leave()
            await self._drop_loop()
            raise
        self._supervise()

    async def _drop_loop(self) -> None:
        if self._loop is not None:
            # Without the last copy the kernel fails everything at once, so that nothing below waits.
            self._loop.close()
            try:
                await self._loop.abandon()
            except SnapdError as error:
                _log.error("the loop device of %s is left behind: %s", self._record.id, error)
            self._loop = None

    async def _leave(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        if self._process is not None:
            await self._process.stop(_STOP_TIMEOUT_S)
            self._process = None

    async def _ask(self) -> dict[str, Any] | None:
        if self._process is None:
            return None
        try:
            reply, _ = await self._process.control.call({"verb": "stats"}, timeout_s=_STATS_TIMEOUT_S)
        except SnapdError:
            return None
        return reply

    async def _spawn(self) -> None:
        await asyncio.to_thread(evict_hosts, self._paths)
        self._process = await Process.spawn("snapd.device", [], [], self._paths.host_fence, lambda _: None)
        given = {**self._stores, **self._files.descriptors()}
        if self._loop is not None and self._loop.fuse_fd is not None:
            given["fuse"] = self._loop.fuse_fd
        start = {"verb": "start", "device": self._config().to_dict(), "descriptors": list(given)}
        await self._process.control.call(start, list(given.values()))
        self._state = DeviceState.SERVING

    def _config(self) -> DeviceConfig:
        record = self._record
        return DeviceConfig(
            device=record.id,
            route=record.route,
            size_bytes=record.size_bytes,
            read_only=record.read_only,
            snapshot=record.uuid if record.route is Route.SNAPSHOT else "",
            policy=record.export.policy,
            attach_timeout_ms=self._attach_timeout_ms,
        )

    def _supervise(self) -> None:
        self._supervisor = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        while True:
            assert self._process is not None
            await self._process.exited()
            self._process.forget()
            self._process = None
            in_loop = self._deaths.is_crash_loop(self._clock.now_ms())
            # Without the kernel's help a mount dies with its server.
            lost = self._loop is not None and self._loop.fuse_fd is None
            if in_loop or lost:
                return await self._fail()
            self._state = DeviceState.RESTARTING
            self._on_change()
            try:
                await self._spawn()
            except SnapdError as error:
                _log.error("device %s: %s", self._record.id, error)
                if self._process is None:
                    return await self._fail()
                # It started and died, or hung, before it served: its exit is the next thing to be seen.
                self._process.kill()
                continue
            self._on_change()

    async def _fail(self) -> None:
        self._state = DeviceState.FAILED
        self._on_change()
        # Nobody will answer: better refused at connect than a client that waits for ever.
        self._files.hang_up(self._paths)
        await self._drop_loop()


async def _adopt_loop(record: DeviceRecord, paths: DevicePaths, given: Descriptors) -> LoopExport | None:
    if record.export.kind is not ExportKind.LOOP:
        return None
    fuse_fd = given.get("fuse")
    # A copy, since what is not adopted closes it.
    loop = None if fuse_fd is None else await LoopExport.adopt(paths.directory, os.dup(fuse_fd))
    if fuse_fd is None or loop is None:
        raise SnapdError(errno.ENODEV, f"the device host in {paths.directory} has lost its loop device")
    os.close(fuse_fd)
    return loop


def evict_hosts(paths: DevicePaths) -> None:
    """Kill a device host and workers that nobody could adopt; returns when all are gone. Blocks."""
    for path in (paths.host_fence, paths.worker_fence, paths.standby_fence):
        evict(path)

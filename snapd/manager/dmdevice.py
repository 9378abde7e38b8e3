"""A device of the kernel's own dm-user: no device host, one worker on the node of its target.

Invariant: a table is only ever changed by load, attach, suspend, resume (SNAP-267): no request meets a target that
nobody has attached to, and the old worker serves until the swap has returned. Each target has a fresh node name
(DMU-162).

| step of a swap | written before it | a crash after it leaves | the next daemon |
| --- | --- | --- | --- |
| 1 `load` the table of the new node | `next_node` | two tables, the old one serves | ends the new worker, `clear`s |
| 2 start a worker on the new node | `is_loaded` | the same | the same |
| 3 `suspend` | – | the same, requests wait | the same |
| 4 `resume` | – | the new table serves, the old node is gone | keeps the new worker |
| 5 wait for the end of the old worker | the new node | the same | ends the old worker |

A planned replacement of the worker is steps 2 and 5 on one node: the new worker has it open before the old one drains,
or the target would take the daemon for dead, for good (DMU-171, DMU-189).
"""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace

import snapd
from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager.devicereport import DeviceReport
from snapd.manager.dmsetup import DmSettings, DmSetup
from snapd.manager.dmstate import DmState, fence_path, read_state, write_state
from snapd.manager.dmworker import DmWorker
from snapd.manager.paths import DevicePaths, device_id
from snapd.manager.process import evict
from snapd.manager.records import DeviceRecord, ExportRecord
from snapd.manager.states import DeviceState
from snapd.proc.deaths import DeathCount

_log = logging.getLogger("snapd.manager")

STORES = {
    Route.SNAPSHOT: ["base", "cow", "extent_map", "shared_map", "undo_directory"],
    Route.WORKER: ["base"],
}
"""What the worker of a route is given; the other routes need a device host."""


class DmDevice:
    """A device of device-mapper and its worker; `stores` are borrowed descriptors."""

    def __init__(
        self,
        record: DeviceRecord,
        paths: DevicePaths,
        stores: Mapping[str, int],
        settings: DmSettings,
        state: DmState,
        on_change: Callable[[], None],
    ) -> None:
        self._record = record
        self._paths = paths
        self._stores = stores
        self._settings = settings
        self._dmsetup = DmSetup(settings)
        self._dm = state
        self._on_change = on_change
        self._clock = SystemClock()
        self._deaths = DeathCount()
        self._worker: DmWorker | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._state = DeviceState.RESTARTING

    @classmethod
    async def start(
        cls,
        record: DeviceRecord,
        paths: DevicePaths,
        stores: Mapping[str, int],
        settings: DmSettings,
        on_change: Callable[[], None],
    ) -> "DmDevice":
        """Make the device and its worker; returns when it serves.

        A device that a former daemon left behind may be mounted, so it is not made anew: it gets a new target.
        """
        state, dmsetup = read_state(paths), DmSetup(settings)
        if state is not None and state.node and await dmsetup.exists(state.name):
            state = await _settle(state, paths, settings, dmsetup)
            await asyncio.to_thread(evict, fence_path(paths, state.place))
            device = cls(record, paths, stores, settings, state, on_change)
            await device.renew()
            return device
        await discard(paths, settings)
        device = cls(record, paths, stores, settings, DmState(name_of(record)), on_change)
        write_state(paths, device._dm)
        try:
            await dmsetup.create(device._dm.name)
            await device.renew()
        except SnapdError:
            await discard(paths, settings)
            raise
        return device

    @classmethod
    async def adopt(
        cls, record: DeviceRecord, paths: DevicePaths, settings: DmSettings, on_change: Callable[[], None]
    ) -> "tuple[DmDevice, dict[str, int]] | None":
        """Take over the device of a former daemon with its worker, and the stores that this holds; None without one.

        A device whose worker died meanwhile is not adopted: nobody holds the locks of its stores any more, so they must
        be opened and looked at anew.
        """
        state, dmsetup = read_state(paths), DmSetup(settings)
        # The file may outlive a boot, the device does not.
        if state is None or not state.node or not await dmsetup.exists(state.name):
            return None
        state = await _settle(state, paths, settings, dmsetup)
        worker = DmWorker.find(fence_path(paths, state.place), settings.node_path(state.node))
        if worker is None:
            return None
        stores: dict[str, int] = {}
        try:
            stores = worker.take_stores(STORES[record.route])
        except SnapdError as error:
            _log.error("device %s is not adopted: %s", record.id, error)
            worker.detach()
            return None
        device = cls(record, paths, stores, settings, state, on_change)
        device._serve_by(worker)
        if state.version != snapd.__version__:
            try:
                await device.replace_worker()
            except SnapdError as error:
                _log.error("device %s keeps the worker of version %s: %s", record.id, state.version, error)
        return device, stores

    @property
    def export(self) -> ExportRecord:
        """As it was asked for."""
        return self._record.export

    async def report(self) -> DeviceReport:
        """What we know; the kernel does not count for us."""
        serves = self._state is DeviceState.SERVING
        return DeviceReport(
            state=self._state,
            dm_path=os.path.join(self._settings.mapper_directory, self._dm.name),
            worker_pid=self._worker.pid if self._worker is not None else 0,
            worker_restarts=self._deaths.total,
            attach_state="attached" if serves else "terminated",
        )

    async def set_attach_timeout(self, _timeout_ms: int) -> None:
        """EOPNOTSUPP: it is one for all devices, a parameter of the kernel's module."""
        raise SnapdError(
            errno.EOPNOTSUPP,
            f"device {self._record.id} is the kernel's: its attach timeout is the module parameter"
            " dm_user_daemon_timeout_msec",
        )

    async def renew(self) -> None:
        """Serve from a new target on a new node (the swap above); clients notice a pause at most.

        Only this brings a device back whose worker is gone: its target fails every request at once, for good, as
        soon as it is without one (DMU-171).
        """
        await self._leave()
        old = self._worker
        node = f"{self._dm.name}-{secrets.token_hex(4)}"
        self._write(replace(self._dm, next_node=node))
        worker: DmWorker | None = None
        try:
            await self._dmsetup.load(self._dm.name, self._record.size_bytes, node, read_only=self._record.read_only)
            self._write(replace(self._dm, is_loaded=True))
            worker = await self._start_worker(node, 1 - self._dm.place, is_new=True)
            if self._dm.node:
                await self._dmsetup.suspend(self._dm.name)
            await self._dmsetup.resume(self._dm.name)
        except SnapdError:
            if worker is not None:
                await worker.kill()
            await self._abandon_swap()
            if old is not None:
                self._serve_by(old)
            raise
        self._write(self._dm.taken_over(snapd.__version__))
        self._deaths = DeathCount()
        self._serve_by(worker)
        if old is not None:
            await old.ended()

    async def replace_worker(self) -> None:
        """Have a new worker serve the node, and then end the old one: no request fails (DMU-189)."""
        await self._leave()
        old = self._worker
        self._write(replace(self._dm, next_node=self._dm.node))
        try:
            worker = await self._start_worker(self._dm.node, 1 - self._dm.place)
        except SnapdError:
            self._write(self._dm.given_up())
            if old is not None:
                self._serve_by(old)
            raise
        self._write(self._dm.taken_over(snapd.__version__))
        self._serve_by(worker)
        if old is not None:
            await old.drain()

    async def stop(self) -> None:
        """Remove the device; EBUSY, with nothing changed, as long as somebody has it open (DMU-174)."""
        await self._leave()
        try:
            if await self._dmsetup.exists(self._dm.name):
                await self._dmsetup.remove(self._dm.name)
        except SnapdError:
            if self._worker is not None:
                self._serve_by(self._worker)
            raise
        if self._worker is not None:
            await self._worker.ended()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._paths.dm_state)

    def detach(self) -> None:
        """Leave device and worker for the next daemon."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._worker is not None:
            self._worker.detach()

    async def _start_worker(self, node: str, place: int, *, is_new: bool = False) -> DmWorker:
        return await DmWorker.start(
            self._settings.node_path(node),
            self._stores,
            fence_path(self._paths, place),
            read_only=self._record.read_only,
            is_new=is_new,
        )

    def _write(self, state: DmState) -> None:
        write_state(self._paths, state)
        self._dm = state

    def _serve_by(self, worker: DmWorker) -> None:
        self._worker = worker
        self._state = DeviceState.SERVING
        self._supervisor = asyncio.get_running_loop().create_task(self._keep_alive())
        self._on_change()

    async def _leave(self) -> None:
        """Stop watching over the worker: its end is no death from now on."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None

    async def _abandon_swap(self) -> None:
        try:
            await self._dmsetup.clear(self._dm.name)
            if self._dm.node:
                await self._dmsetup.resume(self._dm.name)
        except SnapdError as error:
            _log.error("device %s: %s", self._record.id, error)
        self._write(self._dm.given_up())

    async def _keep_alive(self) -> None:
        while self._worker is not None:
            await self._worker.exited()
            self._worker = None
            in_loop = self._deaths.is_crash_loop(self._clock.now_ms())
            if in_loop or self._record.export.policy is Policy.FAIL_FAST:
                self._state = DeviceState.FAILED
                self._on_change()
                return
            self._state = DeviceState.RESTARTING
            self._on_change()
            while self._worker is None:
                try:
                    self._worker = await self._start_worker(self._dm.node, self._dm.place)
                except SnapdError as error:
                    _log.error("device %s: %s", self._record.id, error)
                    if self._deaths.is_crash_loop(self._clock.now_ms()):
                        self._state = DeviceState.FAILED
                        self._on_change()
                        return
            self._write(replace(self._dm, version=snapd.__version__))
            self._state = DeviceState.SERVING
            self._on_change()


def name_of(record: DeviceRecord) -> str:
    """The name in device-mapper: short, and the same for every daemon."""
    return f"ota-snapd-{device_id(record.uuid)}"


async def discard(paths: DevicePaths, settings: DmSettings) -> None:
    """Remove a former daemon's device that is not taken over, and end its workers; EBUSY when it is in use."""
    state, dmsetup = read_state(paths), DmSetup(settings)
    for place in (0, 1):
        await asyncio.to_thread(evict, fence_path(paths, place))
    if state is None:
        return
    if await dmsetup.exists(state.name):
        await dmsetup.remove(state.name)
    os.unlink(paths.dm_state)


async def _settle(state: DmState, paths: DevicePaths, settings: DmSettings, dmsetup: DmSetup) -> DmState:
    """Finish, or take back, what a former daemon was doing when it ended; then at most one worker is left."""
    if state.next_node:
        if state.next_node == state.node:
            replacement = DmWorker.find(fence_path(paths, 1 - state.place), settings.node_path(state.node))
            done = replacement is not None
            if replacement is not None:
                replacement.detach()
        else:
            done = state.is_loaded and not await dmsetup.has_inactive_table(state.name)
        if done:
            state = state.taken_over(snapd.__version__)
        else:
            await asyncio.to_thread(evict, fence_path(paths, 1 - state.place))
            if state.next_node != state.node:
                with contextlib.suppress(SnapdError):
                    await dmsetup.clear(state.name)
                await dmsetup.resume(state.name)
            state = state.given_up()
        write_state(paths, state)
    await asyncio.to_thread(evict, fence_path(paths, 1 - state.place))
    return state

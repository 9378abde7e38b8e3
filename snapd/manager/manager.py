"""The verbs of the service: every transition of an update, and the recovery that picks up after a crash at any point.

Invariant: a transition is durable before anybody sees it, and before the processes it calls for are started; so at the
next start the records say what must run, and `_recover` makes it so. The order of one transition:

| step | action | a crash after it leaves | next start |
| --- | --- | --- | --- |
| 1 | check; open and lock the files; claim the COWs of a merge | maybe our claim | nothing: it is ours |
| 2 | write the records, one transaction | the intention | the processes are started |
| 3 | start or stop processes | the same | adopted, or started, or stopped |
| 4 | tell watchers | – | – |

Mapping swaps 2 and 3 (a device nobody was told of is stopped at the next start). Unmapping a device that the kernel
does not let go of takes the record back.
"""

import asyncio
import errno
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

from snapd.block.errors import SnapdError
from snapd.cow import claim
from snapd.device.config import Route
from snapd.manager.backends import BackEnds, ExportRequest
from snapd.manager.catalog import Catalog
from snapd.manager.confirm import release_undo
from snapd.manager.devices import Devices
from snapd.manager.dmsetup import DmSettings
from snapd.manager.merges import Merges, failed
from snapd.manager.records import SnapshotRecord, UpdateRecord, check_id
from snapd.manager.registry import Registry
from snapd.manager.resources import inspect
from snapd.manager.states import ReadBack, SnapshotState, UpdateState, check_transition
from snapd.manager.status import SnapshotStatus, UpdateStatus
from snapd.manager.storedevices import StoreDevices

_MAX_UPDATES = 1000
_MAX_SNAPSHOTS = 64

_log = logging.getLogger("snapd.manager")


class Manager:
    """Updates by id, snapshots by update and id. All methods run on one event loop; errors are `SnapdError`."""

    def __init__(self, registry: Registry, back_ends: BackEnds) -> None:
        self._registry = registry
        self._back_ends = back_ends
        self._devices = Devices(registry, back_ends)
        self._merges = Merges(registry)
        self.store_devices = StoreDevices(registry, back_ends)
        self.catalog = Catalog(registry, self.store_devices)

    @classmethod
    async def open(cls, state_directory: str, dm: DmSettings | None = None) -> "Manager":
        """Take the state directory and bring everything it records back to life; EBUSY when a daemon serves it."""
        manager = cls(await Registry.open(state_directory), await BackEnds.probe(dm or DmSettings()))
        registry = manager._registry
        await manager.store_devices.sweep()
        await asyncio.gather(
            *(manager._recover(update.id) for update in registry.updates()),
            *(manager.store_devices.recover(device) for device in registry.devices()),
        )
        manager._merges.start_waiting()
        return manager

    async def close(self) -> None:
        """Give up control: mergers stop at their next span, device hosts go on for the next daemon."""
        self.stop_watching()
        await self._merges.stop()
        for runtime in self._registry.runtimes():
            if runtime.device is not None:
                runtime.device.detach()
        self.store_devices.detach()
        await self._registry.close()

    async def create_update(self, update_id: str) -> UpdateStatus:
        """A new, empty update; EALREADY when the id is taken."""
        check_id("update", update_id)
        async with self._registry.creation:
            if update_id in self._registry:
                raise SnapdError(errno.EALREADY, f"update {update_id} exists")
            if len(self._registry) >= _MAX_UPDATES:
                raise SnapdError(errno.ENOSPC, f"there are {_MAX_UPDATES} updates already")
            await self._registry.commit(UpdateRecord(update_id, UpdateState.CREATED, time.time_ns() // 1_000_000))
        return await self.update_status(update_id)

    async def create_snapshot(self, update_id: str, snapshot_id: str, base_path: str, cow_path: str) -> SnapshotStatus:
        """Add a snapshot; base and COW are checked against each other and nothing is written to them.

        Errors: EINVAL for ids, paths that are not absolute, sizes; EALREADY for a taken id; EBUSY when the update is no
        longer CREATED, a file is in use or the base is the new image already; EBADMSG for a damaged COW.
        """
        check_id("snapshot", snapshot_id)
        for what, path in (("base", base_path), ("COW", cow_path)):
            if not os.path.isabs(path):
                raise SnapdError(errno.EINVAL, f"{what} path {path!r} is not absolute")
        async with self._registry.lock(update_id):
            update = self._registry.update(update_id)
            if any(s.id == snapshot_id for s in update.snapshots):
                raise SnapdError(errno.EALREADY, f"snapshot {update_id}/{snapshot_id} exists")
            if update.state is not UpdateState.CREATED:
                raise SnapdError(errno.EBUSY, f"update {update_id} is {update.state}: no more snapshots can be added")
            if len(update.snapshots) >= _MAX_SNAPSHOTS:
                raise SnapdError(errno.ENOSPC, f"update {update_id} has {_MAX_SNAPSHOTS} snapshots already")
            found = await asyncio.to_thread(inspect, base_path, cow_path)
            record = SnapshotRecord(
                id=snapshot_id,
                uuid=str(uuid.uuid4()),
                state=SnapshotState.READY,
                base_path=base_path,
                cow_path=cow_path,
                old_size_bytes=found.old_size_bytes,
                new_size_bytes=found.new_size_bytes,
                changed_bytes=found.changed_bytes,
            )
            await self._registry.commit(replace(update, snapshots=(*update.snapshots, record)))
        return await self.snapshot_status(update_id, snapshot_id)

    async def map_snapshot(
        self, update_id: str, snapshot_id: str, request: ExportRequest | None = None
    ) -> SnapshotStatus:
        """Export the new image; returns when the device serves. A device that has failed is started anew.

        Errors: those of `BackEnds.settle`; EBUSY when it is mapped already, with other settings.
        """
        request = request or ExportRequest()
        async with self._registry.lock(update_id):
            update = self._registry.update(update_id)
            record = update.snapshot(snapshot_id)
            if not record.mapped:
                record = replace(record, export=self._back_ends.settle(request, Route.SNAPSHOT))
            elif not request.is_met_by(record.export):
                raise SnapdError(
                    errno.EBUSY, f"snapshot {update_id}/{snapshot_id} is mapped with other settings: unmap it first"
                )
            export = await self._devices.start(update_id, record)
            if not record.mapped:
                try:
                    sealed = UpdateState.SEALED if update.state is UpdateState.CREATED else update.state
                    mapped = replace(update, state=sealed).with_snapshot(snapshot_id, mapped=True, export=export)
                    await self._registry.commit(mapped)
                except SnapdError:
                    await self._devices.stop(record)
                    raise
        return await self.snapshot_status(update_id, snapshot_id)

    async def unmap_snapshot(self, update_id: str, snapshot_id: str) -> SnapshotStatus:
        """Take the export away; a merge goes on. EBUSY while the kernel says that the device is in use."""
        async with self._registry.lock(update_id):
            mapped = self._registry.update(update_id)
            update = mapped.with_snapshot(snapshot_id, mapped=False)
            if mapped.snapshot(snapshot_id).mapped:
                await self._registry.commit(update)
            try:
                await self._devices.stop(update.snapshot(snapshot_id))
            except SnapdError:
                if mapped.snapshot(snapshot_id).mapped:
                    await self._registry.commit(mapped)
                raise
        return await self.snapshot_status(update_id, snapshot_id)

    async def start_merge(self, update_id: str) -> UpdateStatus:
        """Merge every snapshot in the background; one that runs or has ended is left as it is."""
        async with self._registry.lock(update_id):
            update = self._registry.update(update_id)
            if update.state not in (UpdateState.MERGING, UpdateState.MERGED):
                check_transition(update_id, update.state, UpdateState.MERGING)
                if not update.snapshots:
                    raise SnapdError(errno.EBUSY, f"update {update_id} has no snapshots to merge")
                try:
                    await self._begin_merge(update)
                except SnapdError:
                    for snapshot in update.snapshots:
                        self._devices.release(snapshot)
                    raise
                self._merges.start_waiting()
        return await self.update_status(update_id)

    async def _begin_merge(self, update: UpdateRecord) -> None:
        """Steps 1 and 2 of a merge."""
        for snapshot in update.snapshots:
            await self._devices.open(snapshot)
            undo = self._registry.paths.undo(snapshot.uuid)
            await asyncio.to_thread(claim.claim, snapshot.cow_path, uuid.UUID(snapshot.uuid), undo)
        for snapshot in update.snapshots:
            if snapshot.state in (SnapshotState.READY, SnapshotState.FAILED):
                update = update.with_snapshot(snapshot.id, state=SnapshotState.MERGING, failure="")
        await self._registry.commit(replace(update, state=UpdateState.MERGING, failure=""))

    async def confirm_update(self, update_id: str) -> UpdateStatus:
        """Give up the way back (UNDO-9, UNDO-10); EBUSY unless every merge has ended and its read-back matched."""
        async with self._registry.lock(update_id):
            update = self._registry.update(update_id)
            check_transition(update_id, update.state, UpdateState.CONFIRMED)
            for snapshot in update.snapshots:
                if snapshot.read_back is not ReadBack.OK:
                    raise SnapdError(
                        errno.EBUSY, f"the read-back of {update_id}/{snapshot.id} is {snapshot.read_back}, not OK"
                    )
            # One transaction decides for all snapshots; what follows is repeated by the next start if it is cut.
            update = replace(update, state=UpdateState.CONFIRMED)
            for snapshot in update.snapshots:
                update = update.with_snapshot(snapshot.id, state=SnapshotState.CONFIRMED)
            await self._registry.commit(update)
            for snapshot in update.snapshots:
                await self._clean_up(snapshot)
        return await self.update_status(update_id)

    async def update_status(self, update_id: str) -> UpdateStatus:
        """The update as it is now; ENODEV when there is none."""
        update = self._registry.update(update_id)
        snapshots = await asyncio.gather(*(self._snapshot_status(update_id, s) for s in update.snapshots))
        return UpdateStatus(update, tuple(snapshots))

    async def snapshot_status(self, update_id: str, snapshot_id: str) -> SnapshotStatus:
        """The snapshot as it is now; ENODEV when there is none."""
        return await self._snapshot_status(update_id, self._registry.update(update_id).snapshot(snapshot_id))

    async def watch(self, update_id: str) -> AsyncIterator[UpdateStatus]:
        """The update as it is now, then after each change; a slow watcher sees the latest, not every one."""
        async for _ in self._registry.watch(update_id):
            yield await self.update_status(update_id)

    def stop_watching(self) -> None:
        """End every `watch`: the daemon is about to stop."""
        self._registry.stop_watching()

    async def _snapshot_status(self, update_id: str, record: SnapshotRecord) -> SnapshotStatus:
        return await self._registry.runtime(record).status(update_id, record, self._registry.paths)

    async def _clean_up(self, record: SnapshotRecord) -> None:
        """After the decision to confirm: give up the way back; any part of it may be repeated."""
        try:
            resources = await self._devices.open(record)
            await asyncio.to_thread(release_undo, record, resources, self._registry.paths.undo(record.uuid))
        except SnapdError as error:
            _log.error(
                "the undo store of %s could not be removed, the next start tries again: %s", record.cow_path, error
            )
        self._devices.release(record)

    async def _recover(self, update_id: str) -> None:
        """Make what runs for one update what its records say."""
        async with self._registry.lock(update_id):
            for snapshot in self._registry.update(update_id).snapshots:
                try:
                    await self._devices.recover(update_id, snapshot)
                    if snapshot.state is SnapshotState.CONFIRMED and self._registry.paths.undo(snapshot.uuid).exists():
                        await self._clean_up(snapshot)
                except SnapdError as error:
                    _log.error("%s/%s cannot be taken up again: %s", update_id, snapshot.id, error)
                    if snapshot.state is SnapshotState.MERGING:
                        await self._registry.commit(failed(self._registry.update(update_id), snapshot.id, error))

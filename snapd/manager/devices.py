"""The devices of mapped snapshots, and the descriptors that devices and mergers share.

Invariant: base and COW of a snapshot are open, and so locked, as long as it has a device, and from the start of its
merge until it is confirmed (UNDO-28).
"""

import asyncio
import logging

from snapd.block.errors import SnapdError
from snapd.manager.backends import BackEnds
from snapd.manager.dmdevice import discard
from snapd.manager.launch import adopt_device, start_device
from snapd.manager.process import evict
from snapd.manager.records import ExportRecord, SnapshotRecord
from snapd.manager.registry import Registry
from snapd.manager.resources import Resources
from snapd.manager.states import DeviceState, SnapshotState

_NEEDS_LOCKS = (SnapshotState.MERGING, SnapshotState.MERGED, SnapshotState.FAILED)

_log = logging.getLogger("snapd.manager")


class Devices:
    """Starts, adopts and stops the devices of snapshots; callers hold the update's lock."""

    def __init__(self, registry: Registry, back_ends: BackEnds) -> None:
        self._registry = registry
        self._back_ends = back_ends

    async def open(self, record: SnapshotRecord) -> Resources:
        """The snapshot's descriptors, opened and locked unless they are."""
        runtime = self._registry.runtime(record)
        if runtime.resources is None:
            runtime.resources = await asyncio.to_thread(Resources.open, record, self._registry.paths)
        return runtime.resources

    def release(self, record: SnapshotRecord) -> None:
        """Give up the locks, unless a device, a merge or an undo store still needs them."""
        runtime = self._registry.runtime(record)
        if runtime.device is not None or record.state in _NEEDS_LOCKS:
            return
        if runtime.resources is not None:
            runtime.resources.close()
            runtime.resources = None
        self._registry.paths.device(record.uuid).remove()

    async def start(self, update_id: str, record: SnapshotRecord) -> ExportRecord:
        """Have a device that serves; one that has failed serves again. Returns the export as it turned out."""
        runtime = self._registry.runtime(record)
        if runtime.device is not None:
            if (await runtime.device.report()).state is DeviceState.FAILED:
                await runtime.device.renew()
            return runtime.device.export
        resources = await self.open(record)
        try:
            runtime.device = await start_device(
                record.device(update_id),
                self._registry.paths.device(record.uuid),
                resources.stores(),
                self._back_ends,
                lambda: self._registry.notify(update_id),
            )
        except SnapdError:
            self.release(record)
            raise
        return runtime.device.export

    async def stop(self, record: SnapshotRecord) -> None:
        """Have no device; EBUSY, with nothing changed, when the kernel says that it is in use."""
        runtime = self._registry.runtime(record)
        if runtime.device is not None:
            await runtime.device.stop()
            runtime.device = None
        self.release(record)

    async def recover(self, update_id: str, record: SnapshotRecord) -> None:
        """After a restart: what a former daemon left running is adopted or gone, and what must be open is open."""
        runtime = self._registry.runtime(record)
        paths = self._registry.paths.device(record.uuid)
        await asyncio.to_thread(evict, paths.merger_fence)
        adopted = await adopt_device(
            record.device(update_id), paths, self._back_ends, lambda: self._registry.notify(update_id)
        )
        if adopted is not None:
            runtime.device, stores = adopted
            runtime.resources = Resources.adopt(stores)
            _log.info("adopted the device of %s/%s", update_id, record.id)
        if record.state in _NEEDS_LOCKS:
            await self.open(record)
        if record.mapped:
            await self.start(update_id, record)
        else:
            if adopted is None:
                await discard(paths, self._back_ends.dm)
            await self.stop(record)

"""Every device by its id, those of snapshots and those of stores alike: looked at, measured, and changed."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from snapd.block.errors import SnapdError
from snapd.manager.devicereport import FAILED, Device, DeviceReport
from snapd.manager.iostats import Counters, IoStats, io_stats
from snapd.manager.records import DeviceRecord, ExportRecord
from snapd.manager.registry import Registry
from snapd.manager.status import DeviceStatus
from snapd.manager.storedevices import StoreDevices

MIN_INTERVAL_MS = 100
MAX_INTERVAL_MS = 60_000
DEFAULT_INTERVAL_MS = 1000
MAX_ATTACH_TIMEOUT_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What one device did; `io` is None while nobody counts."""

    record: DeviceRecord
    report: DeviceReport
    io: IoStats | None


class Catalog:
    """The devices that are recorded, whether they run or not. All methods run on one event loop."""

    def __init__(self, registry: Registry, store_devices: StoreDevices) -> None:
        self._registry = registry
        self._store_devices = store_devices

    async def all(self) -> list[DeviceStatus]:
        """All of them, in the order of their ids."""
        return list(await asyncio.gather(*(_status(*found) for found in self._found())))

    async def get(self, device_id: str) -> DeviceStatus:
        """One; ENODEV when there is none."""
        return await _status(*self._find(device_id))

    async def stats(self, device_id: str) -> DeviceStats:
        """What it did since the start of its host; ENODEV when there is none."""
        return _stats(await self.get(device_id), None)

    async def watch(self, device_id: str | None, interval_ms: int) -> AsyncIterator[list[DeviceStats]]:
        """What one device, or every one, did between two ticks; EINVAL for the interval, ENODEV when it goes away."""
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise SnapdError(
                errno.EINVAL, f"interval of {interval_ms} ms: from {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS} ms"
            )
        seen: dict[str, Counters] = {}
        is_first = True
        while True:
            statuses = await self.all() if device_id is None else [await self.get(device_id)]
            ticked = [_stats(status, seen.get(status.record.id)) for status in statuses]
            seen = {tick.record.id: tick.io.counters for tick in ticked if tick.io is not None}
            if not is_first:
                yield ticked
            is_first = False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._registry.closing.wait(), interval_ms / 1000)
                return

    async def set_attach_timeout(self, device_id: str, timeout_ms: int) -> None:
        """At once and for good.

        Errors: EINVAL for the value, ENODEV, ENOTCONN for a device that could not be started, EOPNOTSUPP for one that
        has no such timeout of its own.
        """
        if not 0 <= timeout_ms <= MAX_ATTACH_TIMEOUT_MS:
            raise SnapdError(errno.EINVAL, f"attach timeout of {timeout_ms} ms: from 0 to {MAX_ATTACH_TIMEOUT_MS} ms")
        snapshot = self._find(device_id)[0].snapshot
        lock = self._registry.device_lock(device_id) if snapshot is None else self._registry.lock(snapshot[0])
        async with lock:
            record, device = self._find(device_id)
            if device is None:
                raise SnapdError(errno.ENOTCONN, f"device {device_id} does not run")
            await device.set_attach_timeout(timeout_ms)
            try:
                await self._commit(record, replace(record.export, attach_timeout_ms=timeout_ms))
            except SnapdError:
                await device.set_attach_timeout(record.export.attach_timeout_ms)
                raise

    async def delete(self, device_id: str) -> None:
        """End the device of a store; errors as `StoreDevices.delete`, and EBUSY for the device of a snapshot."""
        snapshot = self._find(device_id)[0].snapshot
        if snapshot is not None:
            raise SnapdError(errno.EBUSY, f"device {device_id} belongs to snapshot {'/'.join(snapshot)}: unmap that")
        await self._store_devices.delete(device_id)

    def _found(self) -> list[tuple[DeviceRecord, Device | None]]:
        found = [(record, self._store_devices.running(record.id)) for record in self._registry.devices()]
        for update in self._registry.updates():
            found += [
                (snapshot.device(update.id), self._registry.runtime(snapshot).device)
                for snapshot in update.snapshots
                if snapshot.mapped
            ]
        return sorted(found, key=lambda pair: pair[0].id)

    def _find(self, device_id: str) -> tuple[DeviceRecord, Device | None]:
        for record, device in self._found():
            if record.id == device_id:
                return record, device
        raise SnapdError(errno.ENODEV, f"there is no device {device_id}")

    async def _commit(self, record: DeviceRecord, export: ExportRecord) -> None:
        if record.snapshot is None:
            await self._registry.commit_device(replace(record, export=export))
        else:
            update_id, snapshot_id = record.snapshot
            update = self._registry.update(update_id)
            await self._registry.commit(update.with_snapshot(snapshot_id, export=export))


async def _status(record: DeviceRecord, device: Device | None) -> DeviceStatus:
    return DeviceStatus(record, FAILED if device is None else await device.report())


def _stats(status: DeviceStatus, before: Counters | None) -> DeviceStats:
    counters = status.report.counters
    return DeviceStats(status.record, status.report, None if counters is None else io_stats(counters, before))

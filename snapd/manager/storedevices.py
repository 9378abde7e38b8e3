"""The devices of stores: made and deleted by the client, brought back by every daemon.

Invariant: a store is open, and so locked, as long as its device is recorded and could be started. A device is started
before its record is written, and stopped after its record is gone; so a crash leaves at most a device that is in no
record, and the next daemon ends it (`sweep`).
"""

import asyncio
import errno
import logging
import os
import uuid
from dataclasses import replace

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.block.lock import open_locked
from snapd.device.config import Route
from snapd.manager.backends import BackEnds, ExportRequest
from snapd.manager.devicereport import Device
from snapd.manager.dmdevice import discard
from snapd.manager.launch import adopt_device, clear_away, close_stores, start_device
from snapd.manager.paths import device_id as short_id
from snapd.manager.records import DeviceRecord, check_id
from snapd.manager.registry import Registry

_MAX_DEVICES = 256

_log = logging.getLogger("snapd.manager")


class StoreDevices:
    """What runs for the records of `Registry.devices`; all methods run on one event loop."""

    def __init__(self, registry: Registry, back_ends: BackEnds) -> None:
        self._registry = registry
        self._back_ends = back_ends
        self._devices: dict[str, Device] = {}
        self._stores: dict[str, dict[str, int]] = {}

    def running(self, device_id: str) -> Device | None:
        """The device, if it could be started."""
        return self._devices.get(device_id)

    async def create(
        self,
        device_id: str,
        route: Route,
        request: ExportRequest,
        *,
        store_path: str = "",
        size_bytes: int = 0,
        read_only: bool = False,
    ) -> None:
        """A new device; returns when it serves.

        Errors: EINVAL for a wrong id, route, size or path; EALREADY for a taken id; EBUSY for a store in use; those of
        `BackEnds.settle`.
        """
        check_id("device", device_id)
        _check(route, store_path, size_bytes)
        export = self._back_ends.settle(request, route)
        async with self._registry.device_lock(device_id):
            if self._registry.has_device(device_id):
                raise SnapdError(errno.EALREADY, f"device {device_id} exists")
            if len(self._registry.devices()) >= _MAX_DEVICES:
                raise SnapdError(errno.ENOSPC, f"there are {_MAX_DEVICES} devices of stores already")
            stores = await asyncio.to_thread(_open_store, store_path, read_only=read_only)
            record = DeviceRecord(
                id=device_id,
                uuid=str(uuid.uuid4()),
                route=route,
                size_bytes=_size(stores, store_path) if stores else size_bytes,
                read_only=read_only,
                export=export,
                store_path=store_path,
            )
            device: Device | None = None
            try:
                _check_size(record)
                device = await self._start(record, stores)
                await self._registry.commit_device(replace(record, export=device.export))
            except SnapdError:
                if device is not None:
                    await device.stop()
                close_stores(stores)
                self._registry.paths.device(record.uuid).remove()
                raise
            self._devices[device_id], self._stores[device_id] = device, stores

    async def delete(self, device_id: str) -> None:
        """End a device; ENODEV when there is none, EBUSY while the kernel says that it is in use."""
        async with self._registry.device_lock(device_id):
            record = self._registry.device(device_id)
            await self._registry.forget_device(device_id)
            device = self._devices.get(device_id)
            try:
                if device is not None:
                    await device.stop()
            except SnapdError:
                await self._registry.commit_device(record)
                raise
            self._devices.pop(device_id, None)
            close_stores(self._stores.pop(device_id, {}))
            self._registry.paths.device(record.uuid).remove()

    async def recover(self, record: DeviceRecord) -> None:
        """After a restart: adopt the device that a former daemon left, or start one; what cannot be is FAILED."""
        async with self._registry.device_lock(record.id):
            try:
                paths = self._registry.paths.device(record.uuid)
                adopted = await adopt_device(record, paths, self._back_ends, lambda: None)
                if adopted is not None:
                    self._devices[record.id], self._stores[record.id] = adopted
                    _log.info("adopted device %s", record.id)
                else:
                    await self._start_again(record)
            except SnapdError as error:
                _log.error("device %s cannot be taken up again: %s", record.id, error)

    async def sweep(self) -> None:
        """End the devices of a former daemon that are in no record."""
        wanted = {short_id(record.uuid) for record in self._registry.devices()}
        wanted |= {short_id(s.uuid) for update in self._registry.updates() for s in update.snapshots}
        for paths in self._registry.paths.devices():
            if paths.directory.name not in wanted:
                try:
                    await clear_away(paths)
                    await discard(paths, self._back_ends.dm)
                    paths.remove()
                except SnapdError as error:
                    _log.error("what is in %s cannot be ended: %s", paths.directory, error)

    def detach(self) -> None:
        """Leave all of them running for the next daemon."""
        for device in self._devices.values():
            device.detach()

    async def _start(self, record: DeviceRecord, stores: dict[str, int]) -> Device:
        paths = self._registry.paths.device(record.uuid)
        return await start_device(record, paths, stores, self._back_ends, lambda: None)

    async def _start_again(self, record: DeviceRecord) -> None:
        stores = await asyncio.to_thread(_open_store, record.store_path, read_only=record.read_only)
        try:
            if stores and _size(stores, record.store_path) < record.size_bytes:
                raise SnapdError(
                    errno.EINVAL,
                    f"{record.store_path} has {_size(stores, record.store_path)} bytes; it had {record.size_bytes}"
                    " when the device was created",
                    reason="STORE_SIZE_CHANGED",
                )
            self._devices[record.id] = await self._start(record, stores)
        except SnapdError:
            close_stores(stores)
            raise
        self._stores[record.id] = stores


def _check(route: Route, store_path: str, size_bytes: int) -> None:
    if route is Route.SNAPSHOT:
        raise SnapdError(errno.EINVAL, "the device of a snapshot is made by mapping the snapshot")
    if route is Route.EXTERNAL:
        if store_path:
            raise SnapdError(errno.EINVAL, f"a device of route {route} has no store: its daemon has")
    elif size_bytes:
        raise SnapdError(errno.EINVAL, f"a device of route {route} is as large as its store: no size is given")
    elif not os.path.isabs(store_path):
        raise SnapdError(errno.EINVAL, f"store path {store_path!r} is not absolute")


def _check_size(record: DeviceRecord) -> None:
    if record.size_bytes <= 0 or record.size_bytes % SECTOR_BYTES:
        what = record.store_path or "an external device"
        raise SnapdError(
            errno.EINVAL, f"{what} of {record.size_bytes} bytes: not a number of whole sectors of {SECTOR_BYTES} bytes"
        )


def _open_store(path: str, *, read_only: bool) -> dict[str, int]:
    """The store under its lock, by name; nothing for a device without one."""
    return {"base": open_locked(path, writable=not read_only)} if path else {}


def _size(stores: dict[str, int], path: str) -> int:
    return file_store(stores["base"], path).size()

"""The services of `snapd.v1`: names in, manager calls, messages out; every `SnapdError` becomes a status."""

import asyncio
import errno
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf import empty_pb2

from snapd.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    updates_pb2,
    updates_pb2_grpc,
)
from snapd.block.errors import SnapdError
from snapd.manager.catalog import DEFAULT_INTERVAL_MS
from snapd.manager.manager import Manager
from snapd.rpc.convert import snapshot_message, update_message
from snapd.rpc.convertdevice import asked_route, device_message, export_request, stats_message
from snapd.rpc.errors import abort
from snapd.rpc.names import parse_device, parse_snapshot, parse_update

_Service = TypeVar("_Service")
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


def _reported(
    method: Callable[[_Service, _Request], Awaitable[_Reply]],
) -> Callable[[_Service, _Request, Any], Awaitable[_Reply]]:
    """A method as grpc calls it, with its errors turned into statuses.

    A client that hangs up in the middle must not leave half of a transition behind: it is finished for nobody.
    """

    @functools.wraps(method)
    async def wrapper(self: _Service, request: _Request, context: Any) -> _Reply:
        verb = asyncio.ensure_future(method(self, request))
        verb.add_done_callback(_forget_failure)
        try:
            return await asyncio.shield(verb)
        except SnapdError as error:
            await abort(context, error)

    return wrapper


def _forget_failure(verb: "asyncio.Future[Any]") -> None:
    """What failed for nobody is told to nobody."""
    if not verb.cancelled():
        verb.exception()


class UpdatesService(updates_pb2_grpc.UpdatesServicer):
    """`snapd.v1.Updates`."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    @_reported
    async def CreateUpdate(self, request: updates_pb2.CreateUpdateRequest) -> updates_pb2.Update:
        return update_message(await self._manager.create_update(request.update_id))

    @_reported
    async def GetUpdate(self, request: updates_pb2.GetUpdateRequest) -> updates_pb2.Update:
        return update_message(await self._manager.update_status(parse_update(request.name)))

    @_reported
    async def StartMerge(self, request: updates_pb2.StartMergeRequest) -> updates_pb2.Update:
        return update_message(await self._manager.start_merge(parse_update(request.name)))

    @_reported
    async def ConfirmUpdate(self, request: updates_pb2.ConfirmUpdateRequest) -> updates_pb2.Update:
        return update_message(await self._manager.confirm_update(parse_update(request.name)))

    async def WatchUpdate(
        self, request: updates_pb2.WatchUpdateRequest, context: Any
    ) -> AsyncIterator[updates_pb2.Update]:
        try:
            async for status in self._manager.watch(parse_update(request.name)):
                yield update_message(status)
        except SnapdError as error:
            await abort(context, error)


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """`snapd.v1.Snapshots`."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    @_reported
    async def CreateSnapshot(self, request: snapshots_pb2.CreateSnapshotRequest) -> snapshots_pb2.Snapshot:
        update_id = parse_update(request.parent)
        return snapshot_message(
            await self._manager.create_snapshot(update_id, request.snapshot_id, request.base_path, request.cow_path)
        )

    @_reported
    async def GetSnapshot(self, request: snapshots_pb2.GetSnapshotRequest) -> snapshots_pb2.Snapshot:
        return snapshot_message(await self._manager.snapshot_status(*parse_snapshot(request.name)))

    @_reported
    async def MapSnapshot(self, request: snapshots_pb2.MapSnapshotRequest) -> snapshots_pb2.Snapshot:
        asked = export_request(request.export, request.policy)
        return snapshot_message(await self._manager.map_snapshot(*parse_snapshot(request.name), asked))

    @_reported
    async def UnmapSnapshot(self, request: snapshots_pb2.UnmapSnapshotRequest) -> snapshots_pb2.Snapshot:
        return snapshot_message(await self._manager.unmap_snapshot(*parse_snapshot(request.name)))


class DevicesService(devices_pb2_grpc.DevicesServicer):
    """`snapd.v1.Devices`."""

    def __init__(self, manager: Manager) -> None:
        self._catalog = manager.catalog
        self._store_devices = manager.store_devices

    @_reported
    async def ListDevices(self, _request: devices_pb2.ListDevicesRequest) -> devices_pb2.ListDevicesResponse:
        statuses = await self._catalog.all()
        return devices_pb2.ListDevicesResponse(devices=[device_message(status) for status in statuses])

    @_reported
    async def GetDevice(self, request: devices_pb2.GetDeviceRequest) -> devices_pb2.Device:
        return device_message(await self._catalog.get(parse_device(request.name)))

    @_reported
    async def CreateDevice(self, request: devices_pb2.CreateDeviceRequest) -> devices_pb2.Device:
        await self._store_devices.create(
            request.device_id,
            asked_route(request.route),
            export_request(request.export, request.policy),
            store_path=request.store_path,
            size_bytes=request.size_bytes,
            read_only=request.read_only,
        )
        return device_message(await self._catalog.get(request.device_id))

    @_reported
    async def DeleteDevice(self, request: devices_pb2.DeleteDeviceRequest) -> empty_pb2.Empty:
        await self._catalog.delete(parse_device(request.name))
        return empty_pb2.Empty()

    @_reported
    async def UpdateDevice(self, request: devices_pb2.UpdateDeviceRequest) -> devices_pb2.Device:
        device_id = parse_device(request.name)
        if not request.HasField("attach_timeout_ms"):
            raise SnapdError(errno.EINVAL, "attach_timeout_ms is not set")
        await self._catalog.set_attach_timeout(device_id, request.attach_timeout_ms)
        return device_message(await self._catalog.get(device_id))

    @_reported
    async def GetDeviceStats(self, request: devices_pb2.GetDeviceStatsRequest) -> devices_pb2.DeviceStats:
        return stats_message(await self._catalog.stats(parse_device(request.name)))

    async def WatchDevices(
        self, request: devices_pb2.WatchDevicesRequest, context: Any
    ) -> AsyncIterator[devices_pb2.WatchDevicesResponse]:
        try:
            device_id = parse_device(request.name) if request.name else None
            async for tick in self._catalog.watch(device_id, request.interval_ms or DEFAULT_INTERVAL_MS):
                yield devices_pb2.WatchDevicesResponse(devices=[stats_message(stats) for stats in tick])
        except SnapdError as error:
            await abort(context, error)

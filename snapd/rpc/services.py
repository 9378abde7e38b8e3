"""The services of `snapd.v1`: names in, manager calls, messages out; every `SnapdError` becomes a status."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from snapd.api.v1 import snapshots_pb2, snapshots_pb2_grpc, updates_pb2, updates_pb2_grpc
from snapd.block.errors import SnapdError
from snapd.manager.manager import Manager
from snapd.rpc.convert import snapshot_message, update_message
from snapd.rpc.errors import abort
from snapd.rpc.names import parse_snapshot, parse_update

_Service = TypeVar("_Service")
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


def _reported(
    method: Callable[[_Service, _Request], Awaitable[_Reply]],
) -> Callable[[_Service, _Request, Any], Awaitable[_Reply]]:
    """A method as grpc calls it, with its errors turned into statuses."""

    @functools.wraps(method)
    async def wrapper(self: _Service, request: _Request, context: Any) -> _Reply:
        try:
            return await method(self, request)
        except SnapdError as error:
            await abort(context, error)

    return wrapper


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
        return snapshot_message(await self._manager.map_snapshot(*parse_snapshot(request.name)))

    @_reported
    async def UnmapSnapshot(self, request: snapshots_pb2.UnmapSnapshotRequest) -> snapshots_pb2.Snapshot:
        return snapshot_message(await self._manager.unmap_snapshot(*parse_snapshot(request.name)))

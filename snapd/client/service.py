"""The typed client of the service, for agents and for snapctl.

Every failure is a `SnapdError`: the service's own with its errno and reason, or ECONNREFUSED when nobody answers.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from snapd.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    updates_pb2,
    updates_pb2_grpc,
)
from snapd.block.errors import SnapdError

_CALL_TIMEOUT_S = 120.0
_RECONNECT_S = 0.2
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
_ENDED = (
    updates_pb2.UPDATE_STATE_MERGED,
    updates_pb2.UPDATE_STATE_CONFIRMED,
    updates_pb2.UPDATE_STATE_FAILED,
)
_Reply = TypeVar("_Reply")


class Client:
    """A connection to the service at `server` (`unix:PATH`); a context manager.

    Names are `updates/U`, `updates/U/snapshots/S` and `devices/D`.
    """

    def __init__(self, server: str) -> None:
        kind, _, path = server.partition(":")
        if kind != "unix" or not path:
            raise SnapdError(errno.EINVAL, f"server {server!r} is not unix:PATH")
        self._server = f"unix:{os.path.abspath(path)}"
        self._channel = grpc.insecure_channel(self._server, options=_OPTIONS)
        self._updates = updates_pb2_grpc.UpdatesStub(self._channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(self._channel)
        self._devices = devices_pb2_grpc.DevicesStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def create_update(self, update_id: str) -> updates_pb2.Update:
        """A new, empty update."""
        return self._call(self._updates.CreateUpdate, updates_pb2.CreateUpdateRequest(update_id=update_id))

    def get_update(self, name: str) -> updates_pb2.Update:
        """The update as it is now."""
        return self._call(self._updates.GetUpdate, updates_pb2.GetUpdateRequest(name=name))

    def start_merge(self, name: str) -> updates_pb2.Update:
        """Merge in the background; returns at once."""
        return self._call(self._updates.StartMerge, updates_pb2.StartMergeRequest(name=name))

    def confirm_update(self, name: str) -> updates_pb2.Update:
        """Give up the way back."""
        return self._call(self._updates.ConfirmUpdate, updates_pb2.ConfirmUpdateRequest(name=name))

    def create_snapshot(self, parent: str, snapshot_id: str, base_path: str, cow_path: str) -> snapshots_pb2.Snapshot:
        """Add a snapshot; paths are absolute, on the host of the service."""
        request = snapshots_pb2.CreateSnapshotRequest(
            parent=parent, snapshot_id=snapshot_id, base_path=base_path, cow_path=cow_path
        )
        return self._call(self._snapshots.CreateSnapshot, request)

    def map_snapshot(
        self,
        name: str,
        *,
        export: devices_pb2.ExportSettings | None = None,
        policy: devices_pb2.Policy.ValueType = devices_pb2.POLICY_UNSPECIFIED,
    ) -> snapshots_pb2.Snapshot:
        """Export the new image; `device` of the reply says where."""
        request = snapshots_pb2.MapSnapshotRequest(name=name, export=export, policy=policy)
        return self._call(self._snapshots.MapSnapshot, request)

    def unmap_snapshot(self, name: str) -> snapshots_pb2.Snapshot:
        """Take the export away."""
        return self._call(self._snapshots.UnmapSnapshot, snapshots_pb2.UnmapSnapshotRequest(name=name))

    def list_devices(self) -> list[devices_pb2.Device]:
        """Every device, by name."""
        return list(self._call(self._devices.ListDevices, devices_pb2.ListDevicesRequest()).devices)

    def get_device(self, name: str) -> devices_pb2.Device:
        """The device as it is now."""
        return self._call(self._devices.GetDevice, devices_pb2.GetDeviceRequest(name=name))

    def create_device(self, request: devices_pb2.CreateDeviceRequest) -> devices_pb2.Device:
        """Export a store, or listen for a daemon; returns when it serves."""
        return self._call(self._devices.CreateDevice, request)

    def delete_device(self, name: str) -> None:
        """Take the device of a store away."""
        self._call(self._devices.DeleteDevice, devices_pb2.DeleteDeviceRequest(name=name))

    def set_attach_timeout(self, name: str, timeout_ms: int) -> devices_pb2.Device:
        """Change how long requests wait for the first daemon."""
        request = devices_pb2.UpdateDeviceRequest(name=name, attach_timeout_ms=timeout_ms)
        return self._call(self._devices.UpdateDevice, request)

    def device_stats(self, name: str) -> devices_pb2.DeviceStats:
        """What the device did since the start of its host."""
        return self._call(self._devices.GetDeviceStats, devices_pb2.GetDeviceStatsRequest(name=name))

    def watch_devices(
        self, name: str = "", *, interval_ms: int = 1000, patience_s: float = 30.0
    ) -> Iterator[list[devices_pb2.DeviceStats]]:
        """What one device, or every one, did between two ticks, until the caller stops.

        A service that goes away is looked for again; ECONNREFUSED when it was silent for `patience_s`.
        """
        request = devices_pb2.WatchDevicesRequest(name=name, interval_ms=interval_ms)
        for tick in self._follow(self._devices.WatchDevices, request, patience_s):
            yield list(tick.devices)

    def watch_merge(self, name: str, *, patience_s: float = 30.0) -> Iterator[updates_pb2.Update]:
        """The update now and after each change, until its merge has ended or failed.

        A service that goes away is looked for again; ECONNREFUSED when it was silent for `patience_s`.
        """
        request = updates_pb2.WatchUpdateRequest(name=name)
        for update in self._follow(self._updates.WatchUpdate, request, patience_s):
            yield update
            if update.state in _ENDED:
                return

    def _follow(self, method: Callable[..., Iterable[_Reply]], request: Any, patience_s: float) -> Iterator[_Reply]:
        """The messages of a stream that never ends by itself; it is asked for again when the service has gone away."""
        silent_since = time.monotonic()
        while True:
            try:
                for message in method(request):
                    yield message
                    silent_since = time.monotonic()
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._translate(error) from error
                if time.monotonic() - silent_since > patience_s:
                    raise self._translate(error) from error
            time.sleep(_RECONNECT_S)

    def _call(self, method: Callable[..., _Reply], request: Any) -> _Reply:
        try:
            return method(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: Any) -> SnapdError:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return SnapdError(errno.ECONNREFUSED, f"no snapd answers at {self._server}")
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                number = getattr(errno, info.reason, errno.EIO)
                return SnapdError(number, error.details(), reason=info.reason)
        return SnapdError(errno.EIO, f"{error.code().name}: {error.details()}")

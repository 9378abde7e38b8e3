"""The typed client of the service, for agents and for snapctl.

Every failure is a `SnapdError`: the service's own with its errno and reason, or ECONNREFUSED when nobody answers.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from snapd.api.v1 import snapshots_pb2, snapshots_pb2_grpc, updates_pb2, updates_pb2_grpc
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
    """A connection to the service at `server` (`unix:PATH`); a context manager. Names are `updates/U[/snapshots/S]`."""

    def __init__(self, server: str) -> None:
        kind, _, path = server.partition(":")
        if kind != "unix" or not path:
            raise SnapdError(errno.EINVAL, f"server {server!r} is not unix:PATH")
        self._server = f"unix:{os.path.abspath(path)}"
        self._channel = grpc.insecure_channel(self._server, options=_OPTIONS)
        self._updates = updates_pb2_grpc.UpdatesStub(self._channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(self._channel)

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

    def map_snapshot(self, name: str) -> snapshots_pb2.Snapshot:
        """Export the new image; `device.nbd_uri` of the reply says where."""
        return self._call(self._snapshots.MapSnapshot, snapshots_pb2.MapSnapshotRequest(name=name))

    def unmap_snapshot(self, name: str) -> snapshots_pb2.Snapshot:
        """Take the export away."""
        return self._call(self._snapshots.UnmapSnapshot, snapshots_pb2.UnmapSnapshotRequest(name=name))

    def watch_merge(self, name: str, *, patience_s: float = 30.0) -> Iterator[updates_pb2.Update]:
        """The update now and after each change, until its merge has ended or failed.

        A service that goes away is looked for again; ECONNREFUSED when it was silent for `patience_s`.
        """
        silent_since = time.monotonic()
        while True:
            try:
                for update in self._updates.WatchUpdate(updates_pb2.WatchUpdateRequest(name=name)):
                    yield update
                    if update.state in _ENDED:
                        return
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

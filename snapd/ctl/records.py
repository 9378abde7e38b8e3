"""Updates and snapshots of the API as the records that the verbs print."""

from typing import Any

from snapd.api.v1 import devices_pb2, snapshots_pb2, updates_pb2


def update_record(update: updates_pb2.Update) -> dict[str, object]:
    """The whole update; its snapshots are a list of records."""
    return {
        **update_summary(update),
        "create_time": update.create_time.ToJsonString(),
        "snapshots": [snapshot_record(snapshot) for snapshot in update.snapshots],
    }


def update_summary(update: updates_pb2.Update) -> dict[str, object]:
    """The update without its snapshots."""
    return {
        "name": update.name,
        "state": enum_name(updates_pb2.UpdateState, update.state),
        "failure": update.failure or None,
        "changed_bytes": update.changed_bytes,
        "merged_bytes": update.merged_bytes,
    }


def snapshot_record(snapshot: snapshots_pb2.Snapshot) -> dict[str, object]:
    """One snapshot with its device, flat; what is not there is None."""
    device = snapshot.device if snapshot.HasField("device") else None
    return {
        "name": snapshot.name,
        "uuid": snapshot.uuid,
        "state": enum_name(snapshots_pb2.SnapshotState, snapshot.state),
        "failure": snapshot.failure or None,
        "base_path": snapshot.base_path,
        "cow_path": snapshot.cow_path,
        "undo_path": snapshot.undo_path or None,
        "old_size_bytes": snapshot.old_size_bytes,
        "new_size_bytes": snapshot.new_size_bytes,
        "changed_bytes": snapshot.changed_bytes,
        "merged_bytes": snapshot.merged_bytes,
        "read_back": enum_name(snapshots_pb2.ReadBack, snapshot.read_back),
        "merger_pid": snapshot.merger_pid or None,
        "device": device.name if device else None,
        "device_state": enum_name(devices_pb2.DeviceState, device.state) if device else None,
        "export": enum_name(devices_pb2.ExportKind, device.export) if device else None,
        "nbd_uri": device.nbd_uri or None if device else None,
        "nbd_tcp_uri": device.nbd_tcp_uri or None if device else None,
        "loop_path": device.loop_path or None if device else None,
        "dm_path": device.dm_path or None if device else None,
        "host_pid": device.host_pid or None if device else None,
        "worker_pid": device.worker_pid or None if device else None,
        "worker_restarts": device.worker_restarts if device else None,
        "host_restarts": device.host_restarts if device else None,
    }


def enum_name(enum: Any, number: int) -> str:
    """The name of an enum's value, without that of the enum in front."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return str(enum.Name(number)).removeprefix(prefix)

"""From the manager's answers to the messages of the API."""

from snapd.api.v1 import snapshots_pb2, updates_pb2
from snapd.manager.status import SnapshotStatus, UpdateStatus
from snapd.rpc.convertdevice import device_message
from snapd.rpc.names import snapshot_name, update_name


def update_message(status: UpdateStatus) -> updates_pb2.Update:
    """The whole update with its snapshots."""
    record = status.record
    message = updates_pb2.Update(
        name=update_name(record.id),
        state=updates_pb2.UpdateState.Value(f"UPDATE_STATE_{record.state}"),
        snapshots=[snapshot_message(snapshot) for snapshot in status.snapshots],
        failure=record.failure,
        changed_bytes=sum(s.record.changed_bytes for s in status.snapshots),
        merged_bytes=sum(s.merged_bytes for s in status.snapshots),
    )
    message.create_time.FromMilliseconds(record.create_time_ms)
    return message


def snapshot_message(status: SnapshotStatus) -> snapshots_pb2.Snapshot:
    """One snapshot, with its device while it is mapped."""
    record = status.record
    return snapshots_pb2.Snapshot(
        name=snapshot_name(status.update_id, record.id),
        uuid=record.uuid,
        state=snapshots_pb2.SnapshotState.Value(f"SNAPSHOT_STATE_{record.state}"),
        base_path=record.base_path,
        cow_path=record.cow_path,
        undo_path=status.undo_path,
        old_size_bytes=record.old_size_bytes,
        new_size_bytes=record.new_size_bytes,
        changed_bytes=record.changed_bytes,
        merged_bytes=status.merged_bytes,
        read_back=snapshots_pb2.ReadBack.Value(f"READ_BACK_{record.read_back}"),
        failure=record.failure,
        merger_pid=status.merger_pid,
        device=None if status.device is None else device_message(status.device),
    )

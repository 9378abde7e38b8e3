"""What the service answers when asked: the durable record of an update joined with what runs right now."""

from dataclasses import dataclass

from snapd.manager.records import SnapshotRecord, UpdateRecord


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A mapped device: `state` is SERVING, RESTARTING or FAILED; a pid is 0 while its process is being replaced."""

    id: str
    state: str
    nbd_uri: str
    host_pid: int
    worker_pid: int
    worker_restarts: int
    host_restarts: int


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """One snapshot; `undo_path` is empty where there is no way back (or nothing to go back from)."""

    update_id: str
    record: SnapshotRecord
    undo_path: str
    merged_bytes: int
    merger_pid: int
    device: DeviceStatus | None


@dataclass(frozen=True, slots=True)
class UpdateStatus:
    """One update."""

    record: UpdateRecord
    snapshots: tuple[SnapshotStatus, ...]

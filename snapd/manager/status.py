"""What the service answers when asked: the durable record of an update joined with what runs right now."""

from dataclasses import dataclass

from snapd.manager.devicereport import DeviceReport
from snapd.manager.records import DeviceRecord, SnapshotRecord, UpdateRecord


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device: its record, and what it says of itself."""

    record: DeviceRecord
    report: DeviceReport


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

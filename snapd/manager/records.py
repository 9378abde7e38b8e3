"""What the service knows of updates and devices: immutable records, replaced as a whole by each transition."""

import errno
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.dmuser.target import ATTACH_TIMEOUT_MS
from snapd.manager.paths import device_id
from snapd.manager.states import ReadBack, SnapshotState, UpdateState

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def check_id(kind: str, text: str) -> str:
    """`text` if it is a legal id, else EINVAL."""
    if not _ID.fullmatch(text):
        raise SnapdError(
            errno.EINVAL,
            f"{kind} id {text!r}: 1 to 63 of a-z, 0-9 and '-', with no '-' at either end",
        )
    return text


class ExportKind(StrEnum):
    """How a device reaches its clients; AUTO is asked for, and never recorded."""

    NBD = "nbd"
    LOOP = "loop"
    DM = "dm"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """The settings of one export; `tcp_address` is `HOST:PORT`, or empty."""

    kind: ExportKind = ExportKind.NBD
    tcp_address: str = ""
    policy: Policy = Policy.RESTART
    attach_timeout_ms: int = ATTACH_TIMEOUT_MS


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """One device. That of a store is kept; that of a mapped snapshot is derived from the snapshot's record.

    `snapshot` is `(U, S)`, or None. `uuid` names the run directory, since the id may be too long for a socket path.
    """

    id: str
    uuid: str
    route: Route
    size_bytes: int
    read_only: bool
    export: ExportRecord
    store_path: str = ""
    snapshot: tuple[str, str] | None = None


def has_attach_timeout(device: DeviceRecord) -> bool:
    """Whether the device has an attach timeout of its own: a target, which is not the kernel's."""
    return device.route is not Route.RAW and device.export.kind is not ExportKind.DM


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot; sizes in bytes, paths as given by the client; `export` counts while it is mapped."""

    id: str
    uuid: str
    state: SnapshotState
    base_path: str
    cow_path: str
    old_size_bytes: int
    new_size_bytes: int
    changed_bytes: int
    mapped: bool = False
    read_back: ReadBack = ReadBack.PENDING
    failure: str = ""
    export: ExportRecord = ExportRecord()

    def device(self, update_id: str) -> DeviceRecord:
        """The device that shows the new image."""
        return DeviceRecord(
            id=device_id(self.uuid),
            uuid=self.uuid,
            route=Route.SNAPSHOT,
            size_bytes=self.new_size_bytes,
            read_only=True,
            export=self.export,
            snapshot=(update_id, self.id),
        )


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """One update with its snapshots, in order of creation."""

    id: str
    state: UpdateState
    create_time_ms: int
    failure: str = ""
    snapshots: tuple[SnapshotRecord, ...] = ()

    def snapshot(self, snapshot_id: str) -> SnapshotRecord:
        """The snapshot with this id; ENODEV if there is none."""
        for snapshot in self.snapshots:
            if snapshot.id == snapshot_id:
                return snapshot
        raise SnapdError(errno.ENODEV, f"update {self.id} has no snapshot {snapshot_id}")

    def with_snapshot(self, snapshot_id: str, **changes: Any) -> "UpdateRecord":
        """This update with one snapshot's fields changed."""
        return replace(
            self,
            snapshots=tuple(replace(s, **changes) if s.id == snapshot_id else s for s in self.snapshots),
        )

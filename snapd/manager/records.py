"""What the service knows of an update: immutable records, replaced as a whole by each transition."""

import errno
import re
from dataclasses import dataclass, replace
from typing import Any

from snapd.block.errors import SnapdError
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


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot; sizes in bytes, paths as given by the client."""

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

"""The states of updates, snapshots and devices, and the arrows between them (docs/architecture.md, "States").

Invariant: a state is written to the database before anybody is told of it (UNDO-8); `check_transition` refuses
every arrow that is not in the table.
"""

import errno
from enum import StrEnum

from snapd.block.errors import SnapdError


class UpdateState(StrEnum):
    """Where an update is; `FAILED` is always resumable by starting the merge again."""

    CREATED = "CREATED"
    SEALED = "SEALED"
    MERGING = "MERGING"
    MERGED = "MERGED"
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"


class SnapshotState(StrEnum):
    """Where one snapshot is."""

    READY = "READY"
    MERGING = "MERGING"
    MERGED = "MERGED"
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"


class ReadBack(StrEnum):
    """Whether the merged base was compared with the new image (UNDO-9)."""

    PENDING = "PENDING"
    OK = "OK"
    FAILED = "FAILED"


class DeviceState(StrEnum):
    """Whether a device answers; a FAILED one fails every request until it is started anew."""

    SERVING = "SERVING"
    RESTARTING = "RESTARTING"
    FAILED = "FAILED"


_ARROWS: dict[UpdateState, frozenset[UpdateState]] = {
    UpdateState.CREATED: frozenset({UpdateState.SEALED, UpdateState.MERGING}),
    UpdateState.SEALED: frozenset({UpdateState.MERGING}),
    UpdateState.MERGING: frozenset({UpdateState.MERGED, UpdateState.FAILED}),
    UpdateState.FAILED: frozenset({UpdateState.MERGING}),
    UpdateState.MERGED: frozenset({UpdateState.CONFIRMED}),
    UpdateState.CONFIRMED: frozenset(),
}


def check_transition(name: str, state: UpdateState, to: UpdateState) -> None:
    """EBUSY unless an update may go from `state` to `to`; staying is always allowed."""
    if to is not state and to not in _ARROWS[state]:
        raise SnapdError(errno.EBUSY, f"update {name} is {state}: it cannot become {to}")

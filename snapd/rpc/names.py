"""Resource names: `updates/U`, `updates/U/snapshots/S` and `devices/D`."""

import errno

from snapd.block.errors import SnapdError


def update_name(update_id: str) -> str:
    """`updates/U`."""
    return f"updates/{update_id}"


def snapshot_name(update_id: str, snapshot_id: str) -> str:
    """`updates/U/snapshots/S`."""
    return f"updates/{update_id}/snapshots/{snapshot_id}"


def device_name(device_id: str) -> str:
    """`devices/D`."""
    return f"devices/{device_id}"


def parse_update(name: str) -> str:
    """U of `updates/U`; EINVAL else."""
    match name.split("/"):
        case ["updates", update_id] if update_id:
            return update_id
    raise SnapdError(errno.EINVAL, f"{name!r} is not the name of an update: updates/U")


def parse_snapshot(name: str) -> tuple[str, str]:
    """(U, S) of `updates/U/snapshots/S`; EINVAL else."""
    match name.split("/"):
        case ["updates", update_id, "snapshots", snapshot_id] if update_id and snapshot_id:
            return update_id, snapshot_id
    raise SnapdError(errno.EINVAL, f"{name!r} is not the name of a snapshot: updates/U/snapshots/S")


def parse_device(name: str) -> str:
    """D of `devices/D`; EINVAL else."""
    match name.split("/"):
        case ["devices", device_id] if device_id:
            return device_id
    raise SnapdError(errno.EINVAL, f"{name!r} is not the name of a device: devices/D")

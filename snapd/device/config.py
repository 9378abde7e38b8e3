"""What a device host is told and given when it starts, and hands on when it is adopted."""

import errno
import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.dmuser.target import ATTACH_TIMEOUT_MS


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device: its id, the snapshot's UUID, its size, and the service's timeouts (DMU-184)."""

    device: str
    snapshot: str
    size_bytes: int
    attach_timeout_ms: int = ATTACH_TIMEOUT_MS
    restart_grace_ms: int = 10_000
    request_timeout_ms: int = 30_000

    @classmethod
    def from_dict(cls, raw: Any) -> "DeviceConfig":
        """Check a message's `device` object; EINVAL names the field that is wrong."""
        if not isinstance(raw, dict):
            raise SnapdError(errno.EINVAL, "device: not an object")
        types = {field.name: field.type for field in fields(cls)}
        for name, value in raw.items():
            if name not in types:
                raise SnapdError(errno.EINVAL, f"device: unknown field {name!r}")
            if type(value) is not types[name] or (isinstance(value, int) and value < 0):
                raise SnapdError(errno.EINVAL, f"device: field {name} cannot be {value!r}")
        try:
            config = cls(**raw)
            uuid.UUID(config.snapshot)
        except (TypeError, ValueError) as error:
            raise SnapdError(errno.EINVAL, f"device: {error}") from error
        if not config.size_bytes or config.size_bytes % SECTOR_BYTES:
            raise SnapdError(errno.EINVAL, f"device: size_bytes {config.size_bytes} is not a number of whole sectors")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The form `from_dict` reads."""
        return asdict(self)


class Descriptors(NamedTuple):
    """The descriptors that come with `start` and go with `adopt`, in this order."""

    cow: int
    base: int
    extent_map: int
    shared_map: int
    undo_directory: int
    worker_fence: int
    nbd_listener: int
    control_listener: int

    @classmethod
    def from_message(cls, fds: list[int]) -> "Descriptors":
        """EINVAL unless there are exactly eight."""
        if len(fds) != len(cls._fields):
            raise SnapdError(errno.EINVAL, f"start with {len(fds)} descriptors instead of {len(cls._fields)}")
        return cls(*fds)

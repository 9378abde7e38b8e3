"""What a device host is told and given when it starts, and hands on when it is adopted."""

import errno
import uuid
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.dmuser.target import ATTACH_TIMEOUT_MS


class Route(StrEnum):
    """Who serves the device's requests."""

    SNAPSHOT = "snapshot"
    """Read-only: the base where it holds the new view already, else a worker over base and COW."""
    RAW = "raw"
    """A store, served by the device host itself."""
    WORKER = "worker"
    """A store, every request through a worker."""
    EXTERNAL = "external"
    """A dm-user target whose daemon is somebody else's."""


class Policy(StrEnum):
    """What happens when a worker dies."""

    RESTART = "restart"
    """Another one is started, and what was in flight is replayed within the restart grace (DMU-148, DMU-184)."""
    FAIL_FAST = "fail_fast"
    """What the kernel and its daemon do: everything fails at once, and nobody is started (SNAP-53, SNAP-61)."""


class DeviceConfig(NamedTuple):
    """One device: its id, its size, who serves it, and the timeouts (DMU-184).

    `snapshot` is the UUID of a snapshot route's snapshot, else empty. The later two timeouts count under `RESTART`.
    """

    device: str
    route: Route
    size_bytes: int
    read_only: bool
    snapshot: str = ""
    policy: Policy = Policy.RESTART
    attach_timeout_ms: int = ATTACH_TIMEOUT_MS
    restart_grace_ms: int = 10_000
    request_timeout_ms: int = 30_000

    @classmethod
    def from_dict(cls, raw: Any) -> "DeviceConfig":
        """Check a message's `device` object; EINVAL names the field that is wrong."""
        if not isinstance(raw, dict):
            raise SnapdError(errno.EINVAL, "device: not an object")
        types = cls.__annotations__
        values: dict[str, Any] = {}
        for name, value in raw.items():
            kind = types.get(name)
            if kind is None:
                raise SnapdError(errno.EINVAL, f"device: unknown field {name!r}")
            try:
                if kind in (Route, Policy):
                    value = kind(value)
                elif type(value) is not kind or (kind is int and value < 0):
                    raise ValueError
            except ValueError:
                raise SnapdError(errno.EINVAL, f"device: field {name} cannot be {value!r}") from None
            values[name] = value
        try:
            config = cls(**values)
        except TypeError as error:
            raise SnapdError(errno.EINVAL, f"device: {error}") from error
        if config.route is Route.SNAPSHOT:
            try:
                uuid.UUID(config.snapshot)
            except ValueError:
                raise SnapdError(errno.EINVAL, f"device: snapshot {config.snapshot!r} is not a UUID") from None
        if not config.size_bytes or config.size_bytes % SECTOR_BYTES:
            raise SnapdError(errno.EINVAL, f"device: size_bytes {config.size_bytes} is not a number of whole sectors")
        if config.route is Route.SNAPSHOT and not config.read_only:
            raise SnapdError(errno.EINVAL, "device: a snapshot is read-only")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The form `from_dict` reads."""
        return self._asdict()


_NAMES = (
    *("base", "cow", "extent_map", "shared_map", "undo_directory", "worker_fence", "arena"),
    *("control_listener", "nbd_listener", "nbd_tcp_listener", "fuse", "daemon_listener"),
)
_ALWAYS = {"control_listener", "arena"}
_NEEDED = {
    Route.SNAPSHOT: _ALWAYS | {"base", "cow", "extent_map", "shared_map", "undo_directory", "worker_fence"},
    Route.RAW: _ALWAYS | {"base"},
    Route.WORKER: _ALWAYS | {"base", "worker_fence"},
    Route.EXTERNAL: _ALWAYS | {"daemon_listener"},
}


class Descriptors:
    """The descriptors that come with `start` and go with `adopt`, by name.

    Every device has `arena` and `control_listener`; `base` is the base of a snapshot or the store; the exports are
    `nbd_listener` (unix), `nbd_tcp_listener` and `fuse`.
    """

    def __init__(self, by_name: Mapping[str, int]) -> None:
        self._by_name = dict(by_name)

    def __getitem__(self, name: str) -> int:
        return self._by_name[name]

    def get(self, name: str) -> int | None:
        """The descriptor, or None when the device has none of that name."""
        return self._by_name.get(name)

    @property
    def names(self) -> list[str]:
        """The names, in the order of `fds`."""
        return list(self._by_name)

    @property
    def fds(self) -> list[int]:
        """The descriptors, in the order of `names`."""
        return list(self._by_name.values())

    @classmethod
    def from_message(cls, names: Any, fds: Iterable[int]) -> "Descriptors":
        """What a message says its descriptors are; EINVAL when that cannot be."""
        given = list(fds)
        if not isinstance(names, list) or len(names) != len(given) or len({*map(str, names)}) != len(given):
            raise SnapdError(errno.EINVAL, f"{len(given)} descriptors with the names {names!r}")
        if unknown := [name for name in names if name not in _NAMES]:
            raise SnapdError(errno.EINVAL, f"descriptor of an unknown name {unknown[0]!r}")
        return cls(dict(zip(names, given, strict=True)))

    def check(self, route: Route) -> None:
        """EINVAL when one is missing that a device of this route needs."""
        if missing := sorted(_NEEDED[route].difference(self._by_name)):
            raise SnapdError(errno.EINVAL, f"a device of route {route} without descriptor {missing[0]}")

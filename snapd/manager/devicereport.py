"""What every kind of running device has in common: the verbs the manager calls, and what it says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from snapd.manager.records import ExportRecord
from snapd.manager.states import DeviceState


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A device as it is now. A pid is 0 while there is no such process, an address empty where there is none.

    `counters` is what a device host answers to `stats`; None while there is no host that answers.
    """

    state: DeviceState
    nbd_uri: str = ""
    nbd_tcp_uri: str = ""
    loop_path: str = ""
    dm_path: str = ""
    daemon_socket: str = ""
    host_pid: int = 0
    worker_pid: int = 0
    worker_restarts: int = 0
    host_restarts: int = 0
    attach_state: str = "none"
    counters: Mapping[str, Any] | None = None


class Device(Protocol):
    """A device that was started or adopted; supervised until `stop` or `detach`."""

    @property
    def export(self) -> ExportRecord:
        """Its export as it turned out, with the port that was free."""
        ...

    async def report(self) -> DeviceReport:
        """Ask it how it is; bounded, and never an error."""
        ...

    async def renew(self) -> None:
        """Serve again after it has FAILED, at the same places."""
        ...

    async def set_attach_timeout(self, timeout_ms: int) -> None:
        """Change the attach timeout while it serves; EOPNOTSUPP where there is none to change."""
        ...

    async def stop(self) -> None:
        """Finish what is in flight and end it; EBUSY, with nothing changed, when the kernel says it is in use."""
        ...

    def detach(self) -> None:
        """Leave it running for the next daemon."""
        ...


FAILED = DeviceReport(DeviceState.FAILED)
"""Promised, but not there: its files could not be opened after a restart."""

"""What this host can export with, found out once when the daemon starts.

NBD needs nothing. What is impossible is refused with its reason, and AUTO takes the best of the rest.
"""

import errno
from dataclasses import dataclass

from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager import loopdevice
from snapd.manager.dmdevice import STORES
from snapd.manager.dmsetup import DmSettings, DmSetup
from snapd.manager.records import ExportKind, ExportRecord
from snapd.manager.tcpaddress import parse_tcp_address


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What a client asks for; None, or an empty address, is for what he leaves open."""

    kind: ExportKind | None = None
    tcp_address: str = ""
    policy: Policy | None = None

    def is_met_by(self, export: ExportRecord) -> bool:
        """Whether an export that runs is what is asked for."""
        return (
            self.kind in (None, ExportKind.AUTO, export.kind)
            and self.policy in (None, export.policy)
            and (not self.tcp_address or _is_same_address(self.tcp_address, export.tcp_address))
        )


@dataclass(frozen=True, slots=True)
class BackEnds:
    """Why there is no loop device, and no dm-user device; empty where there is one."""

    no_loop: str
    no_dm: str
    dm: DmSettings

    @classmethod
    async def probe(cls, dm: DmSettings) -> "BackEnds":
        """Ask the system."""
        return cls(loopdevice.probe() or "", await DmSetup(dm).has_dm_user(), dm)

    def settle(self, request: ExportRequest, route: Route) -> ExportRecord:
        """The export that a request gets.

        EINVAL or EPERM for a wrong TCP address, EINVAL for one without NBD, EOPNOTSUPP for a back-end that this host,
        or this route, does not have.
        """
        kind = request.kind or ExportKind.NBD
        address = request.tcp_address
        if address:
            parse_tcp_address(address)
        no_dm = self.no_dm
        if route not in STORES:
            no_dm = f"a device of route {route} needs a device host"
        if kind is ExportKind.AUTO:
            kind = ExportKind.LOOP if no_dm or address else ExportKind.DM
            kind = ExportKind.NBD if kind is ExportKind.LOOP and self.no_loop else kind
        if kind is ExportKind.LOOP and self.no_loop:
            raise SnapdError(errno.EOPNOTSUPP, f"no loop device can be made here: {self.no_loop}", reason="NO_BACK_END")
        if kind is ExportKind.DM and no_dm:
            raise SnapdError(errno.EOPNOTSUPP, f"no dm-user device can be made here: {no_dm}", reason="NO_BACK_END")
        if kind is ExportKind.DM and address:
            raise SnapdError(errno.EINVAL, "a dm-user device has no NBD export, and so no TCP address")
        return ExportRecord(kind, address, request.policy or Policy.RESTART)


def _is_same_address(asked: str, has: str) -> bool:
    host, port = parse_tcp_address(asked)
    return bool(has) and parse_tcp_address(has) in ((host, port), (host, port or parse_tcp_address(has)[1]))

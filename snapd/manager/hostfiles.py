"""What a device host is given besides its stores: listening sockets, the worker's fence, the arena.

Invariant: the daemon holds all of it too, so a device host that is started anew answers at the same places, and what
its worker has written into the arena is there.
"""

import contextlib
import os
import socket
from dataclasses import dataclass, replace

from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, Route
from snapd.dmuser.arena import create_arena
from snapd.manager.paths import DevicePaths
from snapd.manager.records import DeviceRecord
from snapd.manager.tcpaddress import address_of, listen_tcp
from snapd.proc import control

_BACKLOG = 64


@dataclass(slots=True)
class HostFiles:
    """Open sockets by the name under which they travel, and the two files; `close` ends all of it."""

    sockets: dict[str, socket.socket]
    files: dict[str, int]

    @classmethod
    def create(cls, record: DeviceRecord, paths: DevicePaths) -> "HostFiles":
        """Bind, mode 0600, and open what a device of this route and export needs."""
        made = cls({}, {})
        try:
            made.sockets["control_listener"] = control.listen(paths.control)
            made.sockets["nbd_listener"] = _listen(paths.nbd)
            if record.export.tcp_address:
                made.sockets["nbd_tcp_listener"] = listen_tcp(record.export.tcp_address)
            if record.route is Route.EXTERNAL:
                made.sockets["daemon_listener"] = _listen(paths.daemon)
            if record.route in (Route.SNAPSHOT, Route.WORKER):
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                made.files["worker_fence"] = os.open(paths.worker_fence, flags, 0o600)
            made.files["arena"] = create_arena()
        except SnapdError:
            made.close(paths)
            raise
        except OSError as error:
            made.close(paths)
            raise SnapdError.from_os(error, f"make the sockets in {paths.directory}") from error
        return made

    @classmethod
    def adopt(cls, given: Descriptors) -> "HostFiles":
        """Take over what a device host holds for us."""
        by_name = dict(zip(given.names, given.fds, strict=True))
        return cls(
            {name: socket.socket(fileno=fd) for name, fd in by_name.items() if name.endswith("_listener")},
            {name: fd for name, fd in by_name.items() if name in ("worker_fence", "arena")},
        )

    def settle(self, record: DeviceRecord) -> DeviceRecord:
        """The record with the port that was free in place of port 0, so that a successor answers there too."""
        tcp = self.sockets.get("nbd_tcp_listener")
        if tcp is None:
            return record
        return replace(record, export=replace(record.export, tcp_address=address_of(tcp)))

    def descriptors(self) -> dict[str, int]:
        """By name, as they are handed on."""
        return {**{name: listener.fileno() for name, listener in self.sockets.items()}, **self.files}

    def hang_up(self, paths: DevicePaths) -> None:
        """Close the sockets and remove their names: nobody will answer, so better refused than left waiting."""
        for listener in self.sockets.values():
            listener.close()
        for path in (paths.nbd, paths.control, paths.daemon):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def close(self, paths: DevicePaths) -> None:
        """Close everything."""
        self.hang_up(paths)
        for fd in self.files.values():
            os.close(fd)
        self.files.clear()


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener

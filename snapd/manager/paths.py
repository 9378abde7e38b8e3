"""Where the service keeps what.

    STATE/lock                          held by the one daemon that serves this directory
    STATE/state.db                      the records (SQLite)
    STATE/reserve                       room for them when the file system is full
    STATE/snapshots/UUID/extent-*.map   the extent map, which can be made again
    STATE/snapshots/UUID/undo/          undo.cow, undo.cow.digests, state: the way back, and the truth about a merge
    RUN/devices/D/                      control.sock, nbd.sock, dm-user.sock; host.fence, worker.fence, standby.fence,
                                        merger.fence; shared.map; loop/, loop.json; dm.json: all of it can be made
                                        again

RUN is STATE/run, or a directory of its own where a socket path below STATE would exceed the kernel's limit.
"""

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

from snapd.block.errors import SnapdError

SOCKET_PATH_MAX = 107
"""Bytes that the kernel takes for the path of a unix socket."""
_LONGEST_SOCKET = "/devices/0123456789ab/control.sock"


class DevicePaths:
    """The run directory of one device, and of the merger of its snapshot."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.control = str(directory / "control.sock")
        self.nbd = str(directory / "nbd.sock")
        self.host_fence = str(directory / "host.fence")
        self.daemon = str(directory / "dm-user.sock")
        self.worker_fence = str(directory / "worker.fence")
        self.standby_fence = str(directory / "standby.fence")
        self.merger_fence = str(directory / "merger.fence")
        self.shared_map = str(directory / "shared.map")
        self.dm_state = str(directory / "dm.json")

    def remove(self) -> None:
        """Remove the directory and what is in it; nobody uses any of it any more."""
        shutil.rmtree(self.directory, ignore_errors=True)


class ServicePaths:
    """The layout below one state directory, which is created (mode 0700) when absent."""

    def __init__(self, state_directory: str) -> None:
        self.state = Path(state_directory).resolve()
        _private_directory(self.state)
        self.lock = str(self.state / "lock")
        self.database = str(self.state / "state.db")
        self.reserve = str(self.state / "reserve")
        self.run = _run_directory(self.state)
        _private_directory(self.run)

    def snapshot(self, uuid: str) -> Path:
        """The state directory of a snapshot."""
        return self.state / "snapshots" / uuid

    def undo(self, uuid: str) -> Path:
        """The undo directory of a snapshot."""
        return self.snapshot(uuid) / "undo"

    def device(self, uuid: str) -> DevicePaths:
        """The run directory of a snapshot or a device, which is created when absent."""
        paths = DevicePaths(self.run / "devices" / device_id(uuid))
        _private_directory(paths.directory)
        return paths

    def devices(self) -> list[DevicePaths]:
        """The run directories that there are."""
        directory = self.run / "devices"
        return [DevicePaths(path) for path in sorted(directory.iterdir())] if directory.is_dir() else []


def device_id(uuid: str) -> str:
    """The id of a snapshot's device: short, since it is part of a socket path."""
    return uuid.replace("-", "")[:12]


def default_state_directory() -> str:
    """Where root and an ordinary user keep their state."""
    if os.geteuid() == 0:
        return "/var/lib/ota-snapd"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "ota-snapd")


def default_socket() -> str:
    """The socket of the service of root, or of this user."""
    return os.path.join(_runtime_directory(), "snapd.sock")


def _runtime_directory() -> str:
    if os.geteuid() == 0:
        return "/run/ota-snapd"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "ota-snapd") if runtime else f"/tmp/ota-snapd-{os.geteuid()}"


def _run_directory(state: Path) -> Path:
    run = state / "run"
    if len(os.fsencode(run)) + len(_LONGEST_SOCKET) <= SOCKET_PATH_MAX:
        return run
    runtime = Path(_runtime_directory())
    _private_directory(runtime)
    return runtime / hashlib.sha256(os.fsencode(state)).hexdigest()[:12]


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise SnapdError.from_os(error, f"create {path}") from error
    # A directory that somebody else may write to would let him answer our reads (DMU-188).
    owned = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not owned or stat.S_IMODE(status.st_mode) & 0o022:
        raise SnapdError(errno.EPERM, f"{path}: must belong to us and be writable by nobody else")

"""The loop device of one device: a FUSE directory, mounted for root alone, whose one file is `/dev/loopN`.

Invariant: this process never touches the mount or the loop device, since it restarts what serves them; helpers do
(`snapd.device.attach`), each with a bounded wait. A step that fails undoes the earlier ones.

    D/loop/         where the FUSE directory is mounted
    D/loop.json     the loop device, for the next daemon

The FUSE descriptor is held here and by the device host, so that the mount outlives a host. A kernel that cannot send
requests again (before Linux 6.9) would let those of a dead host wait for ever: there the host alone holds it, and with
the host everything fails at once.
"""

import asyncio
import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from snapd.block.errors import SnapdError
from snapd.block.newfile import new_file
from snapd.device.fuse import NAME
from snapd.device.loopctl import CONTROL
from snapd.manager.process import ControlConnection, Watch
from snapd.proc import control
from snapd.proc.child import Child

STEP_TIMEOUT_S = 15.0
FUSE = "/dev/fuse"
_EXIT_TIMEOUT_S = 1.0


class LoopExport:
    """A mounted FUSE directory and, after `attach`, its loop device.

    `fuse_fd` is for the device host, also for the next one: None when none can follow. `loop` is the node, empty until
    it is attached.
    """

    def __init__(self, directory: Path, fuse_fd: int, *, read_only: bool, restartable: bool, loop: str = "") -> None:
        self.fuse_fd: int | None = fuse_fd
        self.loop = loop
        self._directory = directory
        self._read_only = read_only
        self._restartable = restartable

    @classmethod
    async def open(cls, directory: Path, *, read_only: bool) -> "LoopExport":
        """Mount below `directory`, which only we may enter; nobody need serve it yet.

        Errors: EPERM for an ordinary user, EOPNOTSUPP for a system without FUSE or loop devices, ETIMEDOUT.
        """
        if (missing := _missing()) is not None:
            raise missing
        await clear(directory)
        mount = directory / "loop"
        try:
            mount.mkdir(mode=0o700)
            fuse_fd = os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SnapdError.from_os(error, f"prepare {mount}") from error
        try:
            message = {"verb": "mount", "directory": str(mount), "read_only": read_only}
            reply = await _help("mount the device's directory", message, [fuse_fd])
        except SnapdError:
            os.close(fuse_fd)
            with contextlib.suppress(SnapdError):
                await clear(directory)
            raise
        return cls(directory, fuse_fd, read_only=read_only, restartable=bool(reply["restartable"]))

    @classmethod
    async def adopt(cls, directory: Path, fuse_fd: int) -> "LoopExport | None":
        """What a former daemon attached, with the descriptor that its device host still has; None when it had not."""
        try:
            record = json.loads(_record(directory).read_bytes())
        except (OSError, ValueError):
            os.close(fuse_fd)
            await clear(directory)
            return None
        export = cls(
            directory,
            fuse_fd,
            read_only=record["read_only"],
            restartable=record["restartable"],
            loop=record["loop"],
        )
        export._let_go_if_not_restartable()
        return export

    async def attach(self) -> str:
        """Have the loop device, once a device host serves; returns its node. Errors: ETIMEDOUT, EOPNOTSUPP."""
        message = {"verb": "attach", "file": _file(self._directory), "read_only": self._read_only}
        try:
            reply = await _help("attach the loop device", message)
            self.loop = str(reply["loop"])
            await asyncio.to_thread(self._write_record)
        except SnapdError:
            with contextlib.suppress(SnapdError):
                await self.abandon()
            raise
        self._let_go_if_not_restartable()
        return self.loop

    async def detach(self) -> None:
        """End it while the device still serves. EBUSY, and it is as it was, when somebody uses it."""
        message = {"verb": "detach", "file": _file(self._directory), "in_use": False}
        await _help(f"detach {self.loop}", message)
        await self.abandon()

    async def abandon(self) -> None:
        """End it whoever uses it, who gets EIO: the device will not be served any more."""
        try:
            await clear(self._directory)
        finally:
            self.close()

    def close(self) -> None:
        """Close our copy of the descriptor, and leave the rest to the next daemon."""
        if self.fuse_fd is not None:
            os.close(self.fuse_fd)
            self.fuse_fd = None

    def _let_go_if_not_restartable(self) -> None:
        if not self._restartable:
            self.close()

    def _write_record(self) -> None:
        record = {"loop": self.loop, "read_only": self._read_only, "restartable": self._restartable}
        with new_file(str(_record(self._directory)), inputs=()) as file:
            file.write(json.dumps(record).encode(), 0)


async def clear(directory: Path) -> None:
    """Have no mount and no loop device of `directory`, whatever is left of them; harmless when there is nothing."""
    # By its name alone: to look at it would be to ask its device host.
    if directory.exists() and "loop" in os.listdir(directory):
        await _help("detach the loop device", {"verb": "detach", "file": _file(directory), "in_use": True})
        await _help("unmount the device's directory", {"verb": "unmount", "directory": str(directory / "loop")})
    _record(directory).unlink(missing_ok=True)


def probe() -> str | None:
    """Why there can be no loop devices here; None when there can."""
    missing = _missing()
    return None if missing is None else str(missing)


def _missing() -> SnapdError | None:
    if os.geteuid() != 0:
        return SnapdError(errno.EPERM, f"a loop device needs root, and we are user {os.geteuid()}")
    for node in (FUSE, CONTROL):
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                return SnapdError(errno.EPERM, f"a loop device needs {node}, which we may not open")
            return SnapdError(errno.EOPNOTSUPP, f"a loop device needs {node}: {os.strerror(error.errno or errno.EIO)}")
    return None


def _file(directory: Path) -> str:
    return str(directory / "loop" / NAME.decode())


def _record(directory: Path) -> Path:
    return directory / "loop.json"


async def _help(step: str, message: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
    """Have a helper do one step; it is gone afterwards, unless the kernel keeps it."""
    ours, theirs = control.pair()
    try:
        child = Child.spawn("snapd.device.attach", [], [theirs.fileno()])
    except SnapdError:
        ours.close()
        raise
    finally:
        theirs.close()
    # Also reaps it, however late that is.
    watch = Watch(child.pid, child.pidfd, child=True)
    link = ControlConnection(ours, lambda _: None)
    try:
        reply, _ = await link.call(message, fds, timeout_s=STEP_TIMEOUT_S)
    except SnapdError as error:
        if error.errno == errno.ETIMEDOUT:
            raise SnapdError(errno.ETIMEDOUT, f"{step}: not done within {STEP_TIMEOUT_S:.0f} s") from error
        raise SnapdError(error.errno, f"{step}: {error}") from error
    finally:
        link.close()
        watch.kill()
        # What it was doing must be over before anything is undone.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(watch.exited(), _EXIT_TIMEOUT_S)
    return reply

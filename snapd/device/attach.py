"""`python -I -m snapd.device.attach`: mount a device's FUSE directory, make its file a loop device, and undo it.

One verb, one reply, on the control connection that is descriptor 3, and the process ends. A process of its own because
each of these calls can wait for the device host without end: whoever asked kills it then. Neither the daemon
nor a process that serves a device makes any of them.

| verb | with | does |
| --- | --- | --- |
| `mount` | `directory`, `read_only`, a `/dev/fuse` descriptor | `restartable` in the reply: is Linux 6.9 or newer? |
| `attach` | `file`, `read_only` | the reply's `loop` is the loop device of the file |
| `detach` | `file`, `in_use` | see `loopctl.detach` |
| `unmount` | `directory` | unmounts and removes the directory; when somebody stands in it, behind his back |
"""

import ctypes
import errno
import os
import socket
import sys
import time
from typing import Any

from snapd.block.errors import SnapdError
from snapd.device import loopctl
from snapd.device.control import refusal
from snapd.device.fuse import MAX_IO_BYTES, NOTIFY_RESEND
from snapd.proc import control
from snapd.proc.child import FIRST_FD
from snapd.proc.control import Message

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_UNMOUNT_TRIES = 50
_UNMOUNT_POLL_S = 0.02


def mount(directory: str, fuse_fd: int, *, read_only: bool) -> bool:
    """Mount `fuse_fd` at `directory`, for root alone; true if the kernel can send requests again."""
    options = f"fd={fuse_fd},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read={MAX_IO_BYTES}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | (_MS_RDONLY if read_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"ota-snapd", os.fsencode(directory), b"fuse.ota-snapd", ctypes.c_ulong(flags), options.encode()):
        raise SnapdError.from_os(OSError(ctypes.get_errno(), ""), f"mount a FUSE file system at {directory}")
    try:
        os.write(fuse_fd, NOTIFY_RESEND)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise SnapdError.from_os(error, f"use the FUSE file system at {directory}") from error
        return False
    return True


def unmount(directory: str) -> None:
    """Have nothing mounted at `directory`, and no such directory; harmless when there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    for last in (*[False] * _UNMOUNT_TRIES, True):
        if not libc.umount2(os.fsencode(directory), _UMOUNT_NOFOLLOW | (_MNT_DETACH if last else 0)):
            break
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):
            # Not mounted.
            break
        if number != errno.EBUSY:
            raise SnapdError.from_os(OSError(number, ""), f"unmount {directory}")
        # A loop device lets go of its file a little after it is detached.
        time.sleep(_UNMOUNT_POLL_S)
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SnapdError.from_os(error, f"remove {directory}") from error


def _do(message: Message, fds: list[int]) -> dict[str, Any]:
    match message.get("verb"):
        case "mount":
            return {"restartable": mount(message["directory"], fds[0], read_only=message["read_only"])}
        case "attach":
            return {"loop": loopctl.attach(message["file"], read_only=message["read_only"])}
        case "detach":
            loopctl.detach(message["file"], in_use=message["in_use"])
        case "unmount":
            unmount(message["directory"])
        case verb:
            raise SnapdError(errno.EINVAL, f"unknown verb {verb!r}")
    return {}


def main() -> int:
    connection = socket.socket(fileno=FIRST_FD)
    received = control.receive(connection)
    if received is None:
        return 0
    message, fds = received
    try:
        reply: Message = {"ok": True, **_do(message, fds)}
    except SnapdError as error:
        reply = refusal(error)
    control.send(connection, {**reply, "id": message.get("id")})
    return 0 if reply["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

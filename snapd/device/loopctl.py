"""Loop devices: a file as `/dev/loopN`, by the kernel's own calls.

Whoever opens the file or the loop device of a device that nobody serves waits, so all of this is for a process that
can be killed.
"""

import errno
import fcntl
import glob
import os
import struct
import time

from snapd.block.errors import SnapdError

CONTROL = "/dev/loop-control"
_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_CLR_FD = 0x4C01
_READ_ONLY, _DIRECT_IO = 1, 16
# File descriptor, block size (0: as the kernel finds best); of the status the flags and the file's name.
_CONFIG = struct.Struct("=II52xI63sx176x")
_ATTEMPTS = 16
_RELEASE_TIMEOUT_S = 5.0
_RELEASE_POLL_S = 0.02


def attach(path: str, *, read_only: bool) -> str:
    """Make `path` a loop device of direct I/O, which never caches what its file need not know; returns its node.

    Errors: EOPNOTSUPP without loop devices or with a Linux before 5.8; else the system's.
    """
    try:
        file_fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise SnapdError.from_os(error, f"open {path}") from error
    try:
        flags = _DIRECT_IO | (_READ_ONLY if read_only else 0)
        config = _CONFIG.pack(file_fd, 0, flags, os.fsencode(path)[-63:])
        for _ in range(_ATTEMPTS):
            node = _free_node()
            if _configure(node, config):
                return node
        raise SnapdError(errno.EBUSY, f"others took every free loop device, {_ATTEMPTS} times")
    finally:
        os.close(file_fd)


def detach(path: str, *, in_use: bool) -> None:
    """Have no loop device of `path`; harmless when there is none.

    Errors: EBUSY, and nothing has changed, for one that is mounted or part of another device; EBUSY also when somebody
    else keeps it open, with whose close it ends. With `in_use` it only begins to end then, and that is no error.
    """
    for node in nodes_of(path):
        try:
            fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC | (0 if in_use else os.O_EXCL))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise SnapdError(errno.EBUSY, f"{node} is mounted, or part of another device") from error
            raise SnapdError.from_os(error, f"open {node}") from error
        try:
            fcntl.ioctl(fd, _CLR_FD)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise SnapdError.from_os(error, f"detach {node}") from error
        finally:
            os.close(fd)
        if not in_use:
            _wait_for_release(node, path)


def nodes_of(path: str) -> list[str]:
    """The loop devices of a file; says only what the kernel remembers, without touching the file."""
    nodes = []
    for name in glob.glob("/sys/block/loop*/loop/backing_file"):
        try:
            with open(name, "rb") as file:
                backing = file.read().rstrip(b"\n")
        except OSError:
            # It has just been detached.
            continue
        if backing == os.fsencode(path):
            nodes.append(f"/dev/{name.split('/')[3]}")
    return nodes


def _free_node() -> str:
    try:
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            return f"/dev/loop{fcntl.ioctl(fd, _CTL_GET_FREE)}"
        finally:
            os.close(fd)
    except OSError as error:
        raise SnapdError.from_os(error, f"find a free loop device with {CONTROL}") from error


def _configure(node: str, config: bytes) -> bool:
    """True when it is ours, False when somebody was faster."""
    try:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _CONFIGURE, config)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno == errno.ENOENT:
            raise SnapdError(errno.EOPNOTSUPP, f"the kernel has a free loop device, but there is no {node}") from error
        raise SnapdError.from_os(error, f"attach {node}") from error
    return True


def _wait_for_release(node: str, path: str) -> None:
    end = time.monotonic() + _RELEASE_TIMEOUT_S
    while node in nodes_of(path):
        if time.monotonic() > end:
            raise SnapdError(errno.EBUSY, f"{node} is kept open by somebody; it is detached with the last close")
        # The kernel tells nobody when the last close is.
        time.sleep(_RELEASE_POLL_S)

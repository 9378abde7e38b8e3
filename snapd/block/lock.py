"""Opening a host path under a lock: one writer, or any number of readers.

The lock (`flock`) belongs to the open file description: it lives as long as any process holds a copy of the
descriptor, also one handed on, and is gone when the last of them closed it or died.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore, file_store


def open_locked(path: str | os.PathLike[str], *, writable: bool = True) -> int:
    """A descriptor of `path`: to write with the exclusive lock, to read with a shared one.

    Block devices are opened O_EXCL as well, so that a mounted one is refused. Errors: EBUSY when somebody's lock,
    or use of the device, excludes ours; EINVAL when it is neither a regular file nor a block device; else the system's.
    """
    name = os.fspath(path)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    fd = -1
    try:
        mode = os.stat(name).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SnapdError(errno.EINVAL, f"{name}: neither a regular file nor a block device")
        if stat.S_ISBLK(mode):
            flags |= os.O_EXCL
        fd = os.open(name, flags)
        fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno == errno.EAGAIN:
            raise SnapdError(errno.EBUSY, f"{name}: in use, somebody else holds its lock") from error
        raise SnapdError.from_os(error, f"open {name}") from error
    return fd


@contextlib.contextmanager
def locked_store(path: str | os.PathLike[str], *, writable: bool = False) -> Iterator[FileStore]:
    """The store of `path`, under its lock as long as the context lives; errors as from `open_locked`."""
    fd = open_locked(path, writable=writable)
    try:
        yield file_store(fd, os.fspath(path))
    finally:
        os.close(fd)

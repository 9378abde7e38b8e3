"""Stores over file descriptors: a regular file and a block device.

Positional, buffered I/O only: several processes share one descriptor, so nothing here depends on or moves the
file position, and O_DIRECT is never mixed in.
"""

import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, WritableBuffer

_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_FALLOC_PUNCH_HOLE_KEEP_SIZE = 0x03
_ZEROS = bytes(1 << 20)


class FileStore:
    """A regular file. The descriptor is borrowed: whoever opened it closes it.

    Errors: `SnapdError` with the system's errno; a read behind the end is EIO.
    """

    def __init__(self, fd: int, name: str = "") -> None:
        self.fd = fd
        self.name = name or f"descriptor {fd}"
        self._read_flags = os.RWF_NOWAIT

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        view = memoryview(buffer)
        try:
            got = os.preadv(self.fd, [view], offset)
            while got < len(view):
                more = os.preadv(self.fd, [view[got:]], offset + got)
                if not more:
                    raise SnapdError(errno.EIO, f"{self.name}: nothing to read at byte {offset + got}, behind the end")
                got += more
        except OSError as error:
            raise SnapdError.from_os(error, f"read {len(view)} bytes of {self.name} at {offset}") from error

    def read_cached(self, buffer: memoryview, offset: int) -> bool:
        """Fill the whole buffer if that takes no disk; else have the range fetched, and return False."""
        try:
            if os.preadv(self.fd, [buffer], offset, self._read_flags) == len(buffer):
                return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                return False
            # A file system in memory, where nothing ever waits.
            self._read_flags = 0
            return self.read_cached(buffer, offset)
        os.posix_fadvise(self.fd, offset, len(buffer), os.POSIX_FADV_WILLNEED)
        return False

    def write(self, data: Buffer, offset: int) -> None:
        try:
            done = os.pwrite(self.fd, data, offset)
            if done < len(data):
                view = memoryview(data)
                while done < len(view):
                    done += os.pwrite(self.fd, view[done:], offset + done)
        except OSError as error:
            raise SnapdError.from_os(error, f"write {len(data)} bytes to {self.name} at {offset}") from error

    def flush(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise SnapdError.from_os(error, f"flush {self.name}") from error

    def discard(self, offset: int, length: int) -> None:
        # Discard is a hint: a file system without holes may keep the data.
        self.unmap(offset, length)

    def unmap(self, offset: int, length: int) -> bool:
        """Make the range read as zeros by giving up its space; False, with nothing changed, if it cannot be."""
        number = _libc_fallocate()(self.fd, _FALLOC_PUNCH_HOLE_KEEP_SIZE, offset, length)
        if number not in (0, errno.EOPNOTSUPP, errno.ENOSYS):
            raise SnapdError.from_os(OSError(number, ""), f"discard in {self.name} at {offset}")
        return not number

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            step = min(end - offset, len(_ZEROS))
            self.write(memoryview(_ZEROS)[:step], offset)
            offset += step

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise SnapdError.from_os(error, f"cut {self.name} to {size} bytes") from error


class BlockDeviceStore(FileStore):
    """A block device: its size is the kernel's, and it cannot grow."""

    def size(self) -> int:
        raw = fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("Q", raw)[0])

    def discard(self, offset: int, length: int) -> None:
        try:
            fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("QQ", offset, length))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise SnapdError.from_os(error, f"discard in {self.name} at {offset}") from error

    def unmap(self, _offset: int, _length: int) -> bool:
        """Never: what a device reads as after a discard is its own affair."""
        return False

    def zero(self, offset: int, length: int) -> None:
        try:
            fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
        except OSError as error:
            raise SnapdError.from_os(error, f"zero in {self.name} at {offset}") from error

    def truncate(self, size: int) -> None:
        """Nothing: a device has no end to move."""


def file_store(fd: int, name: str = "") -> FileStore:
    """The store for whatever `fd` is; EINVAL unless it is a regular file or a block device."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        return BlockDeviceStore(fd, name)
    if stat.S_ISREG(mode):
        return FileStore(fd, name)
    raise SnapdError(errno.EINVAL, f"{name or fd}: neither a regular file nor a block device")


@functools.cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    """fallocate(2), which returns an errno number; the standard library has posix_fallocate only, without holes."""
    # Here, not above: most processes never need it, and it takes a while to load.
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        return ctypes.get_errno() if function(fd, mode, offset, length) else 0

    return fallocate

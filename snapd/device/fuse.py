"""The FUSE messages of a mounted device: a directory with one file, `image`, that is as large as the device.

Requests come from the kernel through `/dev/fuse`, one a read; answers go back, one a write. `Session` answers all that
is not block I/O from constants alone, so that a device host that takes over in the middle of a mount, where the kernel
does not introduce itself again, gives the very answers of its predecessor. All numbers are in the machine's own byte
order.

No cache stands between a write and the device: the file is opened for direct I/O and the kernel's writeback cache is
not asked for, so what the kernel is told is written has reached the device's store.
"""

import errno
import os
import stat
import struct
from enum import IntEnum, IntFlag

from snapd.block.errors import SnapdError

MAX_IO_BYTES = 1 << 20
"""The largest READ or WRITE."""
NAME = b"image"
PAGE_BYTES = 4096

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""Length, opcode, unique, node, user, group, process, extension length, padding."""
OUT_HEADER = struct.Struct("=IiQ")
"""Length, negative errno, unique (or 0, and a notification's number in place of the errno)."""
IO_IN = struct.Struct("=QQIIQII")
"""READ and WRITE: handle, offset, size, their flags, lock owner, the file's open flags, padding."""
WRITE_OUT = struct.Struct("=II")
FALLOCATE_IN = struct.Struct("=QQQII")
"""Handle, offset, length, mode, padding."""
HEAD_BYTES = IN_HEADER.size + IO_IN.size
"""What stands in front of a WRITE's payload."""
NOTIFY_RESEND = OUT_HEADER.pack(OUT_HEADER.size, 7, 0)
"""Asks the kernel for everything again that was read and never answered (Linux 6.9)."""

_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_OUT = struct.Struct("=QQQQII")
_ATTRIBUTES_OUT = struct.Struct("=QII")
_OPEN_IN = struct.Struct("=II")
_OPEN_OUT = struct.Struct("=QII")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")

_MAJOR, _MINOR = 7, 40
_ROOT, _IMAGE = 1, 2
_FOREVER_S = 1 << 31
_READAHEAD_BYTES = 1 << 20
# Requests that the kernel has under way at a time for readers that do not wait: a loop device's queue has 128.
_MAX_BACKGROUND, _CONGESTED = 128, 96


class Opcode(IntEnum):
    """What a request asks for; those that are not listed are answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    TMPFILE = 51


class InitFlag(IntFlag):
    """What kernel and server can agree on in INIT, of all that there is the part we want."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


class FallocateMode(IntFlag):
    """What FALLOCATE is to do with its range."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


class OpenFlag(IntFlag):
    """How the kernel is to treat an open file."""

    DIRECT_IO = 1 << 0
    PARALLEL_DIRECT_WRITES = 1 << 6


_WANTED = InitFlag(sum(InitFlag))
_UNANSWERED = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
# Names, attributes and nothing else: the directory is as it is.
_CHANGES = (
    *(Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.LINK),
    *(Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.CREATE, Opcode.RENAME2, Opcode.TMPFILE),
)


def reply(unique: int, payload: bytes = b"") -> bytes:
    """The answer to a request that was done."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def refusal(unique: int, number: int) -> bytes:
    """The answer to a request that failed with a positive errno number."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def read_header(unique: int, length: int) -> bytes:
    """What goes in front of the `length` bytes of a READ, in the same write."""
    return OUT_HEADER.pack(OUT_HEADER.size + length, 0, unique)


class Session:
    """The directory and its file, of `size_bytes`, as root alone sees them."""

    def __init__(self, size_bytes: int, *, read_only: bool) -> None:
        self._size_bytes = size_bytes
        self._read_only = read_only

    def answer(self, opcode: int, unique: int, node: int, body: bytes) -> bytes | None:
        """The answer to a request other than READ, WRITE, FSYNC and FALLOCATE; None for those that get none."""
        if opcode in _UNANSWERED:
            return None
        try:
            return reply(unique, self._do(opcode, node, body))
        except SnapdError as error:
            return refusal(unique, error.errno)
        except struct.error:
            # Shorter than its kind can be.
            return refusal(unique, errno.EINVAL)

    def _do(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case Opcode.INIT:
                return _negotiate(body)
            case Opcode.LOOKUP:
                return self._lookup(node, body)
            case Opcode.GETATTR:
                return _ATTRIBUTES_OUT.pack(_FOREVER_S, 0, 0) + self._attributes(node)
            case Opcode.OPEN:
                return self._open(node, body)
            case Opcode.OPENDIR:
                return _OPEN_OUT.pack(0, 0, 0)
            case Opcode.READDIR:
                return _list(body)
            case Opcode.STATFS:
                blocks = self._size_bytes // PAGE_BYTES
                return _STATFS_OUT.pack(blocks, 0, 0, 2, 0, PAGE_BYTES, len(NAME), PAGE_BYTES, 0)
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.DESTROY:
                return b""
            case Opcode.SETATTR:
                raise SnapdError(errno.EROFS if self._read_only else errno.EPERM, "what the file is, it stays")
        # What the kernel can do without, it does not ask for a second time.
        raise SnapdError(errno.EROFS if opcode in _CHANGES else errno.ENOSYS, f"request {opcode}")

    def _lookup(self, node: int, body: bytes) -> bytes:
        if node != _ROOT:
            raise SnapdError(errno.ENOTDIR, f"node {node} has no entries")
        name, _, _ = body.partition(b"\0")
        if name != NAME:
            raise SnapdError(errno.ENOENT, f"no {name!r}")
        return _ENTRY_OUT.pack(_IMAGE, 0, _FOREVER_S, _FOREVER_S, 0, 0) + self._attributes(_IMAGE)

    def _attributes(self, node: int) -> bytes:
        if node == _ROOT:
            size, mode, links = 0, stat.S_IFDIR | 0o500, 2
        elif node == _IMAGE:
            size, mode, links = self._size_bytes, stat.S_IFREG | (0o400 if self._read_only else 0o600), 1
        else:
            raise SnapdError(errno.ENOENT, f"no node {node}")
        times = (0,) * 6
        return _ATTRIBUTES.pack(node, size, size // 512, *times, mode, links, 0, 0, 0, PAGE_BYTES, 0)

    def _open(self, node: int, body: bytes) -> bytes:
        if node != _IMAGE:
            raise SnapdError(errno.EISDIR, f"node {node} is not the file")
        (flags, _) = _OPEN_IN.unpack_from(body)
        if self._read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise SnapdError(errno.EROFS, "a read-only device")
        return _OPEN_OUT.pack(0, OpenFlag.DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES, 0)


def _negotiate(body: bytes) -> bytes:
    major, minor, readahead_bytes, low_flags = _INIT_IN.unpack_from(body)
    if major < _MAJOR:
        raise SnapdError(errno.EPROTO, f"FUSE {major}.{minor}: {_MAJOR} is needed")
    offered = low_flags
    if low_flags & InitFlag.INIT_EXT:
        (high_flags,) = struct.unpack_from("=I", body, _INIT_IN.size)
        offered |= high_flags << 32
    flags = _WANTED & offered
    return _INIT_OUT.pack(
        _MAJOR,
        # A newer major comes back with an INIT of ours, and means nothing by its minor until then.
        min(minor, _MINOR) if major == _MAJOR else _MINOR,
        min(readahead_bytes, _READAHEAD_BYTES),
        flags & 0xFFFF_FFFF,
        _MAX_BACKGROUND,
        _CONGESTED,
        MAX_IO_BYTES,
        1,
        MAX_IO_BYTES // PAGE_BYTES,
        0,
        flags >> 32,
    )


def _list(body: bytes) -> bytes:
    """The directory's entries from the one that the request's offset names, as many as it has room for."""
    _, first, room_bytes, *_ = IO_IN.unpack_from(body)
    entries = ((_ROOT, stat.S_IFDIR, b"."), (_ROOT, stat.S_IFDIR, b".."), (_IMAGE, stat.S_IFREG, NAME))
    listed = b""
    for at, (node, kind, name) in enumerate(entries[first:], first + 1):
        entry = _DIRENT.pack(node, at, len(name), kind >> 12) + name
        entry += bytes(-len(entry) % 8)
        if len(listed) + len(entry) > room_bytes:
            break
        listed += entry
    return listed

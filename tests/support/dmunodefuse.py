"""The nodes of `dmunodemodel` as files of a FUSE file system, served by one thread over raw /dev/fuse."""

import contextlib
import ctypes
import errno
import os
import stat
import struct
from enum import IntEnum

from dmunodemodel import Channel, Node, Refused

MAX_WRITE_BYTES = 1 << 20

_LIBC = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_READ_IN = struct.Struct("<QQI")
_WRITE_IN_BYTES = 40
_INIT_FLAGS = 1 << 5 | 1 << 22
"""Large writes, and as many pages as we ask for."""
_OPEN_FLAGS = 1 << 0 | 1 << 2 | 1 << 4
"""FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, FOPEN_STREAM: every read and write comes as it was made, none excludes any."""
_ROOT = 1


class Code(IntEnum):
    """What the kernel asks a FUSE server for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    BATCH_FORGET = 42


class FuseFront:
    """The nodes as files."""

    def __init__(self, directory: str) -> None:
        self.nodes: dict[str, Node] = {}
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._directory = directory.encode()
        self._inodes: dict[int, Node] = {}
        self._channels: dict[int, Channel] = {}
        self._next_number = _ROOT + 1
        self._request = memoryview(bytearray(MAX_WRITE_BYTES + (64 << 10)))
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,default_permissions".encode()
        if _LIBC.mount(b"dm-user", self._directory, b"fuse.dm-user", 6, options):
            number = ctypes.get_errno()
            raise OSError(number, f"mount: {os.strerror(number)}")

    def unmount(self) -> None:
        """Cut the connection first: then nothing below the mount can wait for us."""
        os.close(self.device)
        _LIBC.umount2(self._directory, _MNT_DETACH)

    def add(self, name: str, node: Node) -> None:
        self.nodes[name] = node
        self._inodes[self._take_number()] = node

    def remove(self, name: str) -> None:
        self.nodes[name].destroy()
        del self.nodes[name]

    def serve(self) -> None:
        """Answer what the kernel has asked."""
        while True:
            try:
                got = os.readv(self.device, [self._request])
            except BlockingIOError:
                break
            except OSError as error:
                # Interrupted, or taken back before we came to it.
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, code, unique, inode, *_ = _IN.unpack_from(self._request)
            body = bytes(self._request[_IN.size : got])
            try:
                reply = self._do(code, unique, inode, body)
            except Refused as refusal:
                self._reply(unique, -refusal.number, b"")
            else:
                if reply is not None:
                    self._reply(unique, 0, reply)
        self.wake()

    def wake(self) -> None:
        """Let writes and reads go on that were stopped or blocked, and can."""
        for channel in list(self._channels.values()):
            while channel.held_writes and not channel.is_held:
                unique, data = channel.held_writes.popleft()
                self._reply(unique, 0, struct.pack("<II", channel.write(data), 0))
            while channel.blocked:
                unique, size = channel.blocked[0]
                try:
                    found = channel.read(size)
                except Refused as refusal:
                    self._reply(unique, -refusal.number, b"")
                else:
                    if found is None:
                        break
                    self._reply(unique, 0, found)
                channel.blocked.popleft()

    def _do(self, code: int, unique: int, inode: int, body: bytes) -> bytes | None:
        """The reply's content; None when there is none, or none yet."""
        if code == Code.INIT:
            (readahead,) = struct.unpack_from("<8xI", body)
            packed = struct.pack("<IIIIHHIIHH", 7, 31, readahead, _INIT_FLAGS, 16, 12, MAX_WRITE_BYTES, 1, 256, 0)
            return packed.ljust(64, b"\0")
        if code == Code.LOOKUP:
            return self._lookup(body.rstrip(b"\0").decode())
        if code in (Code.GETATTR, Code.SETATTR):
            return struct.pack("<QII", 0, 0, 0) + self._attributes(inode)
        if code == Code.OPEN:
            return self._open(inode)
        if code == Code.OPENDIR:
            return struct.pack("<QII", 0, 0, 0)
        if code == Code.READ:
            return self._read(unique, body)
        if code == Code.WRITE:
            return self._write(unique, body)
        if code == Code.RELEASE:
            channel = self._channels.pop(_READ_IN.unpack_from(body)[0])
            channel.node.close(channel)
            return b""
        if code == Code.INTERRUPT:
            self._interrupt(struct.unpack_from("<Q", body)[0])
            return None
        if code == Code.STATFS:
            return bytes(80)
        if code in (Code.FORGET, Code.BATCH_FORGET):
            return None
        if code in (Code.FLUSH, Code.READDIR, Code.RELEASEDIR):
            return b""
        raise Refused(errno.ENOSYS)

    def _lookup(self, name: str) -> bytes:
        for inode, node in self._inodes.items():
            if node is self.nodes.get(name):
                return struct.pack("<QQQQII", inode, 0, 0, 0, 0, 0) + self._attributes(inode)
        raise Refused(errno.ENOENT)

    def _attributes(self, inode: int) -> bytes:
        mode, links = (stat.S_IFDIR | 0o755, 2) if inode == _ROOT else (stat.S_IFREG | 0o600, 1)
        return struct.pack("<6Q10I", inode, *(0,) * 5, *(0,) * 3, mode, links, 0, 0, 0, 4096, 0)

    def _open(self, inode: int) -> bytes:
        node = self._inodes[inode]
        if node.is_destroyed:
            raise Refused(errno.ENXIO)
        handle = self._take_number()
        self._channels[handle] = node.open()
        return struct.pack("<QII", handle, _OPEN_FLAGS, 0)

    def _read(self, unique: int, body: bytes) -> bytes | None:
        handle, _, size = _READ_IN.unpack_from(body)
        channel = self._channels[handle]
        found = channel.read(size)
        if found is None:
            channel.blocked.append((unique, size))
        return found

    def _write(self, unique: int, body: bytes) -> bytes | None:
        handle, _, size = _READ_IN.unpack_from(body)
        channel, data = self._channels[handle], body[_WRITE_IN_BYTES : _WRITE_IN_BYTES + size]
        if channel.is_held:
            channel.held_writes.append((unique, data))
            return None
        return struct.pack("<II", channel.write(data), 0)

    def _interrupt(self, unique: int) -> None:
        for channel in self._channels.values():
            for blocked in channel.blocked:
                if blocked[0] == unique:
                    channel.blocked.remove(blocked)
                    self._reply(unique, -errno.EINTR, b"")
                    return

    def _reply(self, unique: int, number: int, content: bytes) -> None:
        # Whoever asked may be gone.
        with contextlib.suppress(FileNotFoundError):
            os.writev(self.device, [_OUT.pack(_OUT.size + len(content), number, unique), content])

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number

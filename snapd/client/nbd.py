"""A plain blocking NBD client for the service's exports.

One thread, one connection. A read of any length is cut into requests of which several are under way at once; their
payload is received straight into the caller's buffer, in whatever order the server replies.
"""

import errno
import socket
import struct
from urllib.parse import parse_qs, urlsplit

from snapd.block.errors import SnapdError
from snapd.block.store import WritableBuffer
from snapd.device.nbd import (
    CLIENT_FLAGS,
    DEFAULT_PORT,
    FIXED_NEWSTYLE,
    GREETING,
    GREETING_MAGIC,
    INFO_EXPORT,
    NO_ZEROES,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    Info,
    Option,
    OptionReply,
)

_TIMEVAL = struct.Struct("@ll")
_REQUEST_BYTES = 256 << 10
_DEPTH = 8
_MAX_OPTION_REPLY_BYTES = 64 << 10


class NbdClient:
    """A connection to one export; a context manager.

    `size_bytes` is the export's size, `flags` its transmission flags. After an error of the connection itself
    (anything but EIO, EINVAL or EPERM for one request) only `close` is left.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._next_cookie = 0
        self.size_bytes, self.flags = self._handshake()

    @classmethod
    def connect(cls, address: str, timeout_s: float = 60.0) -> "NbdClient":
        """Connect to `nbd+unix:///?socket=PATH`, `nbd://HOST[:PORT]` or the path of a unix socket.

        Every later wait ends after `timeout_s` too. Errors: EINVAL for another address; else the system's.
        """
        try:
            connection = _connect(address, timeout_s)
        except OSError as error:
            raise SnapdError.from_os(error, f"connect to {address}") from error
        try:
            return cls(connection)
        except (SnapdError, OSError) as error:
            connection.close()
            if isinstance(error, OSError):
                raise _lost(error) from error
            raise

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill the whole buffer from byte `offset`; the server's errno when it refuses or fails a piece."""
        out = memoryview(buffer)
        under_way: dict[int, memoryview] = {}
        asked = failed = 0
        try:
            while asked < len(out) or under_way:
                requests = bytearray()
                while asked < len(out) and len(under_way) < _DEPTH:
                    piece = out[asked : asked + _REQUEST_BYTES]
                    under_way[self._next_cookie] = piece
                    requests += REQUEST.pack(
                        REQUEST_MAGIC, 0, Command.READ, self._next_cookie, offset + asked, len(piece)
                    )
                    self._next_cookie += 1
                    asked += len(piece)
                self._socket.sendall(requests)
                failed = self._receive_reply(under_way) or failed
        except OSError as error:
            raise _lost(error) from error
        if failed:
            raise SnapdError(failed, f"read of {len(out)} bytes at {offset}: the server answered error {failed}")

    def close(self) -> None:
        """Say goodbye and hang up."""
        try:
            self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
        except OSError:
            # The server hung up first.
            pass
        finally:
            self._socket.close()

    def _receive_reply(self, under_way: dict[int, memoryview]) -> int:
        magic, number, cookie = REPLY.unpack(self._receive(REPLY.size))
        piece = under_way.pop(cookie, None)
        if magic != REPLY_MAGIC or piece is None:
            raise SnapdError(errno.EPROTO, f"reply with magic {magic:#x} to request {cookie}")
        if not number:
            self._fill(piece)
        return int(number)

    def _handshake(self) -> tuple[int, int]:
        magic, option_magic, flags = GREETING.unpack(self._receive(GREETING.size))
        if (magic, option_magic) != (GREETING_MAGIC, OPTION_MAGIC) or not flags & FIXED_NEWSTYLE:
            raise SnapdError(errno.EPROTO, "not a fixed newstyle NBD server")
        # The export with the empty name, and no wish for particular information.
        name_and_infos = bytes(6)
        self._socket.sendall(
            CLIENT_FLAGS.pack(FIXED_NEWSTYLE | flags & NO_ZEROES)
            + OPTION.pack(OPTION_MAGIC, Option.GO, len(name_and_infos))
            + name_and_infos
        )
        export: tuple[int, int] | None = None
        while True:
            magic, option, kind, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
            if magic != OPTION_REPLY_MAGIC or option != Option.GO or length > _MAX_OPTION_REPLY_BYTES:
                raise SnapdError(errno.EPROTO, "an option reply that makes no sense")
            data = self._receive(length)
            if kind == OptionReply.ACK and export is not None:
                return export
            if kind != OptionReply.INFO:
                raise SnapdError(errno.ENXIO, f"the server refuses the export: reply {kind:#x}")
            if len(data) == INFO_EXPORT.size and data[:2] == Info.EXPORT.to_bytes(2, "big"):
                _, size_bytes, export_flags = INFO_EXPORT.unpack(data)
                export = size_bytes, export_flags

    def _receive(self, length: int) -> bytearray:
        data = bytearray(length)
        self._fill(memoryview(data))
        return data

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            got = self._socket.recv_into(buffer)
            if not got:
                raise SnapdError(errno.ENOTCONN, "the NBD server hung up")
            buffer = buffer[got:]


def _connect(address: str, timeout_s: float) -> socket.socket:
    parts = urlsplit(address)
    if parts.scheme == "nbd":
        return socket.create_connection((parts.hostname or "localhost", parts.port or DEFAULT_PORT), timeout_s)
    path = parse_qs(parts.query).get("socket", [""])[0] if parts.scheme == "nbd+unix" else address
    if not path or (parts.scheme and parts.scheme != "nbd+unix"):
        raise SnapdError(errno.EINVAL, f"{address}: not an NBD address or the path of a socket")
    connection = socket.socket(socket.AF_UNIX)
    # The system's timeout at first: with one of its own, a socket does not wait for a place in a full backlog.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), 0))
    try:
        connection.connect(path)
        connection.settimeout(timeout_s)
    except OSError:
        connection.close()
        raise
    return connection


def _lost(error: OSError) -> SnapdError:
    if isinstance(error, TimeoutError):
        return SnapdError(errno.ETIMEDOUT, "the NBD server does not answer")
    return SnapdError.from_os(error, "NBD connection")

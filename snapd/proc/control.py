"""Control messages: one JSON object a packet, with descriptors, on a unix SOCK_SEQPACKET socket.

A packet is whole or absent, so a peer that dies never leaves half a message. Received descriptors are
close-on-exec.
"""

import contextlib
import errno
import json
import os
import socket
from typing import Any

from snapd.block.errors import SnapdError

MAX_MESSAGE_BYTES = 64 << 10
MAX_FDS = 16

Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, for a parent and its child."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, mode 0600; a dead socket in its place is removed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(8)
    return listener


def connect(path: str, timeout_s: float) -> socket.socket:
    """A connection to `path`; the socket keeps the timeout. OSError when nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, message: Message, fds: tuple[int, ...] | list[int] = ()) -> None:
    """Send one message; OSError when the peer is gone."""
    raw = json.dumps(message).encode()
    if len(raw) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise SnapdError(errno.EMSGSIZE, f"control message of {len(raw)} bytes and {len(fds)} descriptors")
    if fds:
        socket.send_fds(connection, [raw], list(fds))
    else:
        connection.send(raw)


def receive(connection: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors; None when the peer closed. OSError as from `recv`."""
    raw, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if not raw:
        return None
    try:
        message = json.loads(raw)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
            raise ValueError("cut off, or not an object")
    except ValueError as error:
        for fd in fds:
            os.close(fd)
        raise SnapdError(errno.EPROTO, f"control message: {error}") from error
    return message, fds

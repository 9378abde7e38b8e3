"""Opening channels by path: connections to a unix stream socket, or opens of a dm-user node.

Invariant: nothing but a channel is ever read from or written to, whatever path was given.
"""

import errno
import os
import stat

from snapd.block.errors import SnapdError
from snapd.worker.arguments import Arguments


def open_channels(arguments: Arguments) -> list[int]:
    """The inherited channel, or a new one a thread; errors as from `open_channel`."""
    if arguments.channel is None:
        return [arguments.inherited["channel"]]
    path = arguments.channel
    return [open_channel(path) for _ in range(arguments.threads)]


def open_channel(path: str) -> int:
    """A new channel: a connection to a unix stream socket, or an open of a dm-user node.

    Errors: EINVAL for anything else, before a byte is read or written; else the system's.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISSOCK(mode):
            return _connect(path)
        if stat.S_ISBLK(mode) or stat.S_ISDIR(mode):
            raise SnapdError(errno.EINVAL, f"{path}: neither a unix socket nor a dm-user node")
        # By `open` a node is attached to (DMU-169).
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            os.lseek(fd, 0, os.SEEK_CUR)
        except OSError as error:
            if error.errno == errno.ESPIPE:
                return fd
        os.close(fd)
    except OSError as error:
        raise SnapdError.from_os(error, f"open the channel {path}") from error
    # A node has no position (DMU-165); whatever has one would be taken for requests, and overwritten with answers.
    raise SnapdError(errno.EINVAL, f"{path}: neither a unix socket nor a dm-user node")


def _connect(path: str) -> int:
    # Not at the top: a worker that inherits its channel starts without.
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        return connection.detach()

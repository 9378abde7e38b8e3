"""The socket form of a control node: daemons connect to it, each connection is a channel (DMU-151, DMU-154).

Whoever connects can answer reads. So the socket's file has mode 0600, which who makes it sees to, and a peer must be of
our own user or root besides (DMU-188). A connection that is not taken is closed before a byte has gone either way.
"""

import errno
import os
import socket
import struct

from snapd.block.errors import SnapdError
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.groupaddress import group_of
from snapd.dmuser.target import Target

MAX_CHANNELS = 64
_CREDENTIALS = struct.Struct("=iII")


class ChannelListener:
    """Makes channels of `target` from connections to `listener`, which it owns and never waits for."""

    def __init__(self, target: Target, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._target = target
        self._listener = listener

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._listener.fileno()

    def accept(self) -> SocketChannel | None:
        """The channel of the next connection; None when nobody is there any more.

        Errors, after which that connection is closed: EPERM for another user's process, EMFILE when `MAX_CHANNELS` are
        open, ENXIO when the target is destroyed; else the system's.
        """
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            raise SnapdError.from_os(error, "accept a daemon") from error
        try:
            self._check(connection)
            return SocketChannel(self._target, connection, group_of(address))
        except SnapdError:
            connection.close()
            raise

    def close(self) -> None:
        """Take no more connections; the channels that are open stay so (DMU-34)."""
        self._listener.close()

    def _check(self, connection: socket.socket) -> None:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(raw)
        if user not in (0, os.geteuid()):
            raise SnapdError(errno.EPERM, f"process {pid} of user {user} may not be a daemon of this device (DMU-188)")
        if self._target.channels >= MAX_CHANNELS:
            raise SnapdError(errno.EMFILE, f"{MAX_CHANNELS} channels are open")

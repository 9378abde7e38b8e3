"""A target's channel over a non-blocking stream socket (DMU-154 to DMU-156).

Connect is open, close is close, the bytes are those of `message`; only the read boundaries of the kernel's node are
not promised. All waiting messages leave in one send. READ data goes into the bio's own memory: what has already
come with the header is copied from the receive buffer, the rest is received in place, so the buffer never has to
hold a whole answer.
"""

import contextlib
import socket
import struct

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.inflight import Channel, Message
from snapd.dmuser.message import HEADER_BYTES
from snapd.dmuser.outbox import Outbox
from snapd.dmuser.target import Target

_RECEIVE_BYTES = 64 << 10
_SEQ_AND_TYPE = struct.Struct("<QQ")


class SocketChannel:
    """One connected daemon. Owns the socket; the caller waits for readiness and calls `send` and `receive`."""

    def __init__(self, target: Target, connection: socket.socket, group: str = "") -> None:
        connection.setblocking(False)
        self._socket = connection
        self._channel = target.open(group)
        self._outbox: Outbox[Message] = Outbox()
        self._has_sent = False
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._held_bytes = 0
        self._rest: memoryview | None = None

    def fileno(self) -> int:
        """The descriptor to wait on; -1 once closed."""
        return self._socket.fileno()

    def serves(self, channel: Channel) -> bool:
        """Whether the target knows this connection as `channel`."""
        return channel is self._channel

    @property
    def wants_to_send(self) -> bool:
        """Whether messages are waiting for the socket to take them."""
        return bool(self._outbox)

    def send(self) -> None:
        """Hand over what the target has queued, as far as the socket takes it."""
        while True:
            if not self._outbox:
                self._gather()
            if not self._outbox:
                break
            try:
                sent_bytes, handed_over = self._outbox.send(self._socket)
            except OSError:
                # The daemon is gone; the end of the stream tells so, and what it answered before is read first.
                if not self._has_sent:
                    self._outbox.clear()
                    self._channel.take_back()
                return
            self._has_sent = self._has_sent or sent_bytes > 0
            self._channel.handed_over(len(handed_over))
            if self._outbox:
                return
        if self._channel.ended:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def receive(self) -> bool:
        """Take in what has come; False at the end of the stream.

        Errors: EINVAL when an answer has a number this channel does not wait for; the channel is poisoned then and
        its receiving side shut down (DMU-156).
        """
        buffer = self._buffer[self._held_bytes :]
        try:
            if self._rest is None:
                got = self._socket.recv_into(buffer)
            else:
                got = self._socket.recvmsg_into([self._rest, buffer])[0]
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not got:
            return False
        if self._rest is not None:
            if got < len(self._rest):
                self._rest = self._rest[got:]
                return True
            got -= len(self._rest)
            self._rest = None
            self._channel.answered()
        try:
            self._accept(self._held_bytes + got)
        except SnapdError:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)
            raise
        return True

    def close(self) -> None:
        """Close both: the target gives back or fails what was not answered."""
        self._rest = None
        self._socket.close()
        self._channel.close()

    def _gather(self) -> None:
        while (message := self._channel.take()) is not None:
            bio = message.bio
            if bio.op is BioOp.WRITE and bio.data:
                self._outbox.put(message.header(), None)
                self._outbox.put(bio.data, message)
            else:
                self._outbox.put(message.header(), message)

    def _accept(self, end: int) -> None:
        buffer, at = self._buffer, 0
        while end - at >= HEADER_BYTES:
            message = self._channel.answer(*_SEQ_AND_TYPE.unpack_from(buffer, at))
            at += HEADER_BYTES
            if message is None:
                continue
            data = message.bio.data
            assert data is not None
            have = min(len(data), end - at)
            data[:have] = buffer[at : at + have]
            at += have
            if have < len(data):
                self._rest = data[have:]
                break
            self._channel.answered()
        self._held_bytes = end - at
        if self._held_bytes:
            buffer[: self._held_bytes] = buffer[at:end]

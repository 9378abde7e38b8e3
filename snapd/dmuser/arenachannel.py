"""A target's channel to a daemon that shares an arena with it: headers over the socket, payload in the arena.

Everything that waits leaves in one send, and everything that came is taken in before the first completion runs.
"""

import contextlib
import socket
import struct

from snapd.dmuser.arena import PLACE_SHIFT
from snapd.dmuser.message import HEADER, HEADER_BYTES
from snapd.dmuser.target import Target

_MESSAGES = 1024
_ANSWERS = struct.Struct("<QQ24x")


class ArenaChannel:
    """One connected daemon. Owns the socket; the caller waits for readiness and calls `send` and `receive`."""

    def __init__(self, target: Target, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._channel = target.open()
        self._headers = bytearray(_MESSAGES * HEADER_BYTES)
        self._waiting = memoryview(b"")
        self._sent_of_first = 0
        self._received = memoryview(bytearray(_MESSAGES * HEADER_BYTES))
        self._held_bytes = 0

    def fileno(self) -> int:
        """The descriptor to wait on; -1 once closed."""
        return self._socket.fileno()

    @property
    def has_answered(self) -> bool:
        """Whether the daemon has answered a request that it was given."""
        return self._channel.has_answered

    @property
    def wants_to_send(self) -> bool:
        """Whether messages are waiting for the socket to take them."""
        return bool(self._waiting)

    def send(self) -> None:
        """Hand over what the target has queued, as far as the socket takes it."""
        while self._waiting or self._gather():
            try:
                sent = self._socket.send(self._waiting)
            except BlockingIOError:
                return
            except OSError:
                # The daemon is gone; the end of the stream tells so, and what it answered before is read first.
                return
            self._waiting = self._waiting[sent:]
            whole, self._sent_of_first = divmod(self._sent_of_first + sent, HEADER_BYTES)
            self._channel.handed_over(whole)
        if self._channel.ended:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def receive(self) -> bool:
        """Take in the answers that have come; False at the end of the stream.

        Errors: EINVAL when an answer has a number this channel does not wait for; the channel is closed then.
        """
        try:
            got = self._socket.recv_into(self._received[self._held_bytes :])
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not got:
            return False
        end = self._held_bytes + got
        whole = end - end % HEADER_BYTES
        # Out of the buffer first: a completion may close the channel.
        answers = _ANSWERS.iter_unpack(bytes(self._received[:whole]))
        self._held_bytes = end - whole
        if self._held_bytes:
            self._received[: self._held_bytes] = self._received[whole:end]
        self._channel.answer_all(answers)
        return True

    def close(self) -> None:
        """Close both: the target gives back or fails what was not answered."""
        self._socket.close()
        self._channel.close()

    def _gather(self) -> bool:
        messages = self._channel.take_all(_MESSAGES)
        if not messages:
            return False
        pack_into, headers = HEADER.pack_into, self._headers
        at = 0
        for message in messages:
            bio = message.bio
            place = bio.place if bio.place >= 0 else 0
            pack_into(headers, at, message.seq, bio.op, bio.flags | place << PLACE_SHIFT, bio.sector, bio.length)
            at += HEADER_BYTES
        self._waiting = memoryview(headers)[:at]
        return True

"""The control port of a device host: a listener that outlives daemons, and at most one daemon at a time.

The newest connection wins, since only a restarted daemon makes one. Losing it changes nothing for clients.
"""

import errno
import os
import socket
from collections.abc import Callable, Sequence

from snapd.block.errors import SnapdError
from snapd.device.loop import READABLE, Loop
from snapd.proc import control
from snapd.proc.control import Message

Answer = Callable[[Message], tuple[Message, Sequence[int]]]
"""Does a message's verb; returns its reply's fields and descriptors, or raises `SnapdError`."""


class ControlPort:
    """Verbs in, one reply each, on `connection` and whatever `listener` accepts later."""

    def __init__(self, loop: Loop, listener: socket.socket, connection: socket.socket, answer: Answer) -> None:
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._answer = answer
        self._connection: socket.socket | None = None
        loop.watch(listener.fileno(), READABLE, self._on_listener)
        self._adopt(connection)

    def _on_listener(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # Whoever knocked is gone again.
            return
        self._hang_up()
        self._adopt(connection)

    def _adopt(self, connection: socket.socket) -> None:
        # A daemon that does not read its replies must not stop the device.
        connection.setblocking(False)
        self._connection = connection
        self._loop.watch(connection.fileno(), READABLE, self._on_connection)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._loop.forget(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _on_connection(self, _events: int) -> None:
        if self._connection is None:
            return
        fds: Sequence[int] = ()
        identity: Message = {}
        try:
            received = control.receive(self._connection)
            if received is None:
                self._hang_up()
                return
            message, unwanted = received
            for fd in unwanted:
                os.close(fd)
            identity = {"id": message.get("id")}
            fields, fds = self._answer(message)
            reply: Message = {"ok": True, **fields}
        except BlockingIOError:
            return
        except SnapdError as error:
            reply = refusal(error)
        except OSError:
            self._hang_up()
            return
        try:
            control.send(self._connection, {**reply, **identity}, list(fds))
        except OSError:
            self._hang_up()


def refusal(error: SnapdError) -> Message:
    """The reply to a verb that failed."""
    return {"ok": False, "errno": error.errno or errno.EIO, "message": str(error)}

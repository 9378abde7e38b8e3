"""The daemon's end of a channel: blocking reads of requests, and answers.

Written for the kernel's own node as much as for a socket (DMU-158): plain read and write on a descriptor, no poll, no
reliance on non-blocking mode, a loop on every short count, no data after an error, and ENOTBLK or the end of the
stream between two messages is a clean end. Memory is bounded whatever the size of a request (DMU-178).

A read that waits for a request must end when the daemon is to go (DMU-189). Of a socket the receiving side is shut
down: what has come is still read, then the stream ends. A node knows nothing like it; there read(2) is called directly,
because Python's own `os.read` starts again when a signal interrupts it, and the reading thread is sent one.
"""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import threading
from collections.abc import Iterator

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Buffer
from snapd.dmuser.message import HEADER, HEADER_BYTES, Request

INTERRUPT = signal.SIGUSR1
"""What `ChannelEnd.stop` sends to a thread that reads a node; the process must have a handler that does nothing."""
_RECEIVE_BYTES = 256 << 10


class ChannelError(SnapdError):
    """The channel itself is of no more use, whatever became of a request."""


class ChannelEnd:
    """An open channel, owned: a connected stream socket or a node. One thread reads and sends, any may `stop` it."""

    def __init__(self, fd: int) -> None:
        self.stopping = False
        self._fd = fd
        self._is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        self._reader = 0
        self._lock = threading.Lock()

    def read(self, buffer: bytearray, start: int, *, may_end: bool) -> int:
        """Wait for bytes and put them behind byte `start` of `buffer`; returns how many, 0 at the end of the channel.

        Errors, as from `send`: `ChannelError`.
        `may_end` says that no message is half read: after `stop` a node ends here.
        """
        try:
            if self._is_socket:
                return os.readv(self._fd, [memoryview(buffer)[start:]])
            return self._read_node(buffer, start, may_end)
        except OSError as error:
            # A socket whose peer died with our answers unread says ECONNRESET instead of the end of the stream.
            if error.errno in (errno.ENOTBLK, errno.ECONNRESET):
                return 0
            raise ChannelError.from_os(error, "read a request") from error

    def send(self, answers: Buffer) -> None:
        """Send all of it; EINVAL when the target takes no more from this channel (DMU-156)."""
        view = memoryview(answers)
        sent = 0
        try:
            # One write to a node ends at the end of one answer (DMU-166).
            while sent < len(view):
                sent += os.write(self._fd, view[sent:])
        except BrokenPipeError as error:
            raise ChannelError(errno.EINVAL, "the target takes no more answers from this channel") from error
        except OSError as error:
            raise ChannelError.from_os(error, "answer a request") from error

    def stop(self) -> None:
        """Let the reading end: of a socket when all that has come is read, of a node before the next message.

        To be repeated until the reading thread is through: a signal that comes right before its read(2) is lost.
        """
        with self._lock:
            self.stopping = True
            if self._fd < 0:
                return
            if not self._is_socket:
                if self._reader:
                    signal.pthread_kill(self._reader, INTERRUPT)
                return
            import socket

            # It is not connected any more when the peer has gone first.
            with socket.socket(fileno=os.dup(self._fd)) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close it; from the reading thread, or after its end."""
        with self._lock:
            self._reader = 0
            if self._fd >= 0:
                # Whatever it says, the descriptor is gone.
                with contextlib.suppress(OSError):
                    os.close(self._fd)
                self._fd = -1

    def _read_node(self, buffer: bytearray, start: int, may_end: bool) -> int:
        self._reader = threading.get_ident()
        place = ctypes.byref(ctypes.c_char.from_buffer(buffer, start))
        while not (may_end and self.stopping):
            got = int(_libc.read(self._fd, place, len(buffer) - start))
            if got >= 0:
                return got
            if (number := ctypes.get_errno()) != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return 0


class ChannelClient:
    """Requests from, and answers to, the target behind `fd`, which is owned; for one thread (DMU-173)."""

    def __init__(self, fd: int) -> None:
        self.end = ChannelEnd(fd)
        self._raw = bytearray(_RECEIVE_BYTES)
        self._buffer = memoryview(self._raw)
        self._start = 0
        self._held_end = 0
        self._unread_payload_bytes = 0

    def receive(self) -> list[Request] | None:
        """Wait for requests and return those that have come; None at a clean end.

        A WRITE with data is the last of its list. `payload` has the data, all of which must be taken or dropped before
        it is answered (DMU-168).
        Errors: EPROTO when the stream ends inside a message; else the system's.
        """
        self.drop_payload()
        requests: list[Request] = []
        while not requests:
            while self._held_end - self._start >= HEADER_BYTES and not self._unread_payload_bytes:
                request = Request._make(HEADER.unpack_from(self._buffer, self._start))
                self._start += HEADER_BYTES
                requests.append(request)
                if request.op == BioOp.WRITE:
                    self._unread_payload_bytes = request.length
            if not requests and not self._fill():
                return None
        return requests

    def payload(self) -> Iterator[memoryview]:
        """The data of the WRITE received last, in pieces, each good until the next is asked for."""
        while self._unread_payload_bytes:
            if self._start == self._held_end:
                self._fill()
            piece = self._buffer[self._start : min(self._held_end, self._start + self._unread_payload_bytes)]
            self._start += len(piece)
            self._unread_payload_bytes -= len(piece)
            yield piece

    def drop_payload(self) -> None:
        """Take what `payload` still has, for nothing."""
        for _ in self.payload():
            pass

    def send(self, answers: Buffer) -> None:
        """Send whole answers, or parts of one; EINVAL when the target takes no more from this channel (DMU-156)."""
        self.end.send(answers)

    def _fill(self) -> bool:
        """Receive more; False at a clean end."""
        held = self._held_end - self._start
        if self._start:
            self._buffer[:held] = self._buffer[self._start : self._held_end]
            self._start, self._held_end = 0, held
        is_between = not held and not self._unread_payload_bytes
        got = self.end.read(self._raw, held, may_end=is_between)
        if not got and not is_between:
            raise ChannelError(errno.EPROTO, "the channel ended inside a request")
        self._held_end += got
        return bool(got)


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.read.restype = ctypes.c_ssize_t
    return libc


_libc = _load_libc()

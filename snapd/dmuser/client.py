"""The daemon's end of a channel: blocking reads of requests, and answers.

Written for the kernel's own node as much as for a socket (DMU-158): plain read and write on a descriptor, no poll, no
reliance on non-blocking mode, a loop on every short count, no data after an error, and ENOTBLK or the end of the
stream between two messages is a clean end. Memory is bounded whatever the size of a request (DMU-178).
"""

import errno
import os

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Buffer
from snapd.dmuser.message import HEADER, HEADER_BYTES, Request

_RECEIVE_BYTES = 64 << 10


class ChannelClient:
    """Requests from, and answers to, the target behind `fd`; for one thread (DMU-173)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._held_bytes = 0
        self._unread_payload_bytes = 0
        self._write: Request | None = None

    def receive(self) -> list[Request] | None:
        """Wait for requests and return all that are complete; None at a clean end.

        A WRITE is returned once its payload has been read, which is dropped: this end serves read-only images.
        Errors: EPROTO when the stream ends inside a message; else the system's.
        """
        requests: list[Request] = []
        while not requests:
            got = self._read()
            if not got:
                if self._held_bytes or self._write is not None:
                    raise SnapdError(errno.EPROTO, "the channel ended inside a request")
                return None
            self._parse(self._held_bytes + got, requests)
        return requests

    def send(self, answers: Buffer) -> None:
        """Send whole answers; EINVAL when the target takes no more from this channel (DMU-156)."""
        view = memoryview(answers)
        sent = 0
        try:
            while sent < len(view):
                sent += os.write(self._fd, view[sent:])
        except BrokenPipeError as error:
            raise SnapdError(errno.EINVAL, "the target takes no more answers from this channel") from error
        except OSError as error:
            raise SnapdError.from_os(error, "answer a request") from error

    def _read(self) -> int:
        try:
            return os.readv(self._fd, [self._buffer[self._held_bytes :]])
        except OSError as error:
            # A socket whose peer died with our answers unread says ECONNRESET instead of the end of the stream.
            if error.errno in (errno.ENOTBLK, errno.ECONNRESET):
                return 0
            raise SnapdError.from_os(error, "read a request") from error

    def _parse(self, end: int, requests: list[Request]) -> None:
        at = 0
        while True:
            if self._write is not None:
                skipped = min(self._unread_payload_bytes, end - at)
                at += skipped
                self._unread_payload_bytes -= skipped
                if self._unread_payload_bytes:
                    break
                requests.append(self._write)
                self._write = None
            if end - at < HEADER_BYTES:
                break
            request = Request._make(HEADER.unpack_from(self._buffer, at))
            at += HEADER_BYTES
            if request.op == BioOp.WRITE and request.length:
                self._write, self._unread_payload_bytes = request, request.length
            else:
                requests.append(request)
        self._held_bytes = end - at
        if self._held_bytes:
            self._buffer[: self._held_bytes] = self._buffer[at:end]

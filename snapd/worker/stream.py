"""The plain byte stream: requests of one channel answered from one backend, payload in the stream (DMU section 2).

Invariant: a SUCCESS header is followed by the whole payload, decoded and verified before the header was sent
(DMU-167); a request that cannot be served is answered ERROR or UNSUPPORTED, alone and without data, and the service
goes on. A READ has no upper size on a real node: what does not fit into memory is verified first, then read again
piece by piece as it is sent (DMU-182).
"""

import errno

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.client import ChannelClient, ChannelError
from snapd.dmuser.message import HEADER, HEADER_BYTES, Answer, Request
from snapd.proc.log import Log
from snapd.worker.backend import Backend, answer_to, describe

_SEND_BYTES = 256 << 10
"""Answers are sent when so many bytes have come together, so that the target works while we go on."""


class StreamService:
    """Serves `backend` on `client`, for one thread."""

    def __init__(self, client: ChannelClient, backend: Backend, log: Log) -> None:
        self._client = client
        self._backend = backend
        self._log = log
        self._answers = memoryview(bytearray(_SEND_BYTES + HEADER_BYTES + MAX_BIO_BYTES))
        self._filled_bytes = 0

    def run(self) -> None:
        """Return at the clean end of the channel, or when it was stopped; `ChannelError` when it breaks."""
        try:
            while (requests := self._client.receive()) is not None:
                for request in requests:
                    self._serve(request)
                self._send()
        except ChannelError:
            # A socket may be cut in the middle of a message then; nobody waits for what came of it.
            if not self._client.end.stopping:
                raise

    def stop(self) -> None:
        """From another thread: let `run` answer what has been received, and return; see `ChannelEnd.stop`."""
        self._client.end.stop()

    def close(self) -> None:
        """Close the channel."""
        self._client.end.close()

    def _serve(self, request: Request) -> None:
        try:
            if request.op == BioOp.READ:
                self._read(request)
            else:
                self._backend.change(request, self._client.payload())
                self._add_header(request, Answer.SUCCESS)
        except ChannelError:
            raise
        except SnapdError as error:
            self._log.line(describe(request, error))
            # A WRITE that is not read to its end must not be answered (DMU-168).
            self._client.drop_payload()
            self._add_header(request, answer_to(error))
        if self._filled_bytes >= _SEND_BYTES:
            self._send()

    def _read(self, request: Request) -> None:
        if request.length > MAX_BIO_BYTES:
            self._read_large(request)
            return
        # Behind where the header will stand.
        start = self._filled_bytes + HEADER_BYTES
        end = start + request.length
        self._backend.read_into(self._answers[start:end], request.sector * SECTOR_BYTES)
        self._add_header(request, Answer.SUCCESS)
        self._filled_bytes = end

    def _read_large(self, request: Request) -> None:
        """Verify all of it, then send the header and read it again; what fails then can only close the channel."""
        self._send()
        offset = request.sector * SECTOR_BYTES
        end = offset + request.length
        if end > self._backend.size_bytes:
            raise SnapdError(errno.EIO, f"the device ends at byte {self._backend.size_bytes}")
        pieces = [(self._answers[: min(MAX_BIO_BYTES, end - at)], at) for at in range(offset, end, MAX_BIO_BYTES)]
        for piece, at in pieces:
            self._backend.read_into(piece, at)
        self._add_header(request, Answer.SUCCESS)
        self._send()
        for piece, at in pieces:
            try:
                self._backend.read_into(piece, at)
            except SnapdError as error:
                raise ChannelError(error.errno, f"{describe(request, error)}, after its header was sent") from error
            self._client.send(piece)

    def _add_header(self, request: Request, code: Answer) -> None:
        HEADER.pack_into(self._answers, self._filled_bytes, request.seq, code, 0, 0, 0)
        self._filled_bytes += HEADER_BYTES

    def _send(self) -> None:
        if self._filled_bytes:
            self._client.send(self._answers[: self._filled_bytes])
            self._filled_bytes = 0

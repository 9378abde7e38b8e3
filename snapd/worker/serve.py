"""The read service: requests of one channel answered from one view.

Invariant: a SUCCESS header is followed by the whole payload, decoded and verified before the header was made
(DMU-167); a request that cannot be served is answered ERROR, alone, and the service goes on.
"""

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Readable
from snapd.dmuser.client import ChannelClient
from snapd.dmuser.message import HEADER, HEADER_BYTES, Answer, Request
from snapd.proc.log import Log

_SEND_BYTES = 256 << 10
"""Answers are sent when so many bytes have come together, so that the target works while we go on."""


class ReadService:
    """Serves `view` on `client` until the channel ends."""

    def __init__(self, client: ChannelClient, view: Readable, log: Log) -> None:
        self._client = client
        self._view = view
        self._log = log
        self._answers = memoryview(bytearray(_SEND_BYTES + HEADER_BYTES + MAX_BIO_BYTES))
        self._filled_bytes = 0

    def run(self) -> None:
        """Return at the clean end of the channel; `SnapdError` when it breaks."""
        while (requests := self._client.receive()) is not None:
            for request in requests:
                self._answer(request)
                if self._filled_bytes >= _SEND_BYTES:
                    self._send()
            self._send()

    def _answer(self, request: Request) -> None:
        if request.op == BioOp.READ:
            payload_bytes = self._read(request)
            code = Answer.ERROR if payload_bytes is None else Answer.SUCCESS
        else:
            # The images are read-only: nothing is ever written, so everything written is durable.
            payload_bytes = 0
            code = Answer.SUCCESS if request.is_flush else Answer.ERROR
        HEADER.pack_into(self._answers, self._filled_bytes, request.seq, code, 0, 0, 0)
        self._filled_bytes += HEADER_BYTES + (payload_bytes or 0)

    def _read(self, request: Request) -> int | None:
        """Read behind where the header will stand; returns the bytes, or None when that failed."""
        if request.length > MAX_BIO_BYTES:
            self._log.line(f"read of {request.length} bytes refused: more than {MAX_BIO_BYTES} (DMU-182)")
            return None
        start = self._filled_bytes + HEADER_BYTES
        try:
            self._view.read_into(self._answers[start : start + request.length], request.sector * SECTOR_BYTES)
        except SnapdError as error:
            self._log.line(f"read of {request.length} bytes at sector {request.sector}: {error}")
            return None
        return request.length

    def _send(self) -> None:
        if self._filled_bytes:
            self._client.send(self._answers[: self._filled_bytes])
            self._filled_bytes = 0

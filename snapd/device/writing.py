"""A WRITE whose payload is still coming: cut into pieces, so that its length costs no memory (DMU-182).

What has come of a piece waits in a buffer of its own, beside the arena: a client that goes silent holds neither credit
nor room.
"""

from snapd.device.batch import Batch
from snapd.device.datapath import DataPath
from snapd.device.singles import Client, Single

WRITE_PIECE_BYTES = 256 << 10
"""WRITE payload goes on in pieces of this size."""


class Writing:
    """The write that `request` is, at `offset`; sealed when its last piece has been handed on."""

    def __init__(self, request: Single, offset: int, *, fua: bool, path: DataPath, client: Client) -> None:
        self.request = request
        self._offset = offset
        self._left_bytes = request.length
        self._fua = fua
        self._path = path
        self._client = client
        self._filled_bytes = 0
        self._buffer: memoryview | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of the payload has been handed on."""
        return not self._left_bytes

    def place(self) -> memoryview | None:
        """Where the next bytes of the client belong, if that is more than what a receive takes in."""
        size = self._piece_bytes
        if size < WRITE_PIECE_BYTES or self._filled_bytes == size:
            return None
        return self._piece[self._filled_bytes :]

    def received(self, length: int) -> None:
        """So many bytes have come to `place`; `take` goes on from there."""
        self._filled_bytes += length

    def take(self, received: memoryview, start: int, end: int) -> tuple[int, bool]:
        """Go on with `received[start:end]`; returns where it stopped, and whether credit or room stopped it."""
        while self._left_bytes:
            size = self._piece_bytes
            if not self._filled_bytes and end - start >= size:
                if not self._hand_on(received[start : start + size]):
                    return start, True
                start += size
                continue
            have = min(end - start, size - self._filled_bytes)
            if have:
                self._piece[self._filled_bytes : self._filled_bytes + have] = received[start : start + have]
                start += have
                self._filled_bytes += have
            if self._filled_bytes < size:
                return start, False
            if not self._hand_on(self._piece):
                return start, True
            self._filled_bytes = 0
        self.request.seal()
        return start, False

    @property
    def _piece_bytes(self) -> int:
        """Size of the present piece."""
        return min(WRITE_PIECE_BYTES, self._left_bytes)

    @property
    def _piece(self) -> memoryview:
        """Room for the present piece."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(self._piece_bytes))
        return self._buffer[: self._piece_bytes]

    def _hand_on(self, payload: memoryview) -> bool:
        """Begin to write a piece; False when it has to wait."""
        size, path, client, request = len(payload), self._path, self._client, self.request
        region = path.allocate(path.arena, size)
        if region is None:
            client.wait_for_room(path.arena)
            return False
        if not client.admit(size):
            region.free()
            return False
        path.memory[region.start : region.end] = payload
        request.pending += 1

        def piece_ready(piece: Batch) -> None:
            region.free()
            client.release(size)
            request.piece_done(0, piece.first_error)

        piece = Batch(region, piece_ready)
        path.write(piece, 0, region.start, self._offset, size, fua=self._fua)
        piece.seal()
        self._offset += size
        self._left_bytes -= size
        return True

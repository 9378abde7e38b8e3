"""A READ that is too large for the arena, or of parts of sectors: read in pieces into a reply of its own."""

from collections.abc import Callable

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES
from snapd.device.batch import Batch
from snapd.device.datapath import DataPath
from snapd.device.replies import ReplyForm
from snapd.device.singles import Single


class LargeRead:
    """The read that `request` is, from `offset`; calls `on_done` when `reply` is whole or `request` has an error."""

    def __init__(
        self, request: Single, offset: int, form: ReplyForm, path: DataPath, on_done: "Callable[[LargeRead], None]"
    ) -> None:
        self.request = request
        self.reply = bytearray(form.read_header_bytes + request.length)
        form.write_read_header(memoryview(self.reply), 0, request.cookie, offset, request.length)
        self._at = form.read_header_bytes
        self._offset = offset
        self._path = path
        self._on_done = on_done
        self._is_wanted = True

    def cancel(self) -> None:
        """Nobody waits for it any more: it ends with the present piece."""
        self._is_wanted = False

    def go_on(self) -> None:
        """Read the next piece: whole sectors around what is still missing."""
        path = self._path
        missing = len(self.reply) - self._at
        if self.request.errors or not missing or not self._is_wanted:
            self._on_done(self)
            return
        skip = self._offset % SECTOR_BYTES
        step = min(missing, MAX_BIO_BYTES - skip)
        length = -(-(skip + step) // SECTOR_BYTES) * SECTOR_BYTES
        offset = self._offset - skip
        ring = path.local if path.is_local(offset, length) else path.arena
        region = path.allocate(ring, length)
        if region is None:
            path.wait_for_room(self.go_on, ring)
            return

        def piece_ready(piece: Batch) -> None:
            if piece.errors:
                self.request.errors.update(piece.errors)
            else:
                place = region.start + skip
                self.reply[self._at : self._at + step] = path.memory[place : place + step]
            region.free()
            self._at += step
            self._offset += step
            self.go_on()

        piece = Batch(region, piece_ready)
        path.read(piece, 0, region.start, offset, length)
        piece.seal()

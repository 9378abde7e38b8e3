"""The read path of a device: each range to whoever serves it.

Ranges that the new view takes from the base unchanged, or that are merged already, are read here, without a message
to the worker ("pass-down", UNDO-26); all others become bios for the dm-user target. A base read is believed only if
the shared map still says so afterwards, since a rollback may have begun meanwhile.
"""

import errno
from collections import deque
from collections.abc import Callable
from typing import Protocol

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Readable
from snapd.dmuser.target import Target
from snapd.merge.sharedmap import SharedMap


class Reading(Protocol):
    """A request that is being read in pieces.

    `pieces` is how many are outstanding; `piece_done(errno)` is called once for each, never from inside `read`.
    """

    pieces: int

    def piece_done(self, number: int) -> None:
        """One piece is in place (0), or could not be read (an errno number)."""
        ...


class ReadPath:
    """Routes reads to `base` or `target`; the caller pumps `submit_waiting` and `read_local`."""

    def __init__(self, target: Target, base: Readable, shared: SharedMap, block_bytes: int) -> None:
        self.reads_passed_down = 0
        self.reads_to_worker = 0
        self._target = target
        self._base = base
        self._shared = shared
        self._block_bytes = block_bytes
        self._local: list[tuple[Reading, memoryview, int]] = []
        self._waiting: deque[Bio] = deque()

    def read(self, request: Reading, out: memoryview, offset: int) -> None:
        """Begin to fill `out` from byte `offset`; the range lies inside the device."""
        first, last = self._blocks(offset, len(out))
        if self._shared.new_view_on_base(first, last):
            self._add_local(request, out, offset)
            return
        end = offset + len(out)
        at = offset
        for run in self._shared.pending_extents(first, last):
            start = max(run.start * self._block_bytes, offset)
            stop = min(run.end * self._block_bytes, end)
            if at < start:
                self._add_local(request, out[at - offset : start - offset], at)
            self._add_bios(request, out[start - offset : stop - offset], start)
            at = stop
        if at < end:
            self._add_local(request, out[at - offset :], at)

    def submit_waiting(self) -> None:
        """Give the target what it has room for; a full queue is backpressure, not an error (DMU-143)."""
        while self._waiting and self._target.has_room():
            self._target.submit(self._waiting.popleft())

    @property
    def can_submit(self) -> bool:
        """Whether `submit_waiting` would do something."""
        return bool(self._waiting) and self._target.has_room()

    def read_local(self) -> None:
        """Read everything that is passed down."""
        local, self._local = self._local, []
        for request, out, offset in local:
            try:
                self._base.read_into(out, offset)
            except SnapdError:
                request.piece_done(errno.EIO)
                continue
            if self._shared.new_view_on_base(*self._blocks(offset, len(out))):
                self.reads_passed_down += 1
            else:
                self._add_bios(request, out, offset)
            request.piece_done(0)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._block_bytes, -(-(offset + length) // self._block_bytes)

    def _add_local(self, request: Reading, out: memoryview, offset: int) -> None:
        request.pieces += 1
        self._local.append((request, out, offset))

    def _add_bios(self, request: Reading, out: memoryview, offset: int) -> None:
        """Cut into bios of whole sectors; one that begins or ends inside a sector goes through a bounce buffer."""
        at = 0
        while at < len(out):
            sector, skip = divmod(offset + at, SECTOR_BYTES)
            piece = out[at : at + MAX_BIO_BYTES - skip]
            length = -(-(skip + len(piece)) // SECTOR_BYTES) * SECTOR_BYTES
            request.pieces += 1
            self.reads_to_worker += 1
            if length == len(piece):
                bio = Bio(BioOp.READ, sector, length, piece, request.piece_done)
            else:
                bounce = memoryview(bytearray(length))
                bio = Bio(BioOp.READ, sector, length, bounce, _copy_out(bounce[skip:], piece, request))
            self._waiting.append(bio)
            at += len(piece)


def _copy_out(bounce: memoryview, piece: memoryview, request: Reading) -> Callable[[int], None]:
    def on_complete(number: int) -> None:
        if not number:
            piece[:] = bounce[: len(piece)]
        request.piece_done(number)

    return on_complete

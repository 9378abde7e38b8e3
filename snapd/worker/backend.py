"""What requests are done on: an image that is only read, or a store that everything is passed through to.

Invariant: `change` returns when the request is done as its flags demand (FUA and PREFLUSH, DMU-24), and raises
otherwise. Whoever answers translates the error by its errno alone.
"""

import errno
from collections.abc import Iterable
from typing import Protocol

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, Readable, Store, WritableBuffer
from snapd.dmuser.message import Answer, Flag, Request

_PREFLUSH, _FUA, _NOUNMAP = int(Flag.PREFLUSH), int(Flag.FUA), int(Flag.NOUNMAP)
_NAMES = {int(op): op.name.lower() for op in BioOp}
_OFFERED = frozenset({int(BioOp.WRITE), int(BioOp.FLUSH), int(BioOp.DISCARD), int(BioOp.WRITE_ZEROES)})


class HoleyStore(Store, Protocol):
    """A store that may be able to give up space (`FileStore`)."""

    def unmap(self, offset: int, length: int) -> bool:
        """Make the range read as zeros by giving up its space; False, with nothing changed, where that cannot be."""
        ...


class Backend(Readable, Protocol):
    """Reads by `read_into`; everything else by `change`. `size_bytes` is where the device ends."""

    size_bytes: int

    def change(self, request: Request, payload: Iterable[Buffer]) -> None:
        """Do a request that is no READ; `payload` has the data of a WRITE, in order.

        Errors: EOPNOTSUPP for what is not offered here; EROFS where nothing is written; EIO outside the device.
        """
        ...


class ImageBackend:
    """An image that nobody writes."""

    def __init__(self, image: Readable, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        # Not a method of its own: one call less for every read.
        self.read_into = image.read_into

    def change(self, request: Request, _payload: Iterable[Buffer]) -> None:
        """Flushes succeed: nothing is ever written, so everything written is durable."""
        if request.is_flush:
            return
        if request.op == BioOp.WRITE:
            raise SnapdError(errno.EROFS, "the image is read-only")
        raise SnapdError(errno.EOPNOTSUPP, "not offered here")


class StoreBackend:
    """A writable store, of the size that it has now."""

    def __init__(self, store: HoleyStore) -> None:
        self.size_bytes = store.size()
        self._store = store

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill `buffer` from byte `offset`; EIO outside the device."""
        self._check_range(offset, len(buffer))
        self._store.read_into(buffer, offset)

    def change(self, request: Request, payload: Iterable[Buffer]) -> None:
        """Do a WRITE, FLUSH, DISCARD or WRITE_ZEROES; EOPNOTSUPP for anything else (DMU-17)."""
        if request.op not in _OFFERED:
            raise SnapdError(errno.EOPNOTSUPP, "not offered here")
        if request.op == BioOp.FLUSH or request.flags & _PREFLUSH:
            self._store.flush()
        # A flush may name any sector (DMU-175).
        if request.length and request.op != BioOp.FLUSH:
            self._do(request, payload)
        if request.flags & _FUA:
            self._store.flush()

    def _do(self, request: Request, payload: Iterable[Buffer]) -> None:
        offset = request.sector * SECTOR_BYTES
        self._check_range(offset, request.length)
        if request.op == BioOp.DISCARD:
            self._store.discard(offset, request.length)
        elif request.op == BioOp.WRITE_ZEROES:
            if request.flags & _NOUNMAP or not self._store.unmap(offset, request.length):
                self._store.zero(offset, request.length)
        else:
            for piece in payload:
                self._store.write(piece, offset)
                offset += len(piece)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size_bytes:
            raise SnapdError(errno.EIO, f"bytes {offset} to {offset + length} of a device of {self.size_bytes}")


def answer_to(error: SnapdError) -> Answer:
    """How a failed request is answered (DMU-65, DMU-66)."""
    return Answer.UNSUPPORTED if error.errno == errno.EOPNOTSUPP else Answer.ERROR


def describe(request: Request, error: SnapdError) -> str:
    """A line for the log."""
    name = _NAMES.get(request.op, f"operation {request.op}")
    return f"{name} of {request.length} bytes at sector {request.sector}: {error}"

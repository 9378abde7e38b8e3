"""Who serves a range of the device: the host itself, from the store, or the daemon behind the dm-user target."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from snapd.merge.sharedmap import SharedMap


class Run(NamedTuple):
    """Bytes `[start, stop)` of the device, all served by one side."""

    start: int
    stop: int
    is_local: bool


class Routes(Protocol):
    """Decides for every request anew: a merge moves ranges from the worker to the base while the device is in use."""

    def is_local(self, offset: int, length: int) -> bool:
        """Whether the store serves all of it right now."""
        ...

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The range cut at every change of sides, ascending."""
        ...


class SnapshotRoutes:
    """Base for what has no op or is merged, worker for the rest (UNDO-26); `block_bytes` is a power of two."""

    def __init__(self, shared: SharedMap, block_bytes: int) -> None:
        self._shared = shared
        self._block_bytes = block_bytes
        self._shift = block_bytes.bit_length() - 1

    def is_local(self, offset: int, length: int) -> bool:
        shift = self._shift
        return self._shared.new_view_on_base(offset >> shift, (offset + length - 1 >> shift) + 1)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        size, end = self._block_bytes, offset + length
        at = offset
        for extent in self._shared.pending_extents(offset // size, -(-end // size)):
            start, stop = max(extent.start * size, offset), min(extent.end * size, end)
            if at < start:
                yield Run(at, start, True)
            yield Run(start, stop, False)
            at = stop
        if at < end:
            yield Run(at, end, True)


class WholeRoute:
    """One side for everything."""

    def __init__(self, *, is_local: bool) -> None:
        self._is_local = is_local

    def is_local(self, _offset: int, _length: int) -> bool:
        return self._is_local

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        yield Run(offset, offset + length, self._is_local)

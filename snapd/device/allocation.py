"""What of a device is allocated, and what reads as zeros (NBD's `base:allocation`).

A claim of zeros must hold for whoever believes it and does not read. So only two things are claimed: an op that zeros
its blocks, which a merge replaces by zeros on the base; and a hole of a regular file, in a snapshot only of the base
where it is read unchanged, which no merge and no rollback writes to. Behind the end of a base a read fails, although
the system sees a hole there. Where in doubt, all is data.
"""

import errno
import os
import stat

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.device.nbd import STATE_HOLE, STATE_ZERO

MAX_STEPS = 2048
"""Runs and holes that one call looks at: an image may have millions that make one long extent of data."""

_DATA = 0
_ZEROS = STATE_HOLE | STATE_ZERO


class Allocation:
    """The allocation of a raw `store`, or of the new view of a snapshot with this `extent_map` over that base.

    Without a store nothing is known, and all is data.
    """

    def __init__(self, store: FileStore | None, extent_map: ExtentMap | None = None) -> None:
        is_file = store is not None and stat.S_ISREG(os.fstat(store.fd).st_mode)
        self._file = store if is_file else None
        self._map = extent_map
        # What was found last: some file systems look page by page. Kept for a base only, whose unchanged ranges stay.
        self._found = (0, 0, _DATA)

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """The lengths in bytes and status flags of at most `limit` extents from byte `offset`, none like its neighbour.

        They end at `offset + length` or before, but are never none. The range lies inside the device.
        """
        size_bytes = self._file.size() if self._file is not None else 0
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        for _ in range(MAX_STEPS):
            stop, state = self._extent(at, end, size_bytes)
            if found and found[-1][1] == state:
                found[-1] = found[-1][0] + stop - at, state
            elif len(found) < limit:
                found.append((stop - at, state))
            else:
                break
            at = stop
            if at >= end:
                break
        return found

    def _extent(self, at: int, end: int, size_bytes: int) -> tuple[int, int]:
        """Up to where, and `end` at most, everything is like byte `at`, and how that is."""
        if self._map is None:
            return self._store_extent(at, end, size_bytes)
        block = at // self._map.block_size
        if block >= self._map.block_count:
            return end, _DATA
        run = self._map.run(self._map.run_of(block))
        stop = min(run.end * self._map.block_size, end)
        if run.kind == UNCHANGED:
            return self._store_extent(at, stop, size_bytes)
        return stop, _ZEROS if run.kind == OpType.ZERO else _DATA

    def _store_extent(self, at: int, end: int, size_bytes: int) -> tuple[int, int]:
        if self._file is None or at >= size_bytes:
            return end, _DATA
        start, stop, state = self._found
        if not start <= at < stop:
            stop, state = self._look(self._file, at, size_bytes)
            if self._map is not None:
                self._found = at, stop, state
        return min(stop, end, size_bytes), state

    def _look(self, file: FileStore, at: int, size_bytes: int) -> tuple[int, int]:
        # This moves the file position, which nobody uses.
        try:
            data = os.lseek(file.fd, at, os.SEEK_DATA)
            return (data, _ZEROS) if data > at else (os.lseek(file.fd, at, os.SEEK_HOLE), _DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # No data up to the end.
                return size_bytes, _ZEROS
            raise SnapdError.from_os(error, f"look for the holes of {file.name} at {at}") from error

"""The data path of a device: each piece of each request to whoever serves it.

Invariant: a read from the base is believed only if the routes still say afterwards that the base may serve it, since a
rollback may have begun meanwhile; else the worker is asked (UNDO-26).

The host's loop drives it: `submit_waiting` gives the target its messages, `read_local` then reads what is passed
down while the worker is busy, `read_cold` waits for what had to come from the disk.
"""

import errno
from collections import deque
from collections.abc import Callable

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.device.batch import Batch
from snapd.device.routes import Routes
from snapd.device.slowio import SlowIo
from snapd.dmuser.arena import Arena, Region
from snapd.dmuser.message import Flag
from snapd.dmuser.target import Target

LOCAL_BYTES = 4 << 20
"""The end of the arena's memory that serves what is passed down: it never waits for a worker."""
_LOCAL_AT_ONCE = 256 << 10
_ROOM_BYTES = MAX_BIO_BYTES + SECTOR_BYTES
"""Enough for any reply that lies in the arena: below it, who waits for room goes on waiting."""
_MAX_ZEROES_BYTES = 32 << 20
"""Zeroing more at once could look like a stuck worker, or hold up everybody's flushes."""

_READ = BioOp.READ
_FLUSH_FLAGS = int(Flag.PREFLUSH | Flag.SYNC)

Local = tuple[Batch, int, int, int, int]
"""Batch, tag, place, offset and length of a piece that the store serves."""
RoomWaiter = tuple[tuple[Arena, ...], Callable[[], None]]
"""The rings that somebody needs room in, and how he goes on."""


class DataPath:
    """Reads and writes of one device. `store` is None where there is only a target, `target` where there is none.

    `memory` is the arena's; `arena` and `local` hand out its parts for requests that the daemon serves and for those
    that the host serves. `shares_memory` says that the daemon sees it too, so that a bio names its place only. Ranges
    lie inside the device and are whole sectors.
    """

    def __init__(
        self,
        *,
        size_bytes: int,
        read_only: bool,
        routes: Routes,
        memory: memoryview,
        shares_memory: bool,
        target: Target | None,
        store: FileStore | None,
        slow: SlowIo,
    ) -> None:
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.memory = memory
        self.arena = Arena(memory, 0, len(memory) - LOCAL_BYTES)
        self.local = Arena(memory, len(memory) - LOCAL_BYTES, len(memory))
        self.is_local = routes.is_local
        self.reads_passed_down = 0
        self.reads_to_worker = 0
        self._shares_memory = shares_memory
        self._runs = routes.runs
        self._target = target
        self._store = store
        self._slow = slow
        self._waiting: deque[Bio] = deque()
        self._local: list[Local] = []
        self._cold: list[Local] = []
        self._room_waiters: deque[RoomWaiter] = deque()

    def read(self, batch: Batch, tag: int, place: int, offset: int, length: int) -> None:
        """Begin to fill `length` bytes of the memory from `place` on."""
        for start, stop, is_local in self._runs(offset, length):
            at = place + start - offset
            if is_local:
                self.read_from_store(batch, tag, at, start, stop - start)
            else:
                self.read_from_target(batch, tag, at, start, stop - start)

    def read_from_store(self, batch: Batch, tag: int, place: int, offset: int, length: int) -> None:
        """The same for what `is_local`."""
        batch.pending += 1
        self._local.append((batch, tag, place, offset, length))

    def read_from_target(self, batch: Batch, tag: int, place: int, offset: int, length: int) -> None:
        """The same for what is not, or may be on its way back; cut into bios (DMU-182)."""
        self.reads_to_worker += 1
        while length > MAX_BIO_BYTES:
            self._queue(BioOp.READ, batch, tag, place, offset, MAX_BIO_BYTES, 0)
            place += MAX_BIO_BYTES
            offset += MAX_BIO_BYTES
            length -= MAX_BIO_BYTES
        if self._shares_memory:
            # `_queue` once more, for the request that there are most of.
            batch.pending += 1
            self._waiting.append(Bio(_READ, offset // SECTOR_BYTES, length, None, batch.bio_done, 0, place, tag))
        else:
            self._queue(BioOp.READ, batch, tag, place, offset, length, 0)

    def write(self, batch: Batch, tag: int, place: int, offset: int, length: int, *, fua: bool) -> None:
        """Write from the memory, at most `MAX_BIO_BYTES`; with `fua` it is done when it is durable (DMU-24)."""
        if self._store is None or not self.is_local(offset, length):
            self._queue(BioOp.WRITE, batch, tag, place, offset, length, int(Flag.FUA) if fua else 0)
            return
        batch.pending += 1
        try:
            self._store.write(self.memory[place : place + length], offset)
        except SnapdError as error:
            batch.piece_done(tag, error.errno or errno.EIO)
            return
        if fua:
            self._slow.submit(self._store.flush, lambda number: batch.piece_done(tag, number))
        else:
            batch.piece_done(tag, 0)

    def flush(self, batch: Batch, tag: int) -> None:
        """Make durable whatever has been answered before."""
        if self.read_only:
            # Nothing has been written, so there is nothing to do.
            return
        if self._store is None or not self.is_local(0, SECTOR_BYTES):
            # As device mapper sends it (DMU-16, DMU-175).
            self._queue(BioOp.WRITE, batch, tag, 0, 0, 0, _FLUSH_FLAGS)
        else:
            batch.pending += 1
            self._slow.submit(self._store.flush, lambda number: batch.piece_done(tag, number))

    def discard(self, batch: Batch, tag: int, offset: int, length: int, *, fua: bool) -> None:
        """Give the range up."""
        store = self._store
        if store is None or not self.is_local(offset, length):
            self._queue(BioOp.DISCARD, batch, tag, -1, offset, length, int(Flag.FUA) if fua else 0)
            return
        batch.pending += 1

        def discard() -> None:
            store.discard(offset, length)
            if fua:
                store.flush()

        self._slow.submit(discard, lambda number: batch.piece_done(tag, number))

    def write_zeroes(self, batch: Batch, tag: int, offset: int, length: int, *, may_unmap: bool, fua: bool) -> None:
        """Make the range read as zeros; without `may_unmap` its space stays allocated."""
        flags = (0 if may_unmap else int(Flag.NOUNMAP)) | (int(Flag.FUA) if fua else 0)
        on_store = self._store is not None and self.is_local(offset, length)
        for at in range(offset, offset + length, _MAX_ZEROES_BYTES):
            step = min(_MAX_ZEROES_BYTES, offset + length - at)
            if on_store:
                self._zero_in_store(batch, tag, at, step, may_unmap=may_unmap, fua=fua)
            else:
                self._queue(BioOp.WRITE_ZEROES, batch, tag, -1, at, step, flags)

    def _zero_in_store(self, batch: Batch, tag: int, offset: int, length: int, *, may_unmap: bool, fua: bool) -> None:
        store = self._store
        assert store is not None
        batch.pending += 1

        def zero() -> None:
            if not (may_unmap and store.unmap(offset, length)):
                store.zero(offset, length)
            if fua:
                store.flush()

        self._slow.submit(zero, lambda number: batch.piece_done(tag, number))

    def allocate(self, ring: Arena, length: int) -> Region | None:
        """A region of `arena` or `local`; None while there is no room, or somebody waits for room in it."""
        if any(ring in rings for rings, _ in self._room_waiters):
            return None
        return ring.allocate(length)

    def wait_for_room(self, resume: Callable[[], None], *rings: Arena) -> None:
        """Have `resume` called once these parts of the memory, or both, have room for any request; the first one first.

        Who waits for `local` alone never waits for a worker.
        """
        self._room_waiters.append((rings or (self.arena, self.local), resume))

    @property
    def is_short_of_room(self) -> bool:
        """Whether somebody waits for room that there is not."""
        return any(not _has_room(rings) for rings, _ in self._room_waiters)

    def serve_room_waiters(self) -> bool:
        """Let those go on for whom there is room; true if there were any."""
        if not self._room_waiters:
            return False
        waiting, self._room_waiters = self._room_waiters, deque()
        left: deque[RoomWaiter] = deque()
        short: set[Arena] = set()
        for rings, resume in waiting:
            if short.isdisjoint(rings) and _has_room(rings):
                resume()
            else:
                short.update(rings)
                left.append((rings, resume))
        # Behind them, who has come back meanwhile.
        self._room_waiters = left + self._room_waiters
        return len(left) < len(waiting)

    @property
    def waiting(self) -> int:
        """Bios that wait for room in the target's queue."""
        return len(self._waiting)

    def submit_waiting(self) -> None:
        """Give the target what it has room for; a full queue is backpressure, not an error (DMU-143)."""
        if self._waiting and self._target is not None:
            self._target.submit_all(self._waiting)

    @property
    def can_submit(self) -> bool:
        """Whether `submit_waiting` would do something."""
        return bool(self._waiting) and self._target is not None and self._target.has_room_for(self._waiting[0])

    @property
    def can_read_local(self) -> bool:
        """Whether `read_local` would do something: the end of one piece may have begun the next."""
        return bool(self._local)

    def read_local(self) -> None:
        """Read what is passed down, as far as that takes no disk; the rest is being fetched afterwards.

        After `_LOCAL_AT_ONCE` bytes it stops, so that what has been read leaves while it is in the processor's cache.
        """
        if not self._local:
            return
        local, self._local = self._local, []
        assert self._store is not None
        read_cached, memory = self._store.read_cached, self.memory
        left_bytes = _LOCAL_AT_ONCE
        for number, entry in enumerate(local):
            _, _, place, offset, length = entry
            if read_cached(memory[place : place + length], offset):
                self._believe(entry)
            else:
                self._cold.append(entry)
            left_bytes -= length
            if left_bytes <= 0:
                # In front of what the end of a piece may have begun.
                self._local[:0] = local[number + 1 :]
                return

    def read_cold(self) -> None:
        """Wait for what is being fetched."""
        if not self._cold:
            return
        cold, self._cold = self._cold, []
        assert self._store is not None
        for entry in cold:
            batch, tag, place, offset, length = entry
            try:
                self._store.read_into(self.memory[place : place + length], offset)
            except SnapdError:
                batch.piece_done(tag, errno.EIO)
            else:
                self._believe(entry)

    def _believe(self, entry: Local) -> None:
        """Something has been read from the store: done, if the store is still who serves it."""
        batch, tag, place, offset, length = entry
        if self.is_local(offset, length):
            self.reads_passed_down += 1
        else:
            self.read_from_target(batch, tag, place, offset, length)
        batch.piece_done(tag, 0)

    def _queue(self, op: BioOp, batch: Batch, tag: int, place: int, offset: int, length: int, flags: int) -> None:
        batch.pending += 1
        data = None
        if place >= 0 and not self._shares_memory:
            data, place = self.memory[place : place + length], -1
        self._waiting.append(Bio(op, offset // SECTOR_BYTES, length, data, batch.bio_done, flags, place, tag))


def _has_room(rings: tuple[Arena, ...]) -> bool:
    return all(ring.room() >= _ROOM_BYTES for ring in rings)

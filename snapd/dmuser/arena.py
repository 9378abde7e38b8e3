"""The arena: memory that a target and its daemon share, so that payload does not travel through the socket.

An extension of the channel that both ends agree on by having been given the same memory: a request's header carries
in the upper half of its flags field the byte offset of the payload in the arena. WRITE payload lies there when the
header is sent, READ payload lies there when the answer is; only headers cross the socket, either way.

The target's end owns the places: a ring of regions, allocated in order, freed in any order and reused in order.
Invariant: a region is not handed out again before whoever has it gave it back, so a daemon that died half-way through
an answer, seen to exit, cannot spoil a later one.
"""

import mmap
import os
from collections import deque

ARENA_BYTES = 12 << 20
PLACE_SHIFT = 32
"""A place stands in a header's flags from this bit on; the flags themselves below it."""
FLAGS_MASK = (1 << PLACE_SHIFT) - 1


def create_arena() -> int:
    """A descriptor of new shared memory of `ARENA_BYTES`, close-on-exec."""
    fd = os.memfd_create("dm-user arena")
    os.ftruncate(fd, ARENA_BYTES)
    return fd


def map_arena(fd: int) -> memoryview:
    """The arena behind a descriptor, as this process sees it."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size))


class Region:
    """`[start, end)` of an arena's memory, until it is given back with `free`."""

    __slots__ = ("_arena", "end", "is_free", "start")

    def __init__(self, arena: "Arena", start: int, end: int) -> None:
        self._arena = arena
        self.start = start
        self.end = end
        self.is_free = False

    def shrink(self, end: int) -> None:
        """Give back what lies behind `end`; only for the region that was allocated last."""
        self.end = end
        self._arena.shrunk(self)

    def free(self) -> None:
        """Give it back, once."""
        assert not self.is_free
        self.is_free = True
        self._arena.reclaim()


class Arena:
    """Hands out regions of `[first, end)` of `memory` as a ring."""

    def __init__(self, memory: memoryview, first: int, end: int) -> None:
        self.memory = memory
        self._first = first
        self._end = end
        self._head = first
        self._regions: deque[Region] = deque()

    def room(self) -> int:
        """Bytes that one region could have now."""
        if not self._regions:
            return self._end - self._first
        tail = self._regions[0].start
        if self._head <= tail:
            return tail - self._head
        return max(self._end - self._head, tail - self._first)

    def allocate(self, length: int) -> Region | None:
        """A region of `length` bytes (above 0), or None while there is no room for it."""
        start = self._head
        if not self._regions:
            start = self._first
            fits = start + length <= self._end
        elif start > (tail := self._regions[0].start):
            fits = start + length <= self._end
            if not fits:
                start, fits = self._first, self._first + length <= tail
        else:
            # The ring is full when both are equal.
            fits = start + length <= tail
        if not fits:
            return None
        region = Region(self, start, start + length)
        self._regions.append(region)
        self._head = region.end
        return region

    def shrunk(self, region: Region) -> None:
        """`region`, the last one, ends earlier now."""
        assert self._regions[-1] is region
        self._head = region.end

    def reclaim(self) -> None:
        """Take back the regions at either end that have been given back."""
        regions = self._regions
        while regions and regions[0].is_free:
            regions.popleft()
        while regions and regions[-1].is_free:
            self._head = regions.pop().start

"""Credit: how many bytes of an export may be in flight, shared fairly by its connections.

A request is in flight from its admission until its reply has left. Who is refused stands in line: nobody is admitted
before the first in line, so that a large request is not starved by many small ones. A part of what is in flight may be
a connection's own, which is counted but not shared: so those who take no replies cannot hold up the others.
"""

from collections import deque
from typing import Generic, TypeVar

Holder = TypeVar("Holder")


class Credits(Generic[Holder]):
    """`limit_bytes` for all holders; a larger request is admitted when it is alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.in_flight_bytes = 0
        self._own_bytes = 0
        self._limit_bytes = limit_bytes
        self._line: deque[Holder] = deque()
        self._wanted_bytes: dict[Holder, int] = {}

    def admit(self, holder: Holder, size_bytes: int, own_bytes: int = 0) -> bool:
        """Take `size_bytes`, of which `own_bytes` are its own, or stand in line for the others."""
        shared_bytes = size_bytes - own_bytes
        if not shared_bytes or ((not self._line or self._line[0] is holder) and self._fits(shared_bytes)):
            if self._line:
                self.leave_line(holder)
            self.take(size_bytes, own_bytes)
            return True
        if holder not in self._wanted_bytes:
            self._line.append(holder)
        self._wanted_bytes[holder] = shared_bytes
        return False

    @property
    def free_bytes(self) -> int:
        """What may be taken with `take` beyond a holder's own: nothing while somebody stands in line."""
        return 0 if self._line else max(0, self._limit_bytes - self._shared_bytes)

    def take(self, size_bytes: int, own_bytes: int = 0) -> None:
        """Take so much of `free_bytes` and of the holder's own, at once for several requests."""
        self.in_flight_bytes += size_bytes
        self._own_bytes += own_bytes

    def release(self, size_bytes: int, own_bytes: int = 0) -> None:
        """Give back what a reply that has left had taken."""
        self.in_flight_bytes -= size_bytes
        self._own_bytes -= own_bytes

    def leave_line(self, holder: Holder) -> None:
        """Forget what `holder` is waiting for."""
        if self._wanted_bytes.pop(holder, None) is not None:
            self._line.remove(holder)

    def next_in_line(self) -> Holder | None:
        """The holder that would be admitted now."""
        if self._line and self._fits(self._wanted_bytes[self._line[0]]):
            return self._line[0]
        return None

    def _fits(self, size_bytes: int) -> bool:
        return not self._shared_bytes or self._shared_bytes + size_bytes <= self._limit_bytes

    @property
    def _shared_bytes(self) -> int:
        return self.in_flight_bytes - self._own_bytes

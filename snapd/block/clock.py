"""Time as an argument: monotonic milliseconds, from the system or from a test's hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """What a module that has timeouts is given."""

    def now_ms(self) -> int:
        """Milliseconds since some fixed instant; never goes back."""
        ...

    def now_us(self) -> int:
        """The same in microseconds."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def now_us(self) -> int:
        return time.monotonic_ns() // 1000


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, start_ms: int = 0) -> None:
        self._now_ms = start_ms

    def now_ms(self) -> int:
        return self._now_ms

    def now_us(self) -> int:
        return self._now_ms * 1000

    def advance(self, ms: int) -> None:
        """Move forward by `ms` milliseconds."""
        if ms < 0:
            raise ValueError("a monotonic clock does not go back")
        self._now_ms += ms

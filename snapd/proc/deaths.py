"""Telling a crash loop from bad luck: five deaths of a process within a minute.

Whatever keeps killing it will do so again; then to stop is kinder than to try for ever.
"""

from collections import deque

CRASH_LOOP_DEATHS = 5
CRASH_LOOP_MS = 60_000


class DeathCount:
    """Counts the deaths of one process and its successors; `total` is how many there were."""

    def __init__(self) -> None:
        self.total = 0
        self._recent_ms: deque[int] = deque(maxlen=CRASH_LOOP_DEATHS)

    def is_crash_loop(self, now_ms: int) -> bool:
        """Count a death at `now_ms`; True when it was one too many within `CRASH_LOOP_MS`."""
        self.total += 1
        self._recent_ms.append(now_ms)
        return len(self._recent_ms) == CRASH_LOOP_DEATHS and now_ms - self._recent_ms[0] < CRASH_LOOP_MS

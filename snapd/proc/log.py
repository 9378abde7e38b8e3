"""What a process that serves a device says on standard error: one bounded line at a time, and not too many.

A damaged COW under a busy disk would otherwise write a line for every read.
"""

import sys

from snapd.block.clock import Clock

MAX_LINE_CHARACTERS = 400
LINES_PER_SECOND = 10


class Log:
    """Lines on standard error, `name` in front; beyond the rate they are counted instead."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._second = -1
        self._lines = 0
        self._suppressed = 0

    def line(self, text: str) -> None:
        """Write one line, unless this second has had its share."""
        second = self._clock.now_ms() // 1000
        if second != self._second:
            if self._suppressed:
                self._write(f"{self._suppressed} more lines were left out")
            self._second, self._lines, self._suppressed = second, 0, 0
        if self._lines >= LINES_PER_SECOND:
            self._suppressed += 1
            return
        self._lines += 1
        self._write(text)

    def _write(self, text: str) -> None:
        one_line = " ".join(text.split())[:MAX_LINE_CHARACTERS]
        print(f"{self._name}: {one_line}", file=sys.stderr, flush=True)

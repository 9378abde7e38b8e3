"""How far a long work is, in bytes."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); the first never falls, the second never changes."""


class Meter:
    """Adds up what was done of `total` bytes and passes it on."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, done: int) -> None:
        """So many bytes more."""
        if done:
            self._done += done
            self._progress(self._done, self._total)

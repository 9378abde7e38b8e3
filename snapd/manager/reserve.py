"""Room that is kept for the records: when everything else of the file system is used, a state can still be written.

The undo store of a merge may fill the file system of the state directory; that the merge has stopped, and why, must be
recorded all the same.
"""

import contextlib
import os

_RESERVE_BYTES = 1 << 20


class Reserve:
    """A file of `_RESERVE_BYTES` at `path` that is given up when room is needed, and made again when there is some."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_there = os.path.exists(path) and os.path.getsize(path) == _RESERVE_BYTES
        self.restore()

    def restore(self) -> None:
        """Make the file unless it is there; without room for it there is none."""
        if self._is_there:
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _RESERVE_BYTES)
            finally:
                os.close(fd)
            self._is_there = True
        except OSError:
            self.release()

    def release(self) -> None:
        """Give up the room."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._is_there = False

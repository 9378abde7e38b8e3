"""The extent map of a snapshot, kept from one mapping to the next: a COW of a million ops is parsed once.

The file lies in the snapshot's state directory, and its name says what it was made from: the identity and the times of
the COW and of its digests, the sizes, and whether the merge is confirmed. When any of these changes, so does the name,
and the map is made anew. Invariant: a name that is found again stands for the same content; so nothing is kept of a
file that was written so shortly before that another write could leave the same times behind.

The map carries digests over itself, which are checked here and by whoever maps it: a damaged one is made anew.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from snapd.block.errors import SnapdError
from snapd.cow.digests import table_path
from snapd.cow.image.extentmap import ExtentMap

_PREFIX, _SUFFIX = "extent-", ".map"
_RACY_NS = 2_000_000_000
"""Longer than the steps of any file system's time stamps."""


class KeptMap:
    """The kept map in `directory`, which is created when absent, of a COW that is open as `cow_fd`."""

    def __init__(self, directory: Path, cow_fd: int, cow_path: str, *about: object) -> None:
        self._directory = directory
        cow = os.fstat(cow_fd)
        stats = [cow]
        with contextlib.suppress(FileNotFoundError):
            stats.append(os.stat(table_path(cow_path)))
        times = [max(s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        self._is_racy = time.time_ns() - max(times) < _RACY_NS
        made_from = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        key = xxhash.xxh3_128_hexdigest(repr((made_from, about)).encode())
        self._path = directory / f"{_PREFIX}{key}{_SUFFIX}"

    def open(self, make: Callable[[], ExtentMap]) -> tuple[int, ExtentMap]:
        """A descriptor of the map's file, and the map; `make` parses the COW when there is none."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._make(make)
        try:
            return fd, ExtentMap.load(fd)
        except SnapdError:
            os.close(fd)
            return self._make(make)

    def _make(self, make: Callable[[], ExtentMap]) -> tuple[int, ExtentMap]:
        extent_map = make()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in self._directory.glob(f"{_PREFIX}*"):
            old.unlink(missing_ok=True)
        # Under another name until it is whole; one that is not to be kept never gets a name that is looked for.
        part = self._path.with_suffix(".part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            extent_map.save(fd)
            if self._is_racy:
                part.unlink()
            else:
                part.rename(self._path)
        except BaseException:
            os.close(fd)
            part.unlink(missing_ok=True)
            raise
        return fd, extent_map

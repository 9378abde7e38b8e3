"""The simulated disk: stores that forget, tear and reorder what was not flushed, and stop at any operation.

What it models
- A *page cache* over *platters*. Reads see the cache. `flush` of one file makes that file's cache durable.
- Before its flush, every 512-byte sector written may, independently of all others, have reached the platter in
  any of the versions it had since the last flush, or not at all: loss, tearing at sector borders and
  reordering are one rule. Nothing tears inside a sector (UNDO-27). A file that grew may keep its old size. A file
  that was cut may turn out not to have been: then it has what was cut off, and nothing of what was written there since.
- A *stop* happens at one numbered store operation. A write that is stopped may have put any prefix of its
  sectors into the cache. After it the machine is either `power_cut` (the platters decide) or a process was
  `kill`ed (the cache survives, and is still not durable: UNDO-24).

Every random choice comes from the `Random` that was passed in, so a seed replays a history. Operations are
counted over all files of a disk: "stop at operation 17" means the same thing in every run.
"""

import errno
from random import Random
from typing import NamedTuple

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, WritableBuffer


class Stop(Exception):
    """The simulated machine stopped here; nothing of the operation after it happens."""


class SimDisk:
    """A set of named files on one disk, with one operation counter.

    `stop_at` is the number of the operation (counted from 0) that does not happen; None means never.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.stop_at: int | None = None
        self.operations = 0
        self.trace: list[str] = []
        self.files: dict[str, SimStore] = {}

    def store(self, name: str, content: bytes = b"") -> "SimStore":
        """The file `name`; made durable with `content` when it does not exist yet."""
        if name not in self.files:
            self.files[name] = SimStore(self, name, content)
        return self.files[name]

    def remove(self, name: str) -> None:
        """Delete the file; counts as one operation, durable at once (its directory is flushed with it)."""
        self.step(f"remove {name}")
        self.files.pop(name, None)

    def power_cut(self) -> None:
        """The power failed: the cache is gone and chance decides what reached the platters."""
        for file in self.files.values():
            file.lose_unflushed()
        self.restart()

    def kill(self) -> None:
        """The process died: what it wrote stays in the page cache, no more durable than before."""
        self.restart()

    def restart(self) -> None:
        """A new process, not stopped anywhere yet."""
        self.stop_at = None

    def step(self, what: str) -> None:
        """Count one operation, or stop instead of doing it."""
        if self.stop_at is not None and self.operations >= self.stop_at:
            raise Stop(what)
        self.operations += 1
        self.trace.append(what)


class _Uncut(NamedTuple):
    """A file before the first cut since its last flush; `size` is the least that it was cut to."""

    cache: bytearray
    versions: dict[int, list[bytes]]
    size: int


class SimStore:
    """One file of a simulated disk; a `Store`."""

    def __init__(self, disk: SimDisk, name: str, content: bytes) -> None:
        self._disk = disk
        self.name = name
        self._cache = bytearray(content)
        self._durable_size = len(content)
        self._uncut: _Uncut | None = None
        # For each sector written since the last flush: its durable content, then every version since.
        self._versions: dict[int, list[bytes]] = {}

    def size(self) -> int:
        return len(self._cache)

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        end = offset + len(buffer)
        if offset < 0 or end > len(self._cache):
            raise SnapdError(errno.EIO, f"{self.name}: read {offset}..{end} behind the end {len(self._cache)}")
        buffer[:] = self._cache[offset:end]

    def write(self, data: Buffer, offset: int) -> None:
        try:
            self._disk.step(f"write {self.name} {offset}+{len(data)}")
        except Stop:
            sectors = -(-len(data) // SECTOR_BYTES)
            self._put(bytes(data[: self._disk.random.randint(0, sectors) * SECTOR_BYTES]), offset)
            raise
        self._put(bytes(data), offset)

    def flush(self) -> None:
        self._disk.step(f"flush {self.name}")
        self._forget_versions()

    def discard(self, offset: int, length: int) -> None:
        self._disk.step(f"discard {self.name} {offset}+{length}")
        if self._disk.random.random() < 0.5:
            self._put(bytes(length), offset)

    def zero(self, offset: int, length: int) -> None:
        self.write(bytes(length), offset)

    def truncate(self, size: int) -> None:
        self._disk.step(f"truncate {self.name} {size}")
        if size < len(self._cache):
            if self._uncut is None:
                versions = {sector: list(v) for sector, v in self._versions.items()}
                self._uncut = _Uncut(bytearray(self._cache), versions, size)
            self._uncut = self._uncut._replace(size=min(self._uncut.size, size))
            last, kept = divmod(size, SECTOR_BYTES)
            on_border = [version[:kept].ljust(SECTOR_BYTES, b"\0") for version in self._versions.get(last, [])]
            self._versions = {sector: v for sector, v in self._versions.items() if sector < last}
            if on_border:
                self._versions[last] = on_border
            del self._cache[size:]
        self._cache.extend(bytes(size - len(self._cache)))

    def unflushed_sectors(self) -> int:
        """How many sectors a power cut could change now."""
        return len(self._versions)

    def lose_unflushed(self) -> None:
        """Let chance choose, sector by sector, which version reached the platter."""
        random = self._disk.random
        if self._uncut is not None:
            if random.random() < 0.5:
                self._undo_cut(self._uncut)
            else:
                self._durable_size = self._uncut.size
        if len(self._cache) != self._durable_size and random.random() < 0.5:
            del self._cache[self._durable_size :]
            self._cache.extend(bytes(self._durable_size - len(self._cache)))
        for sector, versions in self._versions.items():
            start = sector * SECTOR_BYTES
            survivor = random.choice(versions)
            room = len(self._cache) - start
            if room > 0:
                self._cache[start : start + SECTOR_BYTES] = survivor[: min(SECTOR_BYTES, room)]
        self._forget_versions()

    def _undo_cut(self, uncut: "_Uncut") -> None:
        """Nothing was cut: what was written since counts only below the cut."""
        first = uncut.size // SECTOR_BYTES
        written = {sector: v for sector, v in self._versions.items() if sector < first}
        self._cache = uncut.cache
        self._versions = {sector: v for sector, v in uncut.versions.items() if sector >= first} | written

    def _forget_versions(self) -> None:
        self._versions.clear()
        self._uncut = None
        self._durable_size = len(self._cache)

    def _put(self, data: bytes, offset: int) -> None:
        if not data:
            return
        end = offset + len(data)
        first, last = offset // SECTOR_BYTES, (end - 1) // SECTOR_BYTES
        # A hole that the write leaves behind the old end reads as zeros whatever survives.
        if len(self._cache) < end:
            self._cache.extend(bytes(end - len(self._cache)))
        for sector in range(first, last + 1):
            self._versions.setdefault(sector, [self._sector(sector)])
        self._cache[offset:end] = data
        for sector in range(first, last + 1):
            self._versions[sector].append(self._sector(sector))

    def _sector(self, sector: int) -> bytes:
        start = sector * SECTOR_BYTES
        return bytes(self._cache[start : start + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")

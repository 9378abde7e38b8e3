"""The descriptors of one snapshot: opened and locked once, then handed on.

Invariant: the exclusive locks on base and COW live as long as any process holds a copy of these descriptors, so a
restarted daemon that finds the device host alive takes them back from it and never opens the paths again.
"""

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore, file_store
from snapd.block.lock import open_locked
from snapd.cow.claim import check_unclaimed
from snapd.cow.digests import load_digests
from snapd.cow.history import holds_new_image
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.manager.keptmap import KeptMap
from snapd.manager.paths import ServicePaths
from snapd.manager.records import SnapshotRecord
from snapd.manager.states import SnapshotState
from snapd.merge.sharedmap import SharedMap
from snapd.merge.undodir import UndoDirectory
from snapd.merge.views import restore_shared_map

_GENERATION = 1


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `snapshot create` learns from the two files; sizes in bytes."""

    old_size_bytes: int
    new_size_bytes: int
    changed_bytes: int


def inspect(base_path: str, cow_path: str) -> Inspection:
    """Open, lock and check base and COW, and close them again; `SnapdError` names what is wrong."""
    with contextlib.ExitStack() as stack:
        base_fd, cow_fd = _open_pair(base_path, cow_path, stack)
        check_unclaimed(cow_path)
        base, payloads = file_store(base_fd, base_path), file_store(cow_fd, cow_path)
        cow = CowFile.parse(payloads)
        if holds_new_image(cow, cow_path, payloads, base):
            raise SnapdError(
                errno.EBUSY, f"{base_path} is the new image of {cow_path} already", reason="ALREADY_MERGED"
            )
        if isinstance(base, BlockDeviceStore) and base.size() < cow.target_size(0):
            raise SnapdError(
                errno.ENOSPC, f"{base_path} has {base.size()} bytes, the new image needs {cow.target_size(0)}"
            )
        extent_map = cow.extent_map(base.size(), digests=load_digests(cow_path, cow))
        new_size = extent_map.block_count * extent_map.block_size
        return Inspection(base.size(), new_size, extent_map.changed_blocks() * extent_map.block_size)


@dataclass(slots=True)
class Resources:
    """Open descriptors of a snapshot; `close` gives up our copies."""

    cow_fd: int
    base_fd: int
    extent_map_fd: int
    shared_map_fd: int
    undo_fd: int

    @classmethod
    def open(cls, record: SnapshotRecord, service: ServicePaths) -> "Resources":
        """Open and lock everything anew; blocks while the COW is parsed.

        Errors: EBUSY when somebody holds a lock, or has begun to merge the COW; what `CowFile` refuses; EINVAL when
        the base has neither its old nor its new size.
        """
        paths = service.device(record.uuid)
        with contextlib.ExitStack() as stack:
            base_fd, cow_fd = _open_pair(record.base_path, record.cow_path, stack)
            check_unclaimed(record.cow_path, UUID(record.uuid))
            base_size = file_store(base_fd, record.base_path).size()
            if base_size not in (record.old_size_bytes, record.new_size_bytes):
                raise SnapdError(
                    errno.EINVAL,
                    f"{record.base_path} has {base_size} bytes; it had {record.old_size_bytes} when the snapshot was"
                    f" created and will have {record.new_size_bytes}",
                    reason="BASE_SIZE_CHANGED",
                )
            # After the confirmation the base alone is the image.
            merged = record.state is SnapshotState.CONFIRMED

            def parse() -> ExtentMap:
                cow = CowFile.parse(file_store(cow_fd, record.cow_path))
                digests = load_digests(record.cow_path, cow)
                return cow.extent_map(record.old_size_bytes, record.new_size_bytes, merged=merged, digests=digests)

            sizes = record.old_size_bytes, record.new_size_bytes
            kept = KeptMap(service.snapshot(record.uuid), cow_fd, record.cow_path, *sizes, merged)
            extent_map_fd, extent_map = kept.open(parse)
            stack.callback(os.close, extent_map_fd)
            shared_map_fd = _create(paths.shared_map, stack)
            shared = SharedMap.create(shared_map_fd, extent_map, UUID(record.uuid), _GENERATION)
            undo_fd = _open_undo(service, record.uuid, stack)
            _restore(shared, extent_map, undo_fd)
            stack.pop_all()
            return cls(cow_fd, base_fd, extent_map_fd, shared_map_fd, undo_fd)

    @classmethod
    def adopt(cls, given: Mapping[str, int]) -> "Resources":
        """What a running device was given, by name."""
        return cls(*(given[name] for name in ("cow", "base", "extent_map", "shared_map", "undo_directory")))

    def stores(self) -> dict[str, int]:
        """What a device is given, by name."""
        return {
            "base": self.base_fd,
            "cow": self.cow_fd,
            "extent_map": self.extent_map_fd,
            "shared_map": self.shared_map_fd,
            "undo_directory": self.undo_fd,
        }

    def close(self) -> None:
        """Close our copies; the locks stay while a child holds its own."""
        for fd in (self.cow_fd, self.base_fd, self.extent_map_fd, self.shared_map_fd, self.undo_fd):
            os.close(fd)


def _open_pair(base_path: str, cow_path: str, stack: contextlib.ExitStack) -> tuple[int, int]:
    base_fd = open_locked(base_path)
    stack.callback(os.close, base_fd)
    cow_fd = open_locked(cow_path)
    stack.callback(os.close, cow_fd)
    return base_fd, cow_fd


def _restore(shared: SharedMap, extent_map: ExtentMap, undo_fd: int) -> None:
    """Publish how far the merge is before anybody reads through the map: the base may be new already."""
    files = UndoDirectory(undo_fd)
    try:
        restore_shared_map(shared, extent_map, files)
    finally:
        files.close()


def _create(path: str, stack: contextlib.ExitStack) -> int:
    """A new file at `path`, also when another process still maps the one that was there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return fd


def _open_undo(service: ServicePaths, uuid: str, stack: contextlib.ExitStack) -> int:
    path = service.undo(uuid)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd

"""Who has begun to merge a COW: what lies beside it under `<COW>.undo` (UNDO-28).

A directory is an offline merge: its undo store. A file is a service's claim and names the snapshot and its undo
directory. From the first base write until confirm, base + COW alone give a wrong image, so everybody else refuses the
COW; that must hold when no process runs and no lock is left. A COW on a block device has nothing beside it and
cannot be claimed.
"""

import errno
import json
import os
import stat
from uuid import UUID

from snapd.block.errors import SnapdError

SUFFIX = ".undo"
_Path = str | os.PathLike[str]


def claim_path(cow_path: _Path) -> str:
    """The claim of a COW, whatever name it goes by."""
    return os.path.realpath(cow_path) + SUFFIX


def check_unclaimed(cow_path: _Path, snapshot: UUID | None = None) -> None:
    """EBUSY if somebody else than `snapshot` has begun to merge the COW."""
    path = claim_path(cow_path)
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise SnapdError(
                errno.EBUSY,
                f"{os.fspath(cow_path)}: an offline merge of it has begun, finish that with `snapctl cow merge`",
            )
        with open(path, "rb") as file:
            owner = json.load(file)
        if not isinstance(owner, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise SnapdError(errno.EBUSY, f"{path}: there, but not readable as a claim ({error})") from error
    if snapshot is None or owner.get("snapshot") != str(snapshot):
        raise SnapdError(
            errno.EBUSY,
            f"{os.fspath(cow_path)}: a service has begun to merge it and it is not confirmed yet"
            f" (snapshot {owner.get('snapshot')}, undo store in {owner.get('undo')})",
        )


def claim(cow_path: _Path, snapshot: UUID, undo_directory: _Path) -> None:
    """Durably say that `snapshot` merges the COW; EBUSY when somebody else does, else the system's errors."""
    check_unclaimed(cow_path, snapshot)
    path = claim_path(cow_path)
    try:
        if stat.S_ISBLK(os.stat(cow_path).st_mode):
            return
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"snapshot": str(snapshot), "undo": os.fspath(undo_directory)}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(path)
    except OSError as error:
        raise SnapdError.from_os(error, f"write {path}, without which the COW must not be merged") from error


def release(cow_path: _Path, snapshot: UUID) -> None:
    """Take back the claim of `snapshot`; nothing happens when there is none."""
    path = claim_path(cow_path)
    try:
        check_unclaimed(cow_path, snapshot)
        os.unlink(path)
        _sync_directory(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SnapdError.from_os(error, f"remove {path}") from error


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

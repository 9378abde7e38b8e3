"""The merge without a service: `snapctl cow merge C --base A`, in place, resumable by calling it again.

The undo store lives in `<C>.undo/` beside the COW while it is needed. Both files are locked from the first look on.

| step | action | a stop after it leaves | the next call |
| --- | --- | --- | --- |
| 1 | lock C and A, parse C, check the sizes | nothing | starts |
| 2 | make `<C>.undo/`, flush its parent | an empty directory | uses it |
| 3 | merge and read back (the table in `engine`) | MERGING or MERGED; both images readable | checks A, continues |
| 4 | state CONFIRMED | the new image, whole and read back | checks A, goes on with 5 |
| 5 | `<C>.merged` written, by which A is known for the new image (`snapd.cow.history`) | the same | checks A, goes on |
| 6 | C's `num_merge_ops` = `op_count`, flushed (COW-145, COW-146) | a COW that says merged | checks A, goes on with 7 |
| 7 | remove the undo store, then the state, then the directory | maybe an empty directory | removes it |

A base is never believed because somebody named it: a call that finds earlier work checks that this is the base it was
done on, before anything is written.
"""

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.block.lock import open_locked
from snapd.block.store import Store
from snapd.cow.claim import check_unclaimed, claim_path
from snapd.cow.digests import DigestTable, load_digests
from snapd.cow.history import holds_new_image, record_merge
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.merge.basecheck import check_begun_base
from snapd.merge.engine import Merge
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, State
from snapd.merge.undodir import UndoDirectory
from snapd.merge.undotable import UndoIdentity
from snapd.merge.views import open_undo
from snapd.merge.work import Hooks


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a call did. `changed_bytes` counts blocks whose content the COW changes, `written_bytes` what this call
    wrote to the base, `undo_bytes` the undo store at its largest; all are 0 when the COW was merged before."""

    already_merged: bool
    changed_bytes: int = 0
    written_bytes: int = 0
    undo_bytes: int = 0
    seconds: float


def merge_offline(
    cow_path: str, base_path: str, progress: Callable[[int, int], None], *, ignore_digests: bool = False
) -> MergeReport:
    """Make the base what the COW describes; `progress` gets (bytes done, bytes in all), reading back included.

    Every block that is written is compared with its digest first, where the COW has a table (COW-216).
    Errors: EBUSY when either file is in use; EBADMSG or EINVAL for a COW, base or undo directory that do not belong
    together, with nothing changed; ENOSPC; EIO. After any error or stop the call can be repeated.
    """
    started = time.monotonic()
    with _locked(cow_path) as cow_fd, _locked(base_path) as base_fd:
        cow_store, base = file_store(cow_fd, cow_path), file_store(base_fd, base_path)
        if os.path.sameopenfile(cow_fd, base_fd):
            raise SnapdError(errno.EINVAL, f"{base_path}: is the COW itself")
        cow = CowFile.parse(cow_store)
        directory = _undo_path(cow_path)
        if _is_over(cow, cow_path, cow_store, base, directory):
            _remove_directory(directory)
            return MergeReport(already_merged=cow.op_count > 0, seconds=time.monotonic() - started)
        digests = None if ignore_digests else load_digests(cow_path, cow)
        if not os.path.lexists(directory):
            cow.extent_map(base.size(), digests=digests)
            _make_directory(directory)
        with _undo_directory(directory) as files:
            report = _merge(cow, cow_path, cow_store, base, files, digests, progress)
        _remove_directory(directory)
        return replace(report, seconds=time.monotonic() - started)


def _is_over(cow: CowFile, cow_path: str, cow_store: Store, base: Store, directory: str) -> bool:
    """Whether nothing is left to be done but to remove what is in the way."""
    state = None
    if os.path.lexists(directory):
        with _undo_directory(directory) as files:
            state = files.read_state()
        if state is not None and not (state.phase is Phase.CONFIRMED and cow.is_merged):
            return False
    if not cow.op_count or holds_new_image(cow, cow_path, cow_store, base):
        return True
    if state is not None:
        raise SnapdError(errno.EINVAL, f"{cow_path}: a merge of it has just ended, on another base than this one")
    return False


def _merge(
    cow: CowFile,
    cow_path: str,
    cow_store: Store,
    base: Store,
    files: UndoDirectory,
    digests: DigestTable | None,
    progress: Callable[[int, int], None],
) -> MergeReport:
    """Steps 3 to 6."""
    state = files.read_state()
    extent_map = _extent_map(cow, base, files, state, digests)
    if state is not None:
        check_begun_base(state, extent_map, cow_store, base, files)
    written_bytes = 0
    if state is None or state.phase is not Phase.CONFIRMED:
        snapshot = uuid.uuid4() if state is None else state.snapshot
        with _fresh_shared_map(extent_map, snapshot) as shared:
            merge = Merge(
                snapshot=snapshot,
                extent_map=extent_map,
                cow=cow_store,
                base=base,
                files=files,
                shared=shared,
                hooks=Hooks(
                    progress=lambda phase, done, total: progress(done + total * (phase == "read_back"), 2 * total)
                ),
            )
            merge.run()
            state = merge.confirm()
            written_bytes = merge.written_bytes
    undo = open_undo(replace(state, phase=Phase.MERGED), extent_map, files)
    assert undo is not None
    record_merge(cow, cow_path, cow_store, state.old_digest, state.new_digest)
    grown_bytes = max(0, state.new_size_bytes - state.old_size_bytes)
    return MergeReport(
        already_merged=False,
        changed_bytes=undo.saved_blocks() * extent_map.block_size + grown_bytes,
        written_bytes=written_bytes,
        undo_bytes=undo.size_bytes,
        seconds=0,
    )


def _extent_map(
    cow: CowFile, base: Store, files: UndoDirectory, state: State | None, digests: DigestTable | None
) -> ExtentMap:
    """C over the old image's size, which a base that has grown does not tell any more."""
    if state is None:
        return cow.extent_map(base.size(), digests=digests)
    if state.phase is not Phase.ROLLED_BACK:
        _, table = files.open_undo()
        if UndoIdentity.read(table).ops_digest != cow.ops_digest:
            raise SnapdError(
                errno.EINVAL, "the undo directory beside this COW belongs to the unfinished merge of another COW"
            )
    return cow.extent_map(state.old_size_bytes, state.new_size_bytes, digests=digests)


def _undo_path(cow_path: str) -> str:
    """Where the undo directory is or will be; EBUSY when a service has claimed the COW (UNDO-28)."""
    if stat.S_ISBLK(os.stat(cow_path).st_mode):
        raise SnapdError(errno.EOPNOTSUPP, f"{cow_path}: a device has no place beside it for an undo store")
    path = claim_path(cow_path)
    if os.path.lexists(path) and not os.path.isdir(path):
        check_unclaimed(cow_path)
    return path


@contextmanager
def _locked(path: str) -> Iterator[int]:
    fd = open_locked(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _undo_directory(path: str) -> Iterator[UndoDirectory]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SnapdError.from_os(error, f"open {path}") from error
    try:
        with contextlib.closing(UndoDirectory(fd)) as files:
            yield files
    finally:
        os.close(fd)


@contextmanager
def _fresh_shared_map(extent_map: ExtentMap, snapshot: uuid.UUID) -> Iterator[SharedMap]:
    """The map of a merge that nobody else reads."""
    fd = os.memfd_create("snapd-shared-map", os.MFD_CLOEXEC)
    try:
        yield SharedMap.create(fd, extent_map, snapshot, generation=0)
    finally:
        os.close(fd)


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
        _flush_parent(path)
    except OSError as error:
        raise SnapdError.from_os(error, f"make {path}") from error


def _remove_directory(path: str) -> None:
    """Step 7; EBUSY while what is in it is needed."""
    if not os.path.lexists(path):
        return
    with _undo_directory(path) as files:
        files.remove()
    try:
        os.rmdir(path)
        _flush_parent(path)
    except OSError as error:
        raise SnapdError.from_os(error, f"remove {path}") from error


def _flush_parent(path: str) -> None:
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

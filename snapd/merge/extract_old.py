"""`snapctl cow extract` of an undo store: the old image, from the base and what a merge saved of it.

Takes no lock, for the merge that fills the store holds them: until confirm the old image can be had at any moment,
also while a merge or a rollback is running (UNDO-3). The store's header says how many ops must be known before the
base is believed, and `OldImage` looks at it again after every piece it took from the base (UNDO-25). A store
that was released meanwhile protects the base no longer, so it must still be there at the end.
"""

import contextlib
import errno
import os
import time

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore, file_store
from snapd.block.newfile import new_file
from snapd.cow.progress import Progress
from snapd.cow.verbs.extract import ExtractReport, copy_image
from snapd.merge.oldview import OldImage
from snapd.merge.statefile import read_state
from snapd.merge.undodir import STATE_NAME
from snapd.merge.undostore import UndoStore
from snapd.merge.undotable import MAGIC, SUFFIX

_STABLE_TRIES = 100
_Path = str | os.PathLike[str]


def is_undo_store(path: _Path) -> bool:
    """Whether the table beside `path` is an undo store's: an ordinary COW may have a table too (COW-216)."""
    table = os.fspath(path) + SUFFIX
    try:
        with open(table, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SnapdError.from_os(error, f"read {table}") from error


def extract_old(
    undo_path: _Path, base_path: _Path, out_path: _Path, size_bytes: int | None, progress: Progress
) -> ExtractReport:
    """Write the old image to `out_path`, which is replaced as a whole; its size is `size_bytes`, else O's.

    Errors: EINVAL for a size above O's, a base below it, or an output that is an input; EBADMSG for a damaged
    store; EAGAIN when the merge was confirmed or undone meanwhile. The old `out_path` stays as it was then.
    """
    begin = time.monotonic()
    path, base_name = os.fspath(undo_path), os.fspath(base_path)
    with contextlib.ExitStack() as stack:
        found = _stat(path)
        durable_ops = _durable_ops(path)
        undo = stack.enter_context(contextlib.closing(UndoStore.open(path)))
        if undo.stored_op_count() < durable_ops:
            raise SnapdError(
                errno.EBADMSG, f"{path}: {undo.stored_op_count()} ops, {durable_ops} were durable (UNDO-12a)"
            )
        base = file_store(_open(base_name, stack), base_name)
        size = undo.size if size_bytes is None else size_bytes
        if not 0 <= size <= undo.size:
            raise SnapdError(errno.EINVAL, f"{size} bytes of an old image of {undo.size}")
        if base.size() < undo.size:
            raise SnapdError(errno.EINVAL, f"{base_name}: {base.size()} bytes, the old image had {undo.size}")
        out = stack.enter_context(new_file(os.fspath(out_path), inputs=[path, path + SUFFIX, base_name]))
        copy_image(lambda: OldImage(base, lambda: _op_count(undo), lambda: undo), size, out, progress, threads=1)
        if not _is_still(path, found):
            raise SnapdError(errno.EAGAIN, f"{path}: the merge was confirmed or undone meanwhile")
        return ExtractReport(size, time.monotonic() - begin, digests="checked")


def _durable_ops(path: str) -> int:
    """How many ops the state file beside the store vouches for; 0 where the store lies alone.

    Read before the store's header, which is always ahead of it.
    """
    try:
        fd = os.open(os.path.join(os.path.dirname(path), STATE_NAME), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        state = read_state(FileStore(fd, STATE_NAME))
    finally:
        os.close(fd)
    return state.undo_op_count if state is not None and state.needs_undo else 0


def _op_count(undo: UndoStore) -> int:
    """The store's op count; read until it repeats, as a read beside a write may see half of each."""
    count = undo.stored_op_count()
    for _ in range(_STABLE_TRIES):
        again = undo.stored_op_count()
        if again == count:
            return count
        count = again
    raise SnapdError(errno.EAGAIN, "undo store: its op count does not stand still")


def _open(path: str, stack: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapdError.from_os(error, f"open {path}") from error
    stack.callback(os.close, fd)
    return fd


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise SnapdError.from_os(error, f"look at {path}") from error


def _is_still(path: str, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), found)
    except FileNotFoundError:
        return False

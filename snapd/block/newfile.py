"""A file that appears under its name whole or not at all, alone or with a companion that vouches for it.

Invariant: whatever lies under the final name is either what lay there before or the complete new content. Two writers
of one name exclude each other, and a file that somebody has locked is not replaced under them.

| step | action | a crash after it leaves |
| --- | --- | --- |
| 1 | lock `<name>.part`, cut it to nothing | the old file or none; the next writer reuses the `.part` |
| 2 | write | the same |
| 3 | flush `.part` | the same |
| 4 | rename it to the final name | the old or the new file |
| 5 | flush the directory | the new file |

A companion means nothing beside any file but its own, which is whole without it. So no two names ever change together:

| step | action | a crash after it leaves |
| --- | --- | --- |
| 1 to 3 | the same for both | the old file, and its companion |
| 4 | remove the old companion, flush the directory | the old file alone |
| 5 | put the file under its name, flush the directory | the new file alone |
| 6 | put the companion under its name, flush the directory | the new file, and its companion |
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.lock import open_locked


@contextlib.contextmanager
def new_file(path: str, *, inputs: Sequence[str]) -> Iterator[FileStore]:
    """The store to write; leaving the context without an error puts it under `path`, with one removes it.

    Errors: EINVAL when `path` is one of the `inputs` or there and not a regular file; EBUSY when somebody else
    writes it or holds the lock of the file it would replace; else the system's.
    """
    with _part_of(path, inputs) as part:
        yield part
        _flush(part)
        _publish(part, path)


@contextlib.contextmanager
def new_pair(path: str, companion: str, *, inputs: Sequence[str]) -> Iterator[tuple[FileStore, FileStore]]:
    """The same for a file and its companion; whatever happens, no companion lies beside a file that is not its own."""
    with _part_of(path, inputs) as part, _part_of(companion, inputs) as companion_part:
        yield part, companion_part
        _flush(part)
        _flush(companion_part)
        _remove(companion)
        _publish(part, path)
        _publish(companion_part, companion)


@contextlib.contextmanager
def _part_of(path: str, inputs: Sequence[str]) -> Iterator[FileStore]:
    """The locked, empty `.part` of a new file; an error removes it."""
    part = path + ".part"
    with contextlib.ExitStack() as stack:
        _check_place(path, part, inputs)
        if os.path.lexists(path):
            stack.callback(os.close, open_locked(path, writable=False))
        fd = _open_part(part)
        stack.callback(os.close, fd)
        try:
            yield FileStore(fd, part)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise


def _check_place(path: str, part: str, inputs: Sequence[str]) -> None:
    for name in (path, part):
        try:
            mode = os.lstat(name).st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SnapdError.from_os(error, f"look at {name}") from error
        if not stat.S_ISREG(mode):
            raise SnapdError(errno.EINVAL, f"{name}: is there and not a regular file, so it is not replaced")
        for other in inputs:
            if os.path.exists(other) and os.path.samefile(name, other):
                raise SnapdError(errno.EINVAL, f"{name}: the output would replace the input {other}")


def _open_part(part: str) -> int:
    fd = -1
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls its writer may have finished: then the lock is that of the finished file.
        if not os.path.samestat(os.fstat(fd), os.stat(part, follow_symlinks=False)):
            raise BlockingIOError(errno.EAGAIN, "")
        os.ftruncate(fd, 0)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if fd >= 0 and error.errno in (errno.EAGAIN, errno.ENOENT):
            raise SnapdError(errno.EBUSY, f"{part}: somebody else is writing it") from error
        raise SnapdError.from_os(error, f"create {part}") from error
    return fd


def _flush(part: FileStore) -> None:
    try:
        os.fsync(part.fd)
    except OSError as error:
        raise SnapdError.from_os(error, f"flush {part.name}") from error


def _publish(part: FileStore, path: str) -> None:
    try:
        os.rename(part.name, path)
        _flush_directory(path)
    except OSError as error:
        raise SnapdError.from_os(error, f"put {part.name} under its name {path}") from error


def _remove(path: str) -> None:
    try:
        os.unlink(path)
        _flush_directory(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SnapdError.from_os(error, f"remove {path}") from error


def _flush_directory(path: str) -> None:
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

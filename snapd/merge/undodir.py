"""The undo directory of one snapshot: `state`, `undo.cow` and `undo.cow.digests`.

Whoever owns the directory hands its descriptor on; every name here is opened relative to it. A file that was made or
removed is so durably only after `sync`. The state file is made first and removed last, so that what an undo store
means is always known.
"""

import contextlib
import errno
import os
from typing import Protocol

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import Store
from snapd.merge.oldview import UNDO_NAME
from snapd.merge.statefile import Phase, State, read_state
from snapd.merge.undotable import SUFFIX

STATE_NAME = "state"


class UndoFiles(Protocol):
    """The three files as the engine is given them."""

    @property
    def state(self) -> Store:
        """The state file; empty before anything has begun."""
        ...

    def create_undo(self) -> tuple[Store, Store]:
        """An empty undo store and table in place of any that are there."""
        ...

    def open_undo(self) -> tuple[Store, Store]:
        """The undo store and its table; EBADMSG when one is missing."""
        ...

    def sync(self) -> None:
        """Make creations and removals durable."""
        ...


class UndoDirectory:
    """`UndoFiles` behind a directory descriptor, which is borrowed; `close` closes the files opened here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._fds: list[int] = []
        flags = os.O_RDWR | os.O_CREAT
        self._state = self._open(STATE_NAME, flags)
        self.sync()

    @property
    def state(self) -> Store:
        return self._state

    def create_undo(self) -> tuple[Store, Store]:
        self._unlink(UNDO_NAME, UNDO_NAME + SUFFIX)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self._open(UNDO_NAME, flags), self._open(UNDO_NAME + SUFFIX, flags)

    def open_undo(self) -> tuple[Store, Store]:
        return self._open(UNDO_NAME, os.O_RDWR), self._open(UNDO_NAME + SUFFIX, os.O_RDWR)

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise SnapdError.from_os(error, "flush the undo directory") from error

    def read_state(self) -> State | None:
        """The durable record; None before anything has begun."""
        return read_state(self._state)

    def remove(self) -> None:
        """Remove the undo store, then the state file; EBUSY while either view still needs them (UNDO-10, UNDO-14)."""
        state = self.read_state()
        if state is not None and state.phase not in (Phase.CONFIRMED, Phase.ROLLED_BACK):
            raise SnapdError(errno.EBUSY, f"undo directory: still needed, the snapshot is {state.phase.name}")
        self._unlink(UNDO_NAME, UNDO_NAME + SUFFIX)
        self.sync()
        self._unlink(STATE_NAME)
        self.sync()

    def close(self) -> None:
        """Close the files; the directory's descriptor stays open."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _open(self, name: str, flags: int) -> FileStore:
        try:
            fd = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._fd)
        except FileNotFoundError as error:
            raise SnapdError(errno.EBADMSG, f"undo directory: {name} is missing (UNDO-15)") from error
        except OSError as error:
            raise SnapdError.from_os(error, f"open {name} in the undo directory") from error
        self._fds.append(fd)
        return FileStore(fd, name)

    def _unlink(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

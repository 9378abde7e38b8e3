"""All records of a state directory: what runs for updates, who is changing and who is watching them.

Invariant: `commit` returns when the record is durable, and only then anybody sees it (UNDO-8). Whoever changes an
update or a store's device holds its lock; whoever makes an update holds `creation`.
"""

import asyncio
import errno
import fcntl
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from snapd.block.errors import SnapdError
from snapd.manager.database import Database
from snapd.manager.paths import ServicePaths
from snapd.manager.paths import device_id as id_of_uuid
from snapd.manager.records import DeviceRecord, SnapshotRecord, UpdateRecord
from snapd.manager.reserve import Reserve
from snapd.manager.runtime import Runtime

_COMMIT_TRIES = 60
_COMMIT_PAUSE_S = 60

_log = logging.getLogger("snapd.manager")
_T = TypeVar("_T")


class Registry:
    """The one owner of a state directory. All methods run on one event loop; errors are `SnapdError`."""

    def __init__(
        self, paths: ServicePaths, lock_fd: int, database: Database, database_thread: ThreadPoolExecutor
    ) -> None:
        self.paths = paths
        self.creation = asyncio.Lock()
        self._lock_fd = lock_fd
        self._database = database
        # SQLite flushes: the loop must not wait for the disk.
        self._database_thread = database_thread
        self._updates: dict[str, UpdateRecord] = {}
        self._devices: dict[str, DeviceRecord] = {}
        self._runtimes: dict[str, Runtime] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._device_locks: dict[str, asyncio.Lock] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self.closing = asyncio.Event()

    @classmethod
    async def open(cls, state_directory: str) -> "Registry":
        """Take the state directory and load its records; EBUSY when a daemon serves it."""
        paths = ServicePaths(state_directory)
        lock_fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        thread = ThreadPoolExecutor(1, "database")
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            database = await asyncio.get_running_loop().run_in_executor(
                thread, lambda: Database(paths.database, Reserve(paths.reserve))
            )
        except BlockingIOError as error:
            os.close(lock_fd)
            raise SnapdError(errno.EBUSY, f"{paths.state}: another snapd serves this state directory") from error
        except sqlite3.Error as error:
            os.close(lock_fd)
            raise SnapdError(errno.EIO, f"open {paths.database}: {error}") from error
        except SnapdError:
            os.close(lock_fd)
            raise
        registry = cls(paths, lock_fd, database, thread)
        for update in await registry._in_database(database.load):
            registry._updates[update.id] = update
        for device in await registry._in_database(database.load_devices):
            registry._devices[device.id] = device
        return registry

    async def close(self) -> None:
        """Close the records and give up the state directory."""
        await self._in_database(self._database.close)
        self._database_thread.shutdown()
        os.close(self._lock_fd)

    def __len__(self) -> int:
        return len(self._updates)

    def __contains__(self, update_id: str) -> bool:
        return update_id in self._updates

    def updates(self) -> list[UpdateRecord]:
        """All records, oldest first."""
        return list(self._updates.values())

    def update(self, update_id: str) -> UpdateRecord:
        """The record as it is durable now; ENODEV when there is none."""
        update = self._updates.get(update_id)
        if update is None:
            raise SnapdError(errno.ENODEV, f"there is no update {update_id}")
        return update

    def devices(self) -> list[DeviceRecord]:
        """The records of the devices of stores."""
        return list(self._devices.values())

    def has_device(self, device_id: str) -> bool:
        """Whether the id is taken, by a store's device or by that of a snapshot, mapped or not."""
        snapshots = (s for update in self._updates.values() for s in update.snapshots)
        return device_id in self._devices or any(id_of_uuid(s.uuid) == device_id for s in snapshots)

    def device(self, device_id: str) -> DeviceRecord:
        """The record of a store's device as it is durable now; ENODEV when there is none."""
        device = self._devices.get(device_id)
        if device is None:
            raise SnapdError(errno.ENODEV, f"there is no device {device_id} of a store")
        return device

    def runtime(self, record: SnapshotRecord) -> Runtime:
        """What runs for a snapshot in this daemon."""
        return self._runtimes.setdefault(record.uuid, Runtime())

    def runtimes(self) -> Iterable[Runtime]:
        """What runs for all of them."""
        return self._runtimes.values()

    def lock(self, update_id: str) -> asyncio.Lock:
        """Held by whoever changes the update; ENODEV when there is none."""
        self.update(update_id)
        return self._locks.setdefault(update_id, asyncio.Lock())

    def device_lock(self, device_id: str) -> asyncio.Lock:
        """Held by whoever makes, changes or deletes the device of a store."""
        return self._device_locks.setdefault(device_id, asyncio.Lock())

    async def commit(self, update: UpdateRecord) -> None:
        """Make the record durable, then current, then known; ENOSPC or EIO with nothing changed."""
        await self._in_database(lambda: self._database.save(update))
        self._updates[update.id] = update
        self.notify(update.id)

    async def commit_device(self, device: DeviceRecord) -> None:
        """Make the record of a store's device durable, then current; ENOSPC or EIO with nothing changed."""
        await self._in_database(lambda: self._database.save_device(device))
        self._devices[device.id] = device

    async def forget_device(self, device_id: str) -> None:
        """Delete the record of a store's device; ENOSPC or EIO with nothing changed."""
        await self._in_database(lambda: self._database.delete_device(device_id))
        del self._devices[device_id]

    async def commit_at_last(self, update: UpdateRecord) -> None:
        """Commit what has happened already; when that fails, wait ever longer for somebody to mend it."""
        for attempt in range(_COMMIT_TRIES):
            try:
                return await self.commit(update)
            except SnapdError as error:
                _log.error("%s, trying again", error)
                await asyncio.sleep(min(2**attempt, _COMMIT_PAUSE_S))
        _log.error("gave up on the record of %s; the next start finds out again", update.id)
        return None

    def notify(self, update_id: str) -> None:
        """Something that `watch` is for has changed."""
        for event in self._watchers.get(update_id, ()):
            event.set()

    async def watch(self, update_id: str) -> AsyncIterator[None]:
        """Now, then after each change, until `stop_watching`; a slow watcher is told once of many changes."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(update_id, set())
        watchers.add(changed)
        try:
            while not self.closing.is_set():
                changed.clear()
                yield
                await changed.wait()
        finally:
            watchers.discard(changed)

    def stop_watching(self) -> None:
        """End every `watch`: the daemon is about to stop."""
        self.closing.set()
        for update_id in self._watchers:
            self.notify(update_id)

    async def _in_database(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._database_thread, function)

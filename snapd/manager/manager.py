"""Updates and their snapshots: every transition, and the recovery that picks up after a crash at any point.

Invariant: a transition is durable before anybody sees it, and before the processes it calls for are started; so at the
next start the records say what must run, and `_recover` makes it so. The order of one transition:

| step | action | a crash after it leaves | next start |
| --- | --- | --- | --- |
| 1 | check; open and lock the files; claim the COWs of a merge | maybe our claim | nothing: it is ours |
| 2 | write the records, one transaction | the intention | the processes are started |
| 3 | start or stop processes | the same | adopted, or started, or stopped |
| 4 | tell watchers | – | – |

Mapping swaps 2 and 3 (a device nobody was told of is stopped at the next start).
"""

import asyncio
import errno
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from snapd.block.errors import SnapdError
from snapd.cow import claim
from snapd.manager.confirm import release_undo
from snapd.manager.database import Database
from snapd.manager.devicehost import DeviceHost, evict, evict_hosts
from snapd.manager.merger import MergerProcess
from snapd.manager.paths import ServicePaths
from snapd.manager.records import SnapshotRecord, UpdateRecord, check_id
from snapd.manager.reserve import Reserve
from snapd.manager.resources import Resources, inspect
from snapd.manager.runtime import Runtime
from snapd.manager.states import ReadBack, SnapshotState, UpdateState, check_transition
from snapd.manager.status import SnapshotStatus, UpdateStatus

_MAX_UPDATES = 1000
_MAX_SNAPSHOTS = 64
_MAX_MERGERS = 2
_COMMIT_TRIES = 60
_COMMIT_PAUSE_S = 60
_KEEPS_LOCKS = (SnapshotState.MERGING, SnapshotState.MERGED, SnapshotState.FAILED)

_log = logging.getLogger("snapd.manager")
_T = TypeVar("_T")


class Manager:
    """The one owner of a state directory. All methods run on one event loop; errors are `SnapdError`."""

    def __init__(
        self, paths: ServicePaths, lock_fd: int, database: Database, database_thread: ThreadPoolExecutor
    ) -> None:
        self._paths = paths
        self._lock_fd = lock_fd
        self._database = database
        self._database_thread = database_thread
        self._updates: dict[str, UpdateRecord] = {}
        self._runtimes: dict[str, Runtime] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._closing = False

    @classmethod
    async def open(cls, state_directory: str) -> "Manager":
        """Take the state directory and bring everything it records back to life; EBUSY when a daemon serves it."""
        paths = ServicePaths(state_directory)
        lock_fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise SnapdError(errno.EBUSY, f"{paths.state}: another snapd serves this state directory") from None
        thread = ThreadPoolExecutor(1, "database")
        try:
            database = await asyncio.get_running_loop().run_in_executor(
                thread, lambda: Database(paths.database, Reserve(paths.reserve))
            )
        except sqlite3.Error as error:
            raise SnapdError(errno.EIO, f"open {paths.database}: {error}") from error
        manager = cls(paths, lock_fd, database, thread)
        for update in await manager._in_database(database.load):
            manager._updates[update.id] = update
            manager._locks[update.id] = asyncio.Lock()
            for snapshot in update.snapshots:
                manager._runtimes[snapshot.uuid] = Runtime()
        await asyncio.gather(*(manager._recover(update.id) for update in list(manager._updates.values())))
        manager._start_mergers()
        return manager

    async def close(self) -> None:
        """Give up control: mergers stop at their next span, device hosts go on for the next daemon."""
        self._closing = True
        await asyncio.gather(*(r.merger.stop() for r in self._runtimes.values() if r.merger is not None))
        for runtime in self._runtimes.values():
            if runtime.device is not None:
                runtime.device.detach()
        await self._in_database(self._database.close)
        self._database_thread.shutdown()
        os.close(self._lock_fd)

    async def create_update(self, update_id: str) -> UpdateStatus:
        """A new, empty update; EALREADY when the id is taken."""
        check_id("update", update_id)
        if update_id in self._updates:
            raise SnapdError(errno.EALREADY, f"update {update_id} exists")
        if len(self._updates) >= _MAX_UPDATES:
            raise SnapdError(errno.ENOSPC, f"there are {_MAX_UPDATES} updates already")
        lock = self._locks.setdefault(update_id, asyncio.Lock())
        async with lock:
            if update_id in self._updates:
                raise SnapdError(errno.EALREADY, f"update {update_id} exists")
            await self._commit(UpdateRecord(update_id, UpdateState.CREATED, time.time_ns() // 1_000_000))
        return await self.update_status(update_id)

    async def create_snapshot(self, update_id: str, snapshot_id: str, base_path: str, cow_path: str) -> SnapshotStatus:
        """Add a snapshot; base and COW are checked against each other and nothing is written to them.

        Errors: EINVAL for ids, paths that are not absolute, sizes; EALREADY for a taken id; EBUSY when the update is no
        longer CREATED or a file is in use; EBADMSG for a damaged COW.
        """
        check_id("snapshot", snapshot_id)
        for what, path in (("base", base_path), ("COW", cow_path)):
            if not os.path.isabs(path):
                raise SnapdError(errno.EINVAL, f"{what} path {path!r} is not absolute")
        async with self._lock(update_id):
            update = self._update(update_id)
            if any(s.id == snapshot_id for s in update.snapshots):
                raise SnapdError(errno.EALREADY, f"snapshot {update_id}/{snapshot_id} exists")
            if update.state is not UpdateState.CREATED:
                raise SnapdError(errno.EBUSY, f"update {update_id} is {update.state}: no more snapshots can be added")
            if len(update.snapshots) >= _MAX_SNAPSHOTS:
                raise SnapdError(errno.ENOSPC, f"update {update_id} has {_MAX_SNAPSHOTS} snapshots already")
            found = await asyncio.to_thread(inspect, base_path, cow_path)
            record = SnapshotRecord(
                id=snapshot_id,
                uuid=str(uuid.uuid4()),
                state=SnapshotState.READY,
                base_path=base_path,
                cow_path=cow_path,
                old_size_bytes=found.old_size_bytes,
                new_size_bytes=found.new_size_bytes,
                changed_bytes=found.changed_bytes,
            )
            self._runtimes[record.uuid] = Runtime()
            await self._commit(replace(update, snapshots=(*update.snapshots, record)))
        return await self.snapshot_status(update_id, snapshot_id)

    async def map_snapshot(self, update_id: str, snapshot_id: str) -> SnapshotStatus:
        """Export the new image; returns when the device serves. A device that has failed is started anew."""
        async with self._lock(update_id):
            update = self._update(update_id)
            record = update.snapshot(snapshot_id)
            runtime = self._runtimes[record.uuid]
            if runtime.device is not None and await runtime.device.has_failed():
                await runtime.device.stop()
                runtime.device = None
            if runtime.device is None:
                await self._start_device(update_id, record)
                try:
                    sealed = UpdateState.SEALED if update.state is UpdateState.CREATED else update.state
                    await self._commit(replace(update, state=sealed).with_snapshot(snapshot_id, mapped=True))
                except SnapdError:
                    await self._stop_device(record)
                    raise
        return await self.snapshot_status(update_id, snapshot_id)

    async def unmap_snapshot(self, update_id: str, snapshot_id: str) -> SnapshotStatus:
        """Take the export away; a merge goes on."""
        async with self._lock(update_id):
            update = self._update(update_id)
            record = update.snapshot(snapshot_id)
            if record.mapped:
                update = update.with_snapshot(snapshot_id, mapped=False)
                await self._commit(update)
            await self._stop_device(update.snapshot(snapshot_id))
        return await self.snapshot_status(update_id, snapshot_id)

    async def start_merge(self, update_id: str) -> UpdateStatus:
        """Merge every snapshot in the background; one that runs or has ended is left as it is."""
        async with self._lock(update_id):
            update = self._update(update_id)
            if update.state not in (UpdateState.MERGING, UpdateState.MERGED):
                check_transition(update_id, update.state, UpdateState.MERGING)
                if not update.snapshots:
                    raise SnapdError(errno.EBUSY, f"update {update_id} has no snapshots to merge")
                for snapshot in update.snapshots:
                    await self._ensure_open(snapshot)
                    undo = self._paths.undo(snapshot.uuid)
                    await asyncio.to_thread(claim.claim, snapshot.cow_path, uuid.UUID(snapshot.uuid), undo)
                update = replace(update, state=UpdateState.MERGING, failure="")
                for snapshot in update.snapshots:
                    if snapshot.state in (SnapshotState.READY, SnapshotState.FAILED):
                        update = update.with_snapshot(snapshot.id, state=SnapshotState.MERGING, failure="")
                await self._commit(update)
                self._start_mergers()
        return await self.update_status(update_id)

    async def confirm_update(self, update_id: str) -> UpdateStatus:
        """Give up the way back (UNDO-9, UNDO-10); EBUSY unless every merge has ended and its read-back matched."""
        async with self._lock(update_id):
            update = self._update(update_id)
            check_transition(update_id, update.state, UpdateState.CONFIRMED)
            for snapshot in update.snapshots:
                if snapshot.read_back is not ReadBack.OK:
                    raise SnapdError(
                        errno.EBUSY, f"the read-back of {update_id}/{snapshot.id} is {snapshot.read_back}, not OK"
                    )
            # One transaction decides for all snapshots; what follows is repeated by the next start if it is cut.
            update = replace(update, state=UpdateState.CONFIRMED)
            for snapshot in update.snapshots:
                update = update.with_snapshot(snapshot.id, state=SnapshotState.CONFIRMED)
            await self._commit(update)
            for snapshot in update.snapshots:
                await self._clean_up(snapshot)
        return await self.update_status(update_id)

    async def update_status(self, update_id: str) -> UpdateStatus:
        """The update as it is now; ENODEV when there is none."""
        update = self._update(update_id)
        snapshots = await asyncio.gather(
            *(self._runtimes[s.uuid].status(update_id, s, self._paths) for s in update.snapshots)
        )
        return UpdateStatus(update, tuple(snapshots))

    async def snapshot_status(self, update_id: str, snapshot_id: str) -> SnapshotStatus:
        """The snapshot as it is now; ENODEV when there is none."""
        record = self._update(update_id).snapshot(snapshot_id)
        return await self._runtimes[record.uuid].status(update_id, record, self._paths)

    async def watch(self, update_id: str) -> AsyncIterator[UpdateStatus]:
        """The update as it is now, then after each change; a slow watcher sees the latest, not every one."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(update_id, set())
        watchers.add(changed)
        try:
            while not self._closing:
                changed.clear()
                yield await self.update_status(update_id)
                await changed.wait()
        finally:
            watchers.discard(changed)

    def stop_watching(self) -> None:
        """End every `watch`: the daemon is about to stop."""
        self._closing = True
        for update_id in self._watchers:
            self._notify(update_id)

    def _lock(self, update_id: str) -> asyncio.Lock:
        self._update(update_id)
        return self._locks[update_id]

    def _update(self, update_id: str) -> UpdateRecord:
        update = self._updates.get(update_id)
        if update is None:
            raise SnapdError(errno.ENODEV, f"there is no update {update_id}")
        return update

    async def _in_database(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._database_thread, function)

    async def _commit(self, update: UpdateRecord) -> None:
        await self._in_database(lambda: self._database.save(update))
        self._updates[update.id] = update
        self._notify(update.id)

    def _notify(self, update_id: str) -> None:
        for event in self._watchers.get(update_id, ()):
            event.set()

    async def _ensure_open(self, record: SnapshotRecord) -> Resources:
        runtime = self._runtimes[record.uuid]
        if runtime.resources is None:
            runtime.resources = await asyncio.to_thread(Resources.open, record, self._paths)
        return runtime.resources

    async def _start_device(self, update_id: str, record: SnapshotRecord) -> None:
        resources = await self._ensure_open(record)
        runtime = self._runtimes[record.uuid]
        paths = self._paths.device(record.uuid)
        try:
            runtime.device = await DeviceHost.start(record, paths, resources, lambda: self._notify(update_id))
        except SnapdError:
            self._release(record)
            raise

    async def _stop_device(self, record: SnapshotRecord) -> None:
        runtime = self._runtimes[record.uuid]
        if runtime.device is not None:
            await runtime.device.stop()
            runtime.device = None
        self._release(record)

    def _release(self, record: SnapshotRecord) -> None:
        """Give up the locks, unless a device, a merge or an undo store still needs them."""
        runtime = self._runtimes[record.uuid]
        if runtime.device is not None or record.state in _KEEPS_LOCKS:
            return
        if runtime.resources is not None:
            runtime.resources.close()
            runtime.resources = None
        self._paths.device(record.uuid).remove()

    def _start_mergers(self) -> None:
        """Start what is waiting to be merged, a bounded number at a time."""
        running = sum(runtime.merger is not None for runtime in self._runtimes.values())
        for update in self._updates.values():
            for snapshot in update.snapshots:
                runtime = self._runtimes[snapshot.uuid]
                waiting = snapshot.state is SnapshotState.MERGING and runtime.merger is None
                if not waiting or runtime.resources is None or running >= _MAX_MERGERS:
                    continue
                running += 1
                runtime.merger = self._merger(update.id, snapshot, runtime, runtime.resources)

    def _merger(
        self, update_id: str, snapshot: SnapshotRecord, runtime: Runtime, resources: Resources
    ) -> MergerProcess:
        def on_progress(merged_bytes: int) -> None:
            runtime.merged_bytes = merged_bytes
            self._notify(update_id)

        async def on_end(failure: SnapdError | None) -> None:
            await self._merge_ended(update_id, snapshot.id, failure)

        return MergerProcess(snapshot.uuid, self._paths.device(snapshot.uuid), resources, on_progress, on_end)

    async def _merge_ended(self, update_id: str, snapshot_id: str, failure: SnapdError | None) -> None:
        async with self._lock(update_id):
            update = self._update(update_id)
            runtime = self._runtimes[update.snapshot(snapshot_id).uuid]
            runtime.merger = None
            if failure is None:
                update = update.with_snapshot(snapshot_id, state=SnapshotState.MERGED, read_back=ReadBack.OK)
                if all(s.state is SnapshotState.MERGED for s in update.snapshots):
                    update = replace(update, state=UpdateState.MERGED)
            else:
                _log.error("merge of %s/%s stopped: %s", update_id, snapshot_id, failure)
                update = update.with_snapshot(snapshot_id, state=SnapshotState.FAILED, failure=str(failure))
                update = replace(update, state=UpdateState.FAILED, failure=f"{snapshot_id}: {failure}")
            await self._commit_at_last(update)
            self._start_mergers()

    async def _commit_at_last(self, update: UpdateRecord) -> None:
        """Write what has happened already; when that fails, wait ever longer for somebody to mend it."""
        for attempt in range(_COMMIT_TRIES):
            try:
                return await self._commit(update)
            except SnapdError as error:
                _log.error("%s, trying again", error)
                await asyncio.sleep(min(2**attempt, _COMMIT_PAUSE_S))
        _log.error("gave up on the record of %s; the next start finds out again", update.id)
        return None

    async def _clean_up(self, record: SnapshotRecord) -> None:
        """After the decision to confirm: give up the way back; any part of it may be repeated."""
        try:
            resources = await self._ensure_open(record)
            await asyncio.to_thread(release_undo, record, resources, self._paths.undo(record.uuid))
        except SnapdError as error:
            _log.error(
                "the undo store of %s could not be removed, the next start tries again: %s", record.cow_path, error
            )
        self._release(record)

    async def _recover(self, update_id: str) -> None:
        """Make what runs for one update what its records say."""
        async with self._lock(update_id):
            for snapshot in self._update(update_id).snapshots:
                try:
                    await self._recover_snapshot(update_id, snapshot)
                except SnapdError as error:
                    _log.error("%s/%s cannot be taken up again: %s", update_id, snapshot.id, error)
                    if snapshot.state is SnapshotState.MERGING:
                        update = self._update(update_id).with_snapshot(
                            snapshot.id, state=SnapshotState.FAILED, failure=str(error)
                        )
                        failure = f"{snapshot.id}: {error}"
                        await self._commit(replace(update, state=UpdateState.FAILED, failure=failure))

    async def _recover_snapshot(self, update_id: str, snapshot: SnapshotRecord) -> None:
        runtime = self._runtimes[snapshot.uuid]
        paths = self._paths.device(snapshot.uuid)
        await asyncio.to_thread(evict, paths.merger_fence)
        adopted = await DeviceHost.adopt(snapshot, paths, lambda: self._notify(update_id))
        if adopted is not None:
            runtime.device, runtime.resources = adopted
            _log.info("adopted the device of %s/%s", update_id, snapshot.id)
        else:
            await asyncio.to_thread(evict_hosts, paths)
        if snapshot.state in _KEEPS_LOCKS:
            await self._ensure_open(snapshot)
        if snapshot.state is SnapshotState.CONFIRMED and self._paths.undo(snapshot.uuid).exists():
            await self._clean_up(snapshot)
        if snapshot.mapped and runtime.device is None:
            await self._start_device(update_id, snapshot)
        elif not snapshot.mapped:
            await self._stop_device(snapshot)

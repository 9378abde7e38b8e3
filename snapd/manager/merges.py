"""The merges under way: a bounded number of mergers, and what their ends mean for snapshots and updates."""

import asyncio
import logging
from dataclasses import replace

from snapd.block.errors import SnapdError
from snapd.manager.merger import MergerProcess
from snapd.manager.records import SnapshotRecord, UpdateRecord
from snapd.manager.registry import Registry
from snapd.manager.resources import Resources
from snapd.manager.states import ReadBack, SnapshotState, UpdateState

_MAX_MERGERS = 2

_log = logging.getLogger("snapd.manager")


class Merges:
    """Runs a merger for every snapshot that is MERGING and open, `_MAX_MERGERS` at a time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def start_waiting(self) -> None:
        """Start what is waiting, as far as the bound allows."""
        running = sum(runtime.merger is not None for runtime in self._registry.runtimes())
        for update in self._registry.updates():
            for snapshot in update.snapshots:
                runtime = self._registry.runtime(snapshot)
                waiting = snapshot.state is SnapshotState.MERGING and runtime.merger is None
                if waiting and runtime.resources is not None and running < _MAX_MERGERS:
                    running += 1
                    runtime.merger = self._start(update.id, snapshot, runtime.resources)

    async def stop(self) -> None:
        """Have every merger stop at its next span; their snapshots stay MERGING."""
        mergers = [runtime.merger for runtime in self._registry.runtimes()]
        await asyncio.gather(*(merger.stop() for merger in mergers if merger is not None))

    def _start(self, update_id: str, snapshot: SnapshotRecord, resources: Resources) -> MergerProcess:
        registry = self._registry

        def on_progress(merged_bytes: int) -> None:
            registry.runtime(snapshot).merged_bytes = merged_bytes
            registry.notify(update_id)

        async def on_end(failure: SnapdError | None) -> None:
            async with registry.lock(update_id):
                registry.runtime(snapshot).merger = None
                await registry.commit_at_last(_ended(registry.update(update_id), snapshot.id, failure))
                self.start_waiting()

        return MergerProcess(snapshot.uuid, registry.paths.device(snapshot.uuid), resources, on_progress, on_end)


def failed(update: UpdateRecord, snapshot_id: str, failure: SnapdError) -> UpdateRecord:
    """The update after the merge of one snapshot stopped; it can be resumed."""
    _log.error("merge of %s/%s stopped: %s", update.id, snapshot_id, failure)
    update = update.with_snapshot(snapshot_id, state=SnapshotState.FAILED, failure=str(failure))
    return replace(update, state=UpdateState.FAILED, failure=f"{snapshot_id}: {failure}")


def _ended(update: UpdateRecord, snapshot_id: str, failure: SnapdError | None) -> UpdateRecord:
    if failure is not None:
        return failed(update, snapshot_id, failure)
    update = update.with_snapshot(snapshot_id, state=SnapshotState.MERGED, read_back=ReadBack.OK)
    if all(snapshot.state is SnapshotState.MERGED for snapshot in update.snapshots):
        update = replace(update, state=UpdateState.MERGED)
    return update

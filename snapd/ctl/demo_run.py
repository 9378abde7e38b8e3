"""The steps of the demo, in order, each of them checked.

Nothing here is simulated: the images are real file systems, the daemon, its device host, worker and merger are the
real processes, and every comparison is byte for byte.
"""

import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from snapd.api.v1 import snapshots_pb2, updates_pb2
from snapd.block.errors import SnapdError
from snapd.client.service import Client
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.verbs.create import create_cow
from snapd.ctl.demo_compare import compare_device, compare_files
from snapd.ctl.demo_images import build_images
from snapd.ctl.demo_reader import VerifyingReader
from snapd.ctl.demo_service import PrivateService
from snapd.ctl.progress import Progress, progress_bar
from snapd.ctl.sizes import format_size
from snapd.merge.engine import MIN_SPAN_BYTES
from snapd.merge.extract_old import extract_old

_NEEDED_BYTES = 2 << 30
_UPDATE, _SNAPSHOT = "updates/demo", "updates/demo/snapshots/system"
_RESTART_TIMEOUT_S = 20.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The closing table; every figure was measured in this run."""

    image_bytes: int
    cow_bytes: int
    cow_to_image_percent: float
    changed_bytes: int
    undo_bytes: int
    undo_to_changed_percent: float
    create_seconds: float
    map_seconds: float
    full_read_seconds: float
    merge_seconds: float
    verified_before_merge_bytes: int
    verified_during_merge_bytes: int
    worker_restarts: int
    longest_read_stall_ms: int
    base_is_the_new_image: bool
    old_image_was_recovered: bool
    total_seconds: float


def run(directory: str | None) -> DemoReport:
    """The whole demo; `SnapdError` on any difference. Nothing is left behind, whatever happens."""
    begin = time.monotonic()
    say = _Steps()
    with _scratch(directory) as scratch:
        say("Two ext4 images of one system, before and after a release")
        old, new, summary = _with_bar("images", lambda _: build_images(scratch))
        say.detail(
            f"{format_size(summary.image_bytes)} each, {summary.files} files: {summary.changed} changed,"
            f" {summary.grown} grown, {summary.moved} moved, {summary.deleted} deleted, {summary.added} added"
        )
        base, cow = scratch / "base.img", scratch / "update.cow"
        shutil.copyfile(old, base)

        say("The build server's part: a compressed COW file from both")
        created = _with_bar("create", lambda bar: create_cow(old, new, cow, CreateOptions(), bar))
        say.detail(f"{format_size(created.cow_bytes)} in {created.seconds:.1f} s")

        say("A private snapd; the device shows the new system at once, the old one is still on disk")
        with PrivateService(scratch) as service, Client(service.server) as client:
            return _update(client, say, begin, old, new, base, cow, created.seconds)


def _update(
    client: Client, say: "_Steps", begin: float, old: Path, new: Path, base: Path, cow: Path, create_seconds: float
) -> DemoReport:
    client.create_update("demo")
    client.create_snapshot(_UPDATE, "system", str(base), str(cow))
    started = time.monotonic()
    uri = client.map_snapshot(_SNAPSHOT).device.nbd_uri
    map_seconds = time.monotonic() - started
    say.detail(f"{uri} after {map_seconds * 1000:.0f} ms")

    say("Read the whole device over NBD and compare it with the new image")
    started = time.monotonic()
    read_bytes = _with_bar("read", lambda bar: compare_device(uri, new, bar))
    full_read_seconds = time.monotonic() - started
    say.detail(f"{format_size(read_bytes)} equal, {format_size(int(read_bytes / full_read_seconds))}/s")

    say("Merge in the background while a client reads and verifies; kill the worker on the way")
    reader = VerifyingReader(uri, new, seed=1)
    reader.start()
    started = time.monotonic()
    killed_at = _merge(client)
    merge_seconds = time.monotonic() - started
    snapshot = _wait_for_new_worker(client, killed_at.worker_pid)
    reader.finish()
    stall_ms = round(reader.longest_read_seconds * 1000)
    say.detail(
        f"worker {killed_at.worker_pid} killed with {format_size(killed_at.merged_bytes)} of"
        f" {format_size(snapshot.changed_bytes)} merged; worker {snapshot.device.worker_pid} took over,"
        f" longest read {stall_ms} ms, no read failed or differed"
    )

    say("The base is the new image; the old one can still be had from base and undo store")
    compare_files(base, new)
    undo_bytes = os.stat(snapshot.undo_path).st_blocks * 512
    recovered = base.with_name("recovered.img")
    extract_old(snapshot.undo_path, base, recovered, None, lambda _done, _total: None)
    compare_files(recovered, old)

    say("Confirm, unmap, done")
    client.confirm_update(_UPDATE)
    if os.path.exists(snapshot.undo_path):
        raise SnapdError(errno.EIO, f"{snapshot.undo_path} is still there after the confirmation")
    client.unmap_snapshot(_SNAPSHOT)
    compare_files(base, new)
    return DemoReport(
        image_bytes=new.stat().st_size,
        cow_bytes=cow.stat().st_size,
        cow_to_image_percent=_percent(cow.stat().st_size, new.stat().st_size),
        changed_bytes=snapshot.changed_bytes,
        undo_bytes=undo_bytes,
        undo_to_changed_percent=_percent(undo_bytes, snapshot.changed_bytes),
        create_seconds=round(create_seconds, 3),
        map_seconds=round(map_seconds, 3),
        full_read_seconds=round(full_read_seconds, 3),
        merge_seconds=round(merge_seconds, 3),
        verified_before_merge_bytes=read_bytes,
        verified_during_merge_bytes=reader.verified_bytes,
        worker_restarts=snapshot.device.worker_restarts,
        longest_read_stall_ms=stall_ms,
        base_is_the_new_image=True,
        old_image_was_recovered=True,
        total_seconds=round(time.monotonic() - begin, 3),
    )


@dataclass(frozen=True, slots=True)
class _Killed:
    worker_pid: int
    merged_bytes: int


def _merge(client: Client) -> _Killed:
    """Merge to the end and kill the worker as soon as the merge has come somewhere."""
    killed = None
    client.start_merge(_UPDATE)
    with progress_bar("merge") as bar:
        for update in client.watch_merge(_UPDATE):
            bar(update.merged_bytes, update.changed_bytes)
            if killed is None and _is_under_way(update):
                killed = _Killed(update.snapshots[0].device.worker_pid, update.merged_bytes)
                os.kill(killed.worker_pid, signal.SIGKILL)
    if update.state != updates_pb2.UPDATE_STATE_MERGED:
        raise SnapdError(
            errno.EIO, f"the merge ended as {updates_pb2.UpdateState.Name(update.state)}: {update.failure}"
        )
    if killed is None:
        raise SnapdError(errno.EIO, "the merge ended before the worker could be killed")
    return killed


def _is_under_way(update: updates_pb2.Update) -> bool:
    """Whether the merge has come somewhere; one that is done in a single span only ever begins and ends."""
    is_short = update.changed_bytes <= 2 * MIN_SPAN_BYTES
    begun = update.merged_bytes > 0 or (is_short and update.snapshots[0].merger_pid > 0)
    return update.state == updates_pb2.UPDATE_STATE_MERGING and begun


def _wait_for_new_worker(client: Client, old_pid: int) -> snapshots_pb2.Snapshot:
    deadline = time.monotonic() + _RESTART_TIMEOUT_S
    while True:
        (snapshot,) = client.get_update(_UPDATE).snapshots
        if snapshot.device.worker_restarts and snapshot.device.worker_pid not in (0, old_pid):
            return snapshot
        if time.monotonic() > deadline:
            raise SnapdError(errno.ETIMEDOUT, "no new worker took over")
        time.sleep(0.05)


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1)


def _with_bar(title: str, work: Callable[[Progress], _T]) -> _T:
    with progress_bar(title) as bar:
        return work(bar)


class _Steps:
    """The narrative, on standard error: numbered steps and what each showed."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._number = 0

    def __call__(self, step: str) -> None:
        self._number += 1
        self._console.print(f"[bold]{self._number}.[/bold] {step}")

    def detail(self, text: str) -> None:
        """What the step showed."""
        self._console.print(f"   {text}", style="dim", markup=False)


@contextmanager
def _scratch(directory: str | None) -> Iterator[Path]:
    """A directory of our own with enough room; removed at the end, whatever happens."""
    path = Path(tempfile.mkdtemp(prefix="ota-snapd-demo-", dir=directory))
    try:
        free = shutil.disk_usage(path).free
        if free < _NEEDED_BYTES:
            raise SnapdError(
                errno.ENOSPC, f"{path.parent}: {format_size(free)} free, {format_size(_NEEDED_BYTES)} needed"
            )
        yield path
    finally:
        shutil.rmtree(path)

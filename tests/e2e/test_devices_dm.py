"""A device over the kernel's own dm-user: its worker dies, is replaced, or is swapped; the daemon comes and goes.

The kernel is a double (tests/support/dmusernode.py, fakedmsetup.py); the workers are real processes.
"""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import Images, processes_of
from dmworld import BLOCK, SECTOR, DmWorld, Reader, dm_world

import snapd.manager.dmdevice as module
from snapd.block.errors import SnapdError
from snapd.block.lock import open_locked
from snapd.device.config import Policy, Route
from snapd.manager.backends import ExportRequest
from snapd.manager.dmdevice import DmDevice
from snapd.manager.dmsetup import DmSetup
from snapd.manager.dmstate import read_state, write_state
from snapd.manager.manager import Manager
from snapd.manager.paths import DevicePaths
from snapd.manager.records import DeviceRecord, ExportKind, ExportRecord
from snapd.manager.states import DeviceState, UpdateState

BLOCKS = 64
Test = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture
def world(short_dir: Path) -> Iterator[DmWorld]:
    with dm_world() as made:
        yield made
    assert processes_of(short_dir) == []


class Rig:
    """A store, its record, and the devices that a daemon, or several in a row, have over it."""

    def __init__(self, world: DmWorld, directory: Path, policy: Policy = Policy.RESTART) -> None:
        self.world = world
        self.content = Random(3).randbytes(BLOCKS * BLOCK)
        self.store = directory / "store.img"
        self.store.write_bytes(self.content)
        self.paths = DevicePaths(directory / "d")
        self.paths.directory.mkdir()
        export = ExportRecord(ExportKind.DM, policy=policy)
        uuid = "01234567-89ab-cdef-0123-456789abcdef"
        self.record = DeviceRecord("d", uuid, Route.WORKER, len(self.content), False, export, str(self.store))

    @contextlib.asynccontextmanager
    async def device(self) -> AsyncIterator[DmDevice]:
        """A device that serves; removed at the end, whoever has it then."""
        stores = {"base": open_locked(self.store)}
        try:
            device = await self.start(stores)
        finally:
            os.close(stores["base"])
        try:
            yield device
        finally:
            self.world.set_open(False)
            device.detach()
            await module.discard(self.paths, self.world.settings)
        assert self.world.state()["devices"] == {}

    async def start(self, stores: dict[str, int]) -> DmDevice:
        # The device keeps what it is given for its next workers.
        kept = {name: os.dup(fd) for name, fd in stores.items()}
        return await DmDevice.start(self.record, self.paths, kept, self.world.settings, lambda: None)

    async def adopt(self) -> DmDevice | None:
        """What the next daemon gets."""
        adopted = await DmDevice.adopt(self.record, self.paths, self.world.settings, lambda: None)
        return None if adopted is None else adopted[0]

    def read_all(self) -> bytes:
        number, data = self.world.read(0, len(self.content))
        assert number == 0
        return data


async def worker_pid(device: DmDevice) -> int:
    return (await device.report()).worker_pid


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 30)


async def kill_worker(device: DmDevice) -> int:
    """SIGKILL the worker, and return when its death was seen."""
    pid = await worker_pid(device)
    os.kill(pid, signal.SIGKILL)

    async def seen() -> bool:
        return await worker_pid(device) != pid

    await until(seen)
    return pid


async def in_state(device: DmDevice, state: DeviceState) -> None:
    async def reached() -> bool:
        return (await device.report()).state is state

    await until(reached)


def test_a_device_has_its_worker_before_it_takes_requests(world: DmWorld, short_dir: Path) -> None:
    """DMU-161, SNAP-267: load, attach, resume; nothing ever waits for the attach timeout. Removal ends the worker."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            assert world.calls() == ["create", "load", "resume"]
            report = await device.report()
            assert (report.state, report.attach_state) == (DeviceState.SERVING, "attached")
            assert report.dm_path == "/dev/mapper/ota-snapd-0123456789ab"
            assert rig.read_all() == rig.content
            assert world.write(3, b"x" * SECTOR) == 0
            assert rig.store.read_bytes()[3 * SECTOR : 4 * SECTOR] == b"x" * SECTOR
            await device.stop()
            assert world.state()["devices"] == {}
            with pytest.raises(ProcessLookupError):
                os.kill(report.worker_pid, 0)
            assert read_state(rig.paths) is None

    asyncio.run(test())


def test_a_dead_worker_is_replaced_on_its_node(world: DmWorld, short_dir: Path) -> None:
    """DMU-170, DMU-171: what was in flight fails by the kernel's nature; a new worker serves the same node again."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            node = world.device()["live"]
            killed = await kill_worker(device)
            await in_state(device, DeviceState.SERVING)
            report = await device.report()
            assert report.worker_pid not in (0, killed)
            assert report.worker_restarts == 1
            assert rig.read_all() == rig.content
            assert world.device()["live"] == node

    asyncio.run(test())


def test_five_deaths_are_the_end_until_it_is_renewed(world: DmWorld, short_dir: Path) -> None:
    """DMU-171: every request fails at once; a new target on a fresh node brings the device back, never a removal."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            node = world.device()["live"]
            for _ in range(5):
                await in_state(device, DeviceState.SERVING)
                await kill_worker(device)
            await in_state(device, DeviceState.FAILED)
            assert (await device.report()).worker_pid == 0
            assert world.read(0, SECTOR)[0] == errno.EIO
            await device.renew()
            assert rig.read_all() == rig.content
            assert world.device()["live"] != node
            assert world.calls() == ["create", "load", "resume", "load", "suspend", "resume"]

    asyncio.run(test())


def test_fail_fast_replaces_nobody(world: DmWorld, short_dir: Path) -> None:
    """The reference's behaviour: the first death is the last."""

    async def test() -> None:
        rig = Rig(world, short_dir, Policy.FAIL_FAST)
        async with rig.device() as device:
            await kill_worker(device)
            await in_state(device, DeviceState.FAILED)
            assert world.read(0, SECTOR)[0] == errno.EIO

    asyncio.run(test())


def test_a_swap_loses_no_request(world: DmWorld, short_dir: Path) -> None:
    """SNAP-267, DMU-162, DMU-174: a fresh node, the old worker serves until the swap returned, then ends by itself."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            reader = Reader(world, rig.content)
            reader.start()
            seen = {world.device()["live"]}
            for _ in range(3):
                old = await worker_pid(device)
                await device.renew()
                assert await worker_pid(device) != old
                with pytest.raises(ProcessLookupError):
                    os.kill(old, 0)
                seen.add(world.device()["live"])
            assert len(seen) == 4
            assert reader.finish()

    asyncio.run(test())


def test_a_planned_replacement_of_the_worker_loses_no_request(world: DmWorld, short_dir: Path) -> None:
    """DMU-171, DMU-189: the new worker has the node open before the old one drains."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            reader = Reader(world, rig.content)
            reader.start()
            calls = world.calls()
            for _ in range(3):
                old = await worker_pid(device)
                await device.replace_worker()
                assert await worker_pid(device) != old
                with pytest.raises(ProcessLookupError):
                    os.kill(old, 0)
            assert world.calls() == calls
            assert (await device.report()).worker_restarts == 0
            assert reader.finish()

    asyncio.run(test())


def test_a_device_in_use_is_not_removed(world: DmWorld, short_dir: Path) -> None:
    """DMU-174: EBUSY, and it serves as before."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            world.set_open(True)
            with pytest.raises(SnapdError, match="busy") as caught:
                await device.stop()
            assert caught.value.errno == errno.EBUSY
            assert rig.read_all() == rig.content
            await kill_worker(device)
            await in_state(device, DeviceState.SERVING)

    asyncio.run(test())


def test_the_next_daemon_takes_over_worker_and_locks(world: DmWorld, short_dir: Path) -> None:
    """The worker goes on without a daemon; the next one has its stores from it, and their locks were never given up."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            reader = Reader(world, rig.content)
            reader.start()
            before = await worker_pid(device)
            device.detach()
            adopted = await rig.adopt()
            assert adopted is not None
            assert await worker_pid(adopted) == before
            assert reader.finish()
            with pytest.raises(SnapdError, match="in use"):
                open_locked(rig.store)
            # What it was given is good for the next worker too.
            await kill_worker(adopted)
            await in_state(adopted, DeviceState.SERVING)
            assert rig.read_all() == rig.content
            adopted.detach()

    asyncio.run(test())


def test_a_newer_daemon_replaces_the_worker(world: DmWorld, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DMU-189: the program is updated under a client that reads."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            reader = Reader(world, rig.content)
            reader.start()
            before = await worker_pid(device)
            device.detach()
            monkeypatch.setattr("snapd.__version__", "99")
            adopted = await rig.adopt()
            assert adopted is not None
            assert await worker_pid(adopted) != before
            assert reader.finish()
            adopted.detach()

    asyncio.run(test())


def test_a_worker_that_died_without_a_daemon_leaves_the_device(world: DmWorld, short_dir: Path) -> None:
    """The device may be mounted: it is not made anew, it gets a new target."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            pid = await worker_pid(device)
            device.detach()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            world.set_open(True)
            assert await rig.adopt() is None
            base_fd = os.open(rig.store, os.O_RDWR)
            again = await rig.start({"base": base_fd})
            os.close(base_fd)
            assert rig.read_all() == rig.content
            assert "remove" not in world.calls()
            again.detach()

    asyncio.run(test())


def test_what_was_written_before_a_boot_is_no_device(world: DmWorld, short_dir: Path) -> None:
    """The run directory may outlive the kernel's devices: the device is made anew, whatever was under way."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            pid = await worker_pid(device)
            device.detach()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            world.reboot()
            state = read_state(rig.paths)
            assert state is not None
            write_state(rig.paths, replace(state, next_node="other", is_loaded=True))
            assert await rig.adopt() is None
            base_fd = os.open(rig.store, os.O_RDWR)
            again = await rig.start({"base": base_fd})
            os.close(base_fd)
            assert rig.read_all() == rig.content
            again.detach()

    asyncio.run(test())


def test_a_swap_that_fails_leaves_the_old_target(
    world: DmWorld, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error, and requests go on as before: the new table is cleared, the new worker gone."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            before, pid = world.device(), await worker_pid(device)

            async def refuse(*_: Any) -> None:
                raise SnapdError(errno.EIO, "the suspend failed")

            with monkeypatch.context() as patch:
                patch.setattr(DmSetup, "suspend", refuse)
                with pytest.raises(SnapdError, match="the suspend failed"):
                    await device.renew()
            assert world.device() == before
            assert await worker_pid(device) == pid
            assert len(processes_of(short_dir)) == 1
            assert rig.read_all() == rig.content
            await kill_worker(device)
            await in_state(device, DeviceState.SERVING)

    asyncio.run(test())


class Cut(Exception):
    """The daemon ends here."""


@pytest.mark.parametrize(
    ("verb", "after", "swapped"),
    [
        ("load", False, False),
        ("load", True, False),
        ("suspend", False, False),
        ("suspend", True, False),
        ("resume", False, False),
        ("resume", True, True),
    ],
)
def test_a_daemon_that_ends_within_a_swap(
    world: DmWorld, short_dir: Path, monkeypatch: pytest.MonkeyPatch, verb: str, after: bool, swapped: bool
) -> None:
    """The table of snapd/manager/dmdevice.py: the next daemon finishes the swap or takes it back; one worker stays."""

    async def test() -> None:
        rig = Rig(world, short_dir)
        async with rig.device() as device:
            old_node, old_pid = world.device()["live"], await worker_pid(device)
            with monkeypatch.context() as patch:
                plain = getattr(DmSetup, verb)

                async def cut(*arguments: Any, **options: Any) -> None:
                    if after:
                        await plain(*arguments, **options)
                    raise Cut

                patch.setattr(DmSetup, verb, cut)
                with pytest.raises(Cut):
                    await device.renew()
            adopted = await rig.adopt()
            assert adopted is not None
            tables = world.device()
            assert (tables["inactive"], tables["suspended"]) == (None, False)
            assert (tables["live"] != old_node) is swapped
            assert (await worker_pid(adopted) != old_pid) is swapped
            assert len(processes_of(short_dir)) == 1
            assert rig.read_all() == rig.content
            adopted.detach()

    asyncio.run(test())


def test_a_mapped_snapshot_on_a_kernel_with_dm_user(
    world: DmWorld, short_dir: Path, images: Callable[..., Images]
) -> None:
    """The whole path: AUTO finds dm-user, no device host runs, a restarted daemon keeps the worker, the merge goes on
    behind the reads, unmap removes."""
    pair = images(blocks=512)
    state = str(short_dir / "state")

    async def test() -> None:
        manager = await Manager.open(state, world.settings)
        await manager.create_update("u")
        await manager.create_snapshot("u", "s", str(pair.base), str(pair.cow))
        mapped = await manager.map_snapshot("u", "s", ExportRequest(ExportKind.AUTO))
        assert mapped.device is not None
        report = mapped.device.report
        assert (mapped.device.record.export.kind, report.host_pid) == (ExportKind.DM, 0)
        assert world.read(0, len(pair.new)) == (0, pair.new)
        assert world.write(0, bytes(SECTOR)) == errno.EIO
        reader = Reader(world, pair.new)
        reader.start()
        await manager.close()
        manager = await Manager.open(state, world.settings)
        (device,) = await manager.catalog.all()
        assert device.report.worker_pid == report.worker_pid
        assert (await manager.catalog.stats(device.record.id)).io is None
        await manager.start_merge("u")
        async for status in manager.watch("u"):
            if status.record.state is not UpdateState.MERGING:
                break
        assert status.record.state is UpdateState.MERGED
        assert reader.finish()
        with pytest.raises(SnapdError, match="dm_user_daemon_timeout_msec") as caught:
            await manager.catalog.set_attach_timeout(device.record.id, 5)
        assert caught.value.errno == errno.EOPNOTSUPP
        world.set_open(True)
        with pytest.raises(SnapdError, match="busy"):
            await manager.unmap_snapshot("u", "s")
        assert (await manager.update_status("u")).snapshots[0].record.mapped
        world.set_open(False)
        await manager.confirm_update("u")
        unmapped = await manager.unmap_snapshot("u", "s")
        assert unmapped.device is None
        assert world.state()["devices"] == {}
        await manager.close()

    asyncio.run(test())

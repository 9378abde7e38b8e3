"""Killing any process at any moment loses nothing.

The instants are random but seeded; the seed is in the test's name, and SNAPD_KILL_SEEDS says how many there are. A
reader compares all the time; what it may see is what the death table of docs/architecture.md allows, and never
another byte.
"""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from random import Random

import pytest
from conftest import BLOCK, Images, Service, read_device

from snapd.api.v1 import devices_pb2, updates_pb2
from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.client.service import Client
from snapd.merge.extract_old import extract_old

MakeImages = Callable[..., Images]
UPDATE, SNAPSHOT = "updates/u", "updates/u/snapshots/s"
SEEDS = int(os.environ.get("SNAPD_KILL_SEEDS", "3"))
VICTIMS = ("daemon", "host", "worker", "merger")


class Reader(threading.Thread):
    """Reads random places and compares; connects again when the connection broke (a device host that died)."""

    def __init__(self, uri: str, expected: bytes, seed: int) -> None:
        super().__init__(daemon=True)
        self.uri, self.expected, self.random = uri, expected, Random(seed)
        self.finished = threading.Event()
        self.wrong: list[str] = []
        self.failed_reads = 0
        self.reads = 0
        self.connections = 0

    def run(self) -> None:
        while not self.finished.is_set():
            with contextlib.suppress(SnapdError), NbdClient.connect(self.uri, timeout_s=30) as device:
                self.connections += 1
                self.read_until_it_breaks(device)

    def read_until_it_breaks(self, device: NbdClient) -> None:
        while not self.finished.is_set():
            blocks = self.random.choice((1, 1, 16, 200))
            offset = self.random.randrange(len(self.expected) // BLOCK - blocks) * BLOCK
            buffer = bytearray(blocks * BLOCK)
            try:
                device.read_into(buffer, offset)
            except SnapdError:
                self.failed_reads += 1
                raise
            self.reads += 1
            if buffer != self.expected[offset : offset + len(buffer)]:
                self.wrong.append(f"{len(buffer)} bytes at {offset}")

    def finish(self) -> None:
        self.finished.set()
        self.join(60)
        assert not self.is_alive(), "a read hangs"
        assert self.wrong == []
        assert self.reads


def victim_pid(service: Service, client: Client, victim: str) -> int:
    """The process id to kill now; 0 when there is no such process at this moment."""
    if victim == "daemon":
        return service.pid
    (snapshot,) = client.get_update(UPDATE).snapshots
    return {
        "host": snapshot.device.host_pid,
        "worker": snapshot.device.worker_pid,
        "merger": snapshot.merger_pid,
    }[victim]


def kill(service: Service, client: Client, victim: str) -> bool:
    """SIGKILL one process; the daemon is started again."""
    try:
        pid = victim_pid(service, client, victim)
    except SnapdError:
        return False
    if not pid:
        return False
    if victim == "daemon":
        service.kill()
        service.start()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def prepare(client: Client, pair: Images) -> str:
    client.create_update("u")
    client.create_snapshot(UPDATE, "s", str(pair.base), str(pair.cow))
    return client.map_snapshot(SNAPSHOT).device.nbd_uri


def check_the_end(service: Service, client: Client, pair: Images) -> None:
    """Base is the new image, base and undo store give the old one, and confirm ends it."""
    last = list(client.watch_merge(UPDATE))[-1]
    assert last.state == updates_pb2.UPDATE_STATE_MERGED, f"{last.failure}\n{service.log()}"
    assert pair.base.read_bytes() == pair.new
    old = service.directory / "old.img"
    extract_old(last.snapshots[0].undo_path, pair.base, old, None, lambda _done, _total: None)
    assert old.read_bytes() == pair.old
    client.confirm_update(UPDATE)
    assert pair.base.read_bytes() == pair.new


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_kill_during_a_merge(service: Service, images: MakeImages, victim: str, seed: int) -> None:
    """UNDO-8, DMU-148, DMU-185: whoever dies, the merge ends, reads stay right, the way back stays open."""
    random = Random(f"{victim}{seed}")
    pair = images(seed=seed, blocks=4096)
    with service.client() as client:
        reader = Reader(prepare(client, pair), pair.new, seed)
        reader.start()
        client.start_merge(UPDATE)
        time.sleep(random.uniform(0, 0.5))
        kill(service, client, victim)
        check_the_end(service, client, pair)
        reader.finish()
    if victim != "host":
        # Only the death of the device host may be seen by a client.
        assert (reader.failed_reads, reader.connections) == (0, 1)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_many_kills_of_everything(service: Service, images: MakeImages, seed: int) -> None:
    """A storm: twelve kills, any process, any moment, before, during and after the merge."""
    random = Random(seed)
    pair = images(seed=seed + 10, blocks=4096)
    kills: dict[str, int] = dict.fromkeys(VICTIMS, 0)
    with service.client() as client:
        reader = Reader(prepare(client, pair), pair.new, seed)
        reader.start()
        for step in range(12):
            if step == 3:
                client.start_merge(UPDATE)
            # Never more than four of one kind: the fifth within a minute is a crash loop, and is tested elsewhere.
            victim = random.choice([v for v in VICTIMS if kills[v] < 4])
            kills[victim] += kill(service, client, victim)
            time.sleep(random.uniform(0, 0.1))
        check_the_end(service, client, pair)
        reader.finish()
    assert sum(kills.values()) >= 6, kills


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_dies_at_once(service: Service, images: MakeImages, seed: int) -> None:
    """UNDO-24: daemon, device host, worker and merger are gone together; the next daemon brings all of it back."""
    random = Random(seed)
    pair = images(seed=seed + 20, blocks=4096)
    with service.client() as client:
        uri = prepare(client, pair)
        client.start_merge(UPDATE)
        time.sleep(random.uniform(0, 0.5))
        pids = [victim_pid(service, client, victim) for victim in ("merger", "worker", "host")]
        service.kill()
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        service.start()
        assert read_device(uri) == pair.new
        check_the_end(service, client, pair)


def test_a_restarted_daemon_adopts_the_running_device(service: Service, images: MakeImages) -> None:
    """The device outlives the daemon: same host, same worker, same connection."""
    pair = images()
    with service.client() as client, NbdClient.connect(prepare(client, pair)) as device:
        (before,) = client.get_update(UPDATE).snapshots
        service.kill()
        buffer = bytearray(BLOCK)
        device.read_into(buffer, 0)
        assert buffer == pair.new[:BLOCK]
        service.start()
        (after,) = client.get_update(UPDATE).snapshots
        assert (after.device.host_pid, after.device.worker_pid) == (before.device.host_pid, before.device.worker_pid)
        device.read_into(buffer, BLOCK)
        assert buffer == pair.new[BLOCK : 2 * BLOCK]


def test_a_stopped_daemon_leaves_the_device_running(service: Service, images: MakeImages) -> None:
    pair = images()
    with service.client() as client, NbdClient.connect(prepare(client, pair)) as device:
        service.stop()
        buffer = bytearray(BLOCK)
        device.read_into(buffer, 0)
        assert buffer == pair.new[:BLOCK]
        service.start()
        client.unmap_snapshot(SNAPSHOT)


@pytest.mark.parametrize("victim", ["host", "merger"])
def test_a_hung_process_of_a_dead_daemon_is_replaced(service: Service, images: MakeImages, victim: str) -> None:
    """DMU-185: a predecessor that does not answer is killed, and gone, before its successor starts."""
    pair = images(blocks=4096)
    with service.client() as client:
        uri = prepare(client, pair)
        client.start_merge(UPDATE)
        pid = victim_pid(service, client, victim)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        service.kill()
        service.start()
        assert read_device(uri) == pair.new
        check_the_end(service, client, pair)


def test_a_daemon_killed_while_confirming_finishes_at_its_next_start(service: Service, images: MakeImages) -> None:
    """UNDO-10: a start in `confirmed` goes on with the clean-up."""
    pair = images()
    with service.client() as client:
        prepare(client, pair)
        client.start_merge(UPDATE)
        undo = list(client.watch_merge(UPDATE))[-1].snapshots[0].undo_path
        done = threading.Event()

        def confirm() -> None:
            with contextlib.suppress(SnapdError), service.client() as other:
                other.confirm_update(UPDATE)
            done.set()

        threading.Thread(target=confirm, daemon=True).start()
        while os.path.exists(undo) and client.get_update(UPDATE).state == updates_pb2.UPDATE_STATE_MERGED:
            pass
        service.kill()
        service.start()
        done.wait(30)
        assert client.get_update(UPDATE).state == updates_pb2.UPDATE_STATE_CONFIRMED
        assert not os.path.exists(undo)
        assert pair.base.read_bytes() == pair.new


def test_a_device_that_failed_is_started_anew_by_map(service: Service, images: MakeImages) -> None:
    """DMU-148, the death table: five deaths of the worker are a crash loop; it ends when somebody maps again."""
    pair = images()
    with service.client() as client:
        uri = prepare(client, pair)
        killed = {0}
        for _ in range(5):
            # A worker that was just killed is still named for an instant.
            wait_until(lambda: victim_pid(service, client, "worker") not in killed)
            killed.add(pid := victim_pid(service, client, "worker"))
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: client.get_update(UPDATE).snapshots[0].device.state == devices_pb2.DEVICE_STATE_FAILED)
        with NbdClient.connect(uri) as device, pytest.raises(SnapdError) as caught:
            device.read_into(bytearray(len(pair.new)), 0)
        assert caught.value.errno == errno.EIO
        client.map_snapshot(SNAPSHOT)
        assert read_device(uri) == pair.new


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Real processes that die, hang and come back: what clients see is a pause, or EIO, never another image."""

import errno
import os
import random
import select
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from devicerig import BLOCK, SIZE, Device, Images
from zeromap import has_op

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.proc import control
from snapd.proc.child import Child
from snapd.proc.deaths import CRASH_LOOP_DEATHS


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(seed=11)


@pytest.fixture
def device(images: Images) -> Iterator[Device]:
    with Device(images) as device:
        yield device


def read(client: NbdClient, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    client.read_into(buffer, offset)
    return bytes(buffer)


def read_all(device: Device) -> bytes:
    with device.client() as client:
        return read(client, 0, SIZE)


def wait_for_worker(device: Device, other_than: int) -> int:
    """The process id of the worker that came after `other_than`."""
    return int(device.wait_for(lambda status: status["worker_pid"] not in (0, other_than))["worker_pid"])


def test_worker_killed_under_reads(device: Device, images: Images) -> None:
    """DMU-148, DMU-185: SIGKILL under load, more often than a crash loop has deaths: every read is right."""
    device.start()
    failures: list[str] = []
    done = threading.Event()
    progress = threading.Semaphore(0)

    def keep_reading(seed: int) -> None:
        choice = random.Random(seed)
        try:
            with NbdClient.connect(device.uri) as client:
                while not done.is_set():
                    offset = choice.randrange(SIZE)
                    length = min(choice.choice([1, BLOCK, 300_000]), SIZE - offset)
                    if read(client, offset, length) != images.new[offset : offset + length]:
                        failures.append(f"seed {seed}: wrong bytes at {offset}+{length}")
                        return
                    progress.release()
        except SnapdError as error:
            failures.append(f"seed {seed}: {error}")

    readers = [threading.Thread(target=keep_reading, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(CRASH_LOOP_DEATHS + 1):
            for _ in range(30):
                assert progress.acquire(timeout=30), failures
            killed = device.kill_worker()
            wait_for_worker(device, killed)
        for _ in range(30):
            assert progress.acquire(timeout=30), failures
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert failures == []
    status = device.status()
    assert status["worker_restarts"] == CRASH_LOOP_DEATHS + 1
    assert status["in_flight_bytes"] == 0


def test_crash_loop_fails_fast(device: Device) -> None:
    """After five deaths without an answer reads of the worker's blocks are EIO at once; the base still serves."""
    device.start()
    killed = 0
    for _ in range(CRASH_LOOP_DEATHS):
        wait_for_worker(device, killed)
        killed = device.kill_worker()
    device.wait_for(lambda status: status["state"] == "CRASH_LOOP")
    with device.client() as client:
        with pytest.raises(SnapdError, match="error 5"):
            read(client, 0, SIZE)
        unchanged = next(b for b in range(SIZE // BLOCK) if not has_op(device.extent_map, b))
        assert read(client, unchanged * BLOCK, BLOCK) == device.images.new[unchanged * BLOCK : (unchanged + 1) * BLOCK]
    assert device.stop() == 0


def test_stopped_worker_is_replaced(device: Device, images: Images) -> None:
    """DMU-184: a worker that is alive and does not answer is killed; the client only waits."""
    device.start(request_timeout_ms=1500)
    worker = int(device.status()["worker_pid"])
    # It has answered, so it is past its start; stopped from now on.
    assert read_all(device) == images.new
    os.kill(worker, signal.SIGSTOP)
    assert read_all(device) == images.new
    status = device.status()
    assert status["worker_pid"] != worker
    assert status["worker_restarts"] >= 1


def test_worker_that_cannot_start(device: Device, images: Images) -> None:
    """DMU-148, DMU-184: reads that wait for a successor end in EIO when none of them gets as far as serving."""
    device.start()
    assert read_all(device) == images.new
    # Every later worker finds a damaged extent map and gives up.
    os.pwrite(device.fds["extent_map"], b"\xff", 100)
    device.kill_worker()
    with device.client() as client, pytest.raises(SnapdError, match="error 5"):
        read(client, 0, SIZE)
    status = device.status()
    assert status["state"] == "CRASH_LOOP"
    assert status["worker_pid"] == 0
    assert status["in_flight_bytes"] == 0


def test_adopt(device: Device, images: Images) -> None:
    """A restarted daemon gets the very same descriptors back, and clients notice nothing."""
    device.start()
    with device.client() as client:
        assert device.connection is not None
        device.connection.close()
        assert read(client, 0, SIZE) == images.new
        device.connection = control.connect(device.control_path, 30)
        reply, fds = device.call({"verb": "adopt"})
        assert reply["ok"]
        assert reply["device"] == {
            "device": "test",
            "route": "snapshot",
            "policy": "restart",
            "read_only": True,
            "snapshot": str(device.snapshot),
            "size_bytes": SIZE,
            "attach_timeout_ms": 4000,
            "restart_grace_ms": 10_000,
            "request_timeout_ms": 30_000,
        }
        assert reply["descriptors"] == device.fds.names
        ours, theirs = device.fds.fds, fds
        assert len(theirs) == len(ours)
        assert [os.fstat(fd).st_ino for fd in theirs] == [os.fstat(fd).st_ino for fd in ours]
        for fd in fds:
            os.close(fd)
        assert read(client, 0, SIZE) == images.new


def test_newest_control_connection_wins(device: Device) -> None:
    device.start()
    older = device.connection
    assert older is not None
    device.connection = control.connect(device.control_path, 30)
    assert device.status()["ok"]
    assert control.receive(older) is None
    older.close()


def test_bad_verbs_change_nothing(device: Device) -> None:
    device.start()
    assert device.connection is not None
    assert device.call({"verb": "explode", "id": 7})[0] == {
        "ok": False,
        "errno": errno.EINVAL,
        "message": "unknown verb 'explode'",
        "id": 7,
    }
    device.connection.send(b"{not json")
    received = control.receive(device.connection)
    assert received is not None
    assert received[0]["errno"] == errno.EPROTO
    assert device.status()["ok"]


GOOD_START = {"device": "d", "route": "snapshot", "read_only": True, "snapshot": "0" * 32, "size_bytes": SIZE}
BAD_STARTS: dict[str, tuple[object, str]] = {
    "no size": ({name: value for name, value in GOOD_START.items() if name != "size_bytes"}, "size_bytes"),
    "odd size": (GOOD_START | {"size_bytes": 1000}, "1000"),
    "text size": (GOOD_START | {"size_bytes": "4096"}, "size_bytes"),
    "negative grace": (GOOD_START | {"restart_grace_ms": -1}, "restart_grace_ms"),
    "unknown field": (GOOD_START | {"colour": "red"}, "colour"),
    "no uuid": (GOOD_START | {"snapshot": "x"}, "snapshot"),
    "other snapshot": (GOOD_START, "snapshot"),
    "writable snapshot": (GOOD_START | {"read_only": False}, "read-only"),
    "store that is too small": (
        {"device": "d", "route": "raw", "read_only": False, "size_bytes": SIZE + 512},
        str(SIZE),
    ),
    "route without its descriptor": (
        {"device": "d", "route": "external", "read_only": False, "size_bytes": SIZE},
        "daemon_listener",
    ),
    "not an object": ("d", "object"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_start_is_refused(device: Device, case: str) -> None:
    """One clear error, and the process ends."""
    ours, theirs = control.pair()
    ours.settimeout(30)
    with open(os.path.join(device.directory, "f"), "w+b") as file:
        child = Child.spawn("snapd.device", [], [theirs.fileno(), file.fileno()])
    theirs.close()
    config, named = BAD_STARTS[case]
    message = {"verb": "start", "device": config, "descriptors": device.fds.names}
    control.send(ours, message, device.fds.fds)
    received = control.receive(ours)
    assert received is not None
    assert received[0]["ok"] is False
    assert received[0]["errno"] == errno.EINVAL
    assert named in received[0]["message"]
    assert child.wait(30_000) == 1
    ours.close()


def test_size_must_match_the_maps(device: Device) -> None:
    reply = device.start(size_bytes=SIZE - BLOCK)
    assert (reply["ok"], reply["errno"]) == (False, errno.EINVAL)
    assert str(SIZE) in reply["message"]


def test_host_restarts_on_the_same_listener(device: Device, images: Images) -> None:
    """The same URI answers again, with the same descriptors; a client only has to connect again."""
    first = device.start()
    assert read_all(device) == images.new
    worker = int(device.status()["worker_pid"])
    assert device.kill_host() == 128 + signal.SIGKILL
    # A client that comes while nobody serves waits in the listener's backlog.
    early = socket.socket(socket.AF_UNIX)
    early.settimeout(30)
    early.connect(device.nbd_path)
    assert device.start()["pid"] != first["pid"]
    assert early.recv(8) == b"NBDMAGIC"
    early.close()
    assert read_all(device) == images.new
    assert device.status()["worker_pid"] != worker


def test_worker_of_a_dead_host_is_evicted(device: Device, images: Images) -> None:
    """DMU-185: a stopped worker that outlives its host is killed before its successor acts."""
    device.start()
    assert read_all(device) == images.new
    worker = int(device.status()["worker_pid"])
    pidfd = os.pidfd_open(worker)
    os.kill(worker, signal.SIGSTOP)
    device.kill_host()
    device.start()
    assert read_all(device) == images.new
    assert select.select([pidfd], [], [], 30)[0] == [pidfd]
    os.close(pidfd)


def test_host_dies_under_clients(device: Device) -> None:
    """The connection drops: an error, never bytes of anything."""
    device.start()
    with device.client() as client:
        device.kill_host()
        with pytest.raises(SnapdError):
            read(client, 0, BLOCK)

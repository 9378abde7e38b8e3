"""Loop devices of the service: mounted file systems, and who may die under them."""

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from conftest import BLOCK, Images, Service

from snapd.api.v1 import devices_pb2
from snapd.client.service import Client
from snapd.manager import loopdevice

MakeImages = Callable[..., Images]
SIZE = 4 << 20


@pytest.fixture(autouse=True)
def _loop_devices() -> None:
    if (missing := loopdevice.probe()) is not None:
        pytest.skip(missing)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read(path: str) -> bytes:
    """The whole device, past the page cache."""
    with open(path, "rb", buffering=0) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return device.readall()


class Reader(threading.Thread):
    """Reads random blocks of a block device, past the page cache, until `finish`; an error or a wrong byte ends it."""

    def __init__(self, path: str, expected: bytes) -> None:
        super().__init__(daemon=True)
        self._expected = expected
        self._fd = os.open(path, os.O_RDONLY)
        self._finished = threading.Event()
        self.failure = ""
        self.reads = 0

    def run(self) -> None:
        random = Random(1)
        while not self._finished.is_set() and not self.failure:
            offset = random.randrange(len(self._expected) // BLOCK) * BLOCK
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                data = os.pread(self._fd, BLOCK, offset)
            except OSError as error:
                self.failure = str(error)
                break
            if data != self._expected[offset : offset + BLOCK]:
                self.failure = f"wrong data at {offset}"
            self.reads += 1
        os.close(self._fd)

    def finish(self) -> None:
        reads = self.reads
        until(lambda: self.reads > reads or self.failure)
        self._finished.set()
        self.join(60)
        assert not self.is_alive(), "a read hangs"
        assert self.failure == ""


def make_disk(service: Service, route: str = "raw") -> str:
    """A store of random content as a loop device."""
    store = service.directory / "store.img"
    store.write_bytes(Random(5).randbytes(SIZE))
    made = service.json("device", "create", "disk", "--store", str(store), "--route", route, "--export", "loop")
    assert made["export"] == "LOOP"
    return str(made["loop_path"])


def get(client: Client) -> devices_pb2.Device:
    return client.get_device("devices/disk")


def test_a_snapshot_as_a_loop_device(service: Service, images: MakeImages) -> None:
    """`map` prints the device; it reads as the new image and takes no writes; `unmap` takes it away."""
    pair = images(blocks=512)
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    path = service.snapctl("snapshot", "map", "u/s", "--export", "loop").strip()
    assert path.startswith("/dev/loop")
    assert read(path) == pair.new
    with pytest.raises(PermissionError), open(path, "r+b", buffering=0) as device:
        device.write(bytes(BLOCK))
    service.snapctl("merge", "start", "u", "--wait")
    assert read(path) == pair.new
    assert service.json("snapshot", "unmap", "u/s")["loop_path"] is None
    with contextlib.suppress(OSError):
        assert read(path) == b""


def test_a_device_in_use_is_kept(service: Service) -> None:
    """EBUSY while it is mounted, with nothing changed."""
    path = make_disk(service)
    subprocess.run(["mkfs.ext4", "-q", path], check=True, timeout=60)
    mount = service.directory / "mnt"
    mount.mkdir()
    subprocess.run(["mount", path, str(mount)], check=True, timeout=60)
    try:
        (mount / "file").write_bytes(b"content")
        assert "mounted" in service.snapctl("device", "delete", "disk", code=1)
        assert service.json("device", "show", "disk")["state"] == "SERVING"
        assert (mount / "file").read_bytes() == b"content"
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=60)
    service.snapctl("device", "delete", "disk")
    store = service.directory / "store.img"
    assert (
        subprocess.run(["fsck.ext4", "-fn", str(store)], check=False, timeout=60, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("victim", ["daemon", "stopped daemon", "host", "worker"])
def test_whoever_dies_a_reader_sees_nothing(service: Service, victim: str) -> None:
    """The death table: daemon, device host and worker are replaced under an open loop device, which stays the same."""
    with service.client() as client:
        path = make_disk(service, "worker")
        reader = Reader(path, (service.directory / "store.img").read_bytes())
        reader.start()
        for _ in range(2):
            before = get(client)
            if victim.endswith("daemon"):
                service.kill() if victim == "daemon" else service.stop()
                service.start()
                assert (get(client).host_pid, get(client).worker_pid) == (before.host_pid, before.worker_pid)
            else:
                pid = before.host_pid if victim == "host" else before.worker_pid
                os.kill(pid, signal.SIGKILL)
                wait_for_successor(client, before, victim)
        reader.finish()
        assert get(client).loop_path == path
        service.snapctl("device", "delete", "disk")


def wait_for_successor(client: Client, before: devices_pb2.Device, victim: str) -> None:
    """Return when the device serves again, and the victim has a successor."""
    dead = before.host_pid if victim == "host" else before.worker_pid

    def has_successor() -> bool:
        now = get(client)
        pids = (now.host_pid, now.worker_pid)
        return now.state == devices_pb2.DEVICE_STATE_SERVING and 0 not in pids and dead not in pids

    until(has_successor)


def test_after_the_last_host_nobody_hangs(service: Service) -> None:
    """A device that has failed has no loop device, and whoever still has it open gets errors; it can be made again."""
    path = make_disk(service)
    fd = os.open(path, os.O_RDONLY)
    try:
        with service.client() as client:
            killed = {0}
            for _ in range(5):
                until(lambda: get(client).host_pid not in killed)
                killed.add(pid := get(client).host_pid)
                os.kill(pid, signal.SIGKILL)
            until(lambda: get(client).state == devices_pb2.DEVICE_STATE_FAILED and not get(client).loop_path)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with pytest.raises(OSError, match="error") as caught:
                os.pread(fd, BLOCK, 1 << 20)
            assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)
    service.snapctl("device", "delete", "disk")
    assert read(make_disk(service))


@pytest.mark.parametrize("victim", ["host", "worker"])
def test_a_failed_snapshot_device_is_mapped_again(service: Service, images: MakeImages, victim: str) -> None:
    """`map` brings the device back; the very same loop device, if it was only the worker that died."""
    pair = images(blocks=512)
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    before = service.snapctl("snapshot", "map", "u/s", "--export", "loop").strip()
    fd = os.open(before, os.O_RDONLY)
    with service.client() as client:

        def pid() -> int:
            (device,) = client.list_devices()
            return device.host_pid if victim == "host" else device.worker_pid

        killed = {0}
        for _ in range(5):
            until(lambda: pid() not in killed)
            killed.add(last := pid())
            os.kill(last, signal.SIGKILL)
        until(lambda: client.list_devices()[0].state == devices_pb2.DEVICE_STATE_FAILED)
    path = service.snapctl("snapshot", "map", "u/s").strip()
    assert read(path) == pair.new
    if victim == "worker":
        assert path == before
        assert os.pread(fd, BLOCK, 0) == pair.new[:BLOCK]
    os.close(fd)
    service.snapctl("snapshot", "unmap", "u/s")


def test_everything_that_died_leaves_no_mount(service: Service) -> None:
    """Daemon and device host are gone: the old mount is cleared away, and the device is made anew."""
    make_disk(service)
    pid = service.json("device", "show", "disk")["host_pid"]
    service.kill()
    os.kill(pid, signal.SIGKILL)
    service.start()
    path = service.json("device", "show", "disk")["loop_path"]
    assert read(path) == (service.directory / "store.img").read_bytes()
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(service.directory) in line]
    assert len(mounts) == 1
    service.snapctl("device", "delete", "disk")
    assert str(service.directory) not in Path("/proc/mounts").read_text()

"""Devices over the service: stores and daemons of somebody else's, who dies and what clients see, figures, refusals."""

import contextlib
import errno
import itertools
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import grpc
import pytest
from conftest import BLOCK, Images, Service, processes_of, read_device
from nbdpeer import Peer

from snapd.api.v1 import devices_pb2, devices_pb2_grpc
from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.client.service import Client
from snapd.device.nbd import Command

SIZE = 256 * BLOCK


@pytest.fixture
def store(short_dir: Path) -> Path:
    path = short_dir / "store.img"
    path.write_bytes(Random(5).randbytes(SIZE))
    return path


@contextlib.contextmanager
def peer(uri: str) -> Iterator[Peer]:
    with Peer(uri.partition("socket=")[2]) as connected:
        yield connected.negotiate()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Reader(threading.Thread):
    """Reads random blocks over one connection until `finish`; an error, or a wrong byte, ends it."""

    def __init__(self, uri: str, expected: bytes) -> None:
        super().__init__(daemon=True)
        self._expected = expected
        self._device = NbdClient.connect(uri)
        self._finished = threading.Event()
        self.failure = ""
        self.reads = 0

    def run(self) -> None:
        random, buffer = Random(1), bytearray(BLOCK)
        with self._device as device:
            while not self._finished.is_set() and not self.failure:
                offset = random.randrange(len(self._expected) // BLOCK) * BLOCK
                try:
                    device.read_into(buffer, offset)
                except SnapdError as error:
                    self.failure = str(error)
                    return
                if buffer != self._expected[offset : offset + BLOCK]:
                    self.failure = f"wrong data at {offset}"
                self.reads += 1

    def finish(self) -> None:
        reads = self.reads
        # One more: the connection is good still.
        until(lambda: self.reads > reads or self.failure)
        self._finished.set()
        self.join(60)
        assert not self.is_alive(), "a read hangs"
        assert self.failure == ""


def kill(pid: int) -> None:
    assert pid
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("route", ["raw", "worker"])
def test_a_store_is_served_and_written(service: Service, store: Path, route: str) -> None:
    """From creation to deletion; what was written is in the store, and nobody holds the store afterwards."""
    made = service.json("device", "create", "disk", "--store", str(store), "--route", route)
    assert (made["name"], made["state"], made["route"]) == ("devices/disk", "SERVING", route.upper())
    assert (made["size_bytes"], made["read_only"], made["export"]) == (SIZE, False, "NBD")
    with peer(made["nbd_uri"]) as client:
        assert client.read(0, SIZE) == store.read_bytes()
        assert client.call(Command.WRITE, BLOCK, BLOCK, payload=b"x" * BLOCK).error == 0
        assert client.call(Command.FLUSH).error == 0
    assert store.read_bytes()[BLOCK : 2 * BLOCK] == b"x" * BLOCK
    assert service.json("device", "show", "disk")["worker_pid" if route == "worker" else "host_pid"]
    assert [device["name"] for device in service.json("device", "list")] == ["devices/disk"]
    assert "disk" in service.snapctl("device", "list")
    again = ("device", "create", "other", "--store", str(store))
    assert "in use" in service.snapctl(*again, code=1)
    service.snapctl("device", "delete", "disk")
    assert service.json("device", "list") == []
    assert "no device disk" in service.snapctl("device", "show", "disk", code=1)
    service.snapctl(*again)


def test_a_read_only_store_refuses_writes(service: Service, store: Path) -> None:
    before = store.read_bytes()
    for name in ("one", "two"):
        uri = service.json("device", "create", name, "--store", str(store), "--read-only")["nbd_uri"]
        with peer(uri) as client:
            assert client.call(Command.WRITE, 0, BLOCK, payload=b"x" * BLOCK).error == errno.EPERM
    assert store.read_bytes() == before


def test_a_worker_killed_under_a_client(service: Service, store: Path) -> None:
    """DMU-148: the grace policy; the client sees a pause, `show` the restart."""
    with service.client() as client:
        service.snapctl("device", "create", "disk", "--store", str(store), "--route", "worker")
        device = client.get_device("devices/disk")
        reader = Reader(device.nbd_uri, store.read_bytes())
        reader.start()
        kill(device.worker_pid)
        until(lambda: client.get_device("devices/disk").worker_restarts == 1)
        reader.finish()
        assert client.get_device("devices/disk").host_pid == device.host_pid


def test_fail_fast_fails_at_once_and_stays_failed(service: Service, store: Path) -> None:
    """The reference's behaviour: no request after the death of the daemon hangs, and nobody replaces it."""
    made = service.json("device", "create", "disk", "--store", str(store), "--route", "worker", "--policy", "fail_fast")
    assert made["policy"] == "FAIL_FAST"
    with service.client() as client, peer(made["nbd_uri"]) as reader:
        assert reader.read(0, BLOCK) == store.read_bytes()[:BLOCK]
        kill(client.get_device("devices/disk").worker_pid)
        until(lambda: client.get_device("devices/disk").state == devices_pb2.DEVICE_STATE_FAILED)
        device = client.get_device("devices/disk")
        assert (device.worker_pid, device.attach_state) == (0, devices_pb2.ATTACH_STATE_TERMINATED)
        assert reader.call(Command.READ, 0, BLOCK).error == errno.EIO


def test_a_device_host_that_dies_again_and_again(service: Service, store: Path) -> None:
    """The fifth death within a minute is the end: refused at connect, and a new device can be made."""
    made = service.json("device", "create", "disk", "--store", str(store))
    with service.client() as client:
        killed = {0}
        for _ in range(5):
            until(lambda: client.get_device("devices/disk").host_pid not in killed)
            pid = client.get_device("devices/disk").host_pid
            killed.add(pid)
            kill(pid)
        until(lambda: client.get_device("devices/disk").state == devices_pb2.DEVICE_STATE_FAILED)
        assert client.get_device("devices/disk").host_restarts == 5
        with pytest.raises(SnapdError):
            NbdClient.connect(made["nbd_uri"])
        client.delete_device("devices/disk")
        service.snapctl("device", "create", "disk", "--store", str(store))
        assert read_device(client.get_device("devices/disk").nbd_uri) == store.read_bytes()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_daemons_come_and_go_under_reading_clients(
    service: Service, store: Path, images: Callable[..., Images], end: str
) -> None:
    """A new daemon takes over every kind of device; no client sees an error, no process changes."""
    pair = images(blocks=512)
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    mapped = service.json("snapshot", "map", "u/s", "--tcp", "127.0.0.1:0")
    other = store.with_name("other.img")
    other.write_bytes(store.read_bytes())
    service.snapctl("device", "create", "raw", "--store", str(store))
    service.snapctl("device", "create", "worker", "--store", str(other), "--route", "worker")
    with service.client() as client:
        before = client.list_devices()
        uris = {device.name: device.nbd_uri for device in before}
        readers = [
            Reader(mapped["nbd_tcp_uri"], pair.new),
            Reader(uris["devices/raw"], store.read_bytes()),
            Reader(uris["devices/worker"], store.read_bytes()),
        ]
        for reader in readers:
            reader.start()
        for _ in range(2):
            service.stop() if end == "stop" else service.kill()
            service.start()
            after = client.list_devices()
            assert [(d.name, d.host_pid, d.worker_pid, d.state) for d in after] == [
                (d.name, d.host_pid, d.worker_pid, d.state) for d in before
            ]
        for reader in readers:
            reader.finish()


def test_everything_dies_and_comes_back_at_the_same_places(service: Service, store: Path) -> None:
    """A store's device is recorded: the next daemon opens the store anew and serves the very same addresses."""
    made = service.json("device", "create", "disk", "--store", str(store), "--route", "worker", "--tcp", "127.0.0.1:0")
    assert made["nbd_tcp_uri"] != "nbd://127.0.0.1:0"
    service.kill()
    for pid in (made["host_pid"], made["worker_pid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    service.start()
    again = service.json("device", "show", "disk")
    assert (again["nbd_uri"], again["nbd_tcp_uri"]) == (made["nbd_uri"], made["nbd_tcp_uri"])
    assert again["host_pid"] != made["host_pid"]
    for uri in (again["nbd_uri"], again["nbd_tcp_uri"]):
        assert read_device(uri) == store.read_bytes()


def test_a_store_that_shrank_is_not_served(service: Service, store: Path) -> None:
    """What was promised cannot be kept: FAILED, the daemon and the other devices serve."""
    pid = service.json("device", "create", "disk", "--store", str(store))["host_pid"]
    service.kill()
    kill(pid)
    os.truncate(store, BLOCK)
    service.start()
    assert service.json("device", "show", "disk")["state"] == "FAILED"
    assert "when the device was created" in service.log()
    assert "does not run" in service.snapctl("device", "set", "disk", "--attach-timeout-ms", "1", code=1)
    service.snapctl("device", "delete", "disk")


def test_a_device_in_no_record_is_ended_by_the_next_daemon(service: Service, store: Path) -> None:
    """What a daemon leaves that ends between a device and its record."""
    service.snapctl("device", "create", "disk", "--store", str(store))
    pid = service.json("device", "show", "disk")["host_pid"]
    service.kill()
    with contextlib.closing(sqlite3.connect(service.state / "state.db")) as records:
        records.execute("DELETE FROM devices")
        records.commit()
    service.start()
    until(lambda: pid not in processes_of(service.directory))
    assert service.json("device", "list") == []
    service.snapctl("device", "create", "disk", "--store", str(store))


def test_an_external_daemon(service: Service, store: Path) -> None:
    """DMU-154, DMU-188: whoever is us may attach to the socket and serve; the timeout before is set live and stays."""
    made = service.json("device", "create", "ext", "--route", "external", "--size", str(SIZE))
    assert (made["attach_state"], made["worker_pid"], made["size_bytes"]) == ("NEVER", None, SIZE)
    assert stat.S_IMODE(os.stat(made["daemon_socket"]).st_mode) == 0o600
    set_to = ("device", "set", "ext", "--attach-timeout-ms")
    assert service.json(*set_to, "0")["attach_timeout_ms"] == 0
    with peer(made["nbd_uri"]) as client:
        assert client.call(Command.READ, 0, BLOCK).error == errno.EIO
        service.kill()
        service.start()
        assert service.json("device", "show", "ext")["attach_timeout_ms"] == 0
        service.snapctl(*set_to, "30000")
        worker = subprocess.Popen(
            [sys.executable, "-m", "snapd.worker", "--channel", made["daemon_socket"], "--base", str(store)]
        )
        try:
            assert client.read(0, SIZE) == store.read_bytes()
            assert service.json("device", "show", "ext")["attach_state"] == "ATTACHED"
        finally:
            worker.kill()
            worker.wait()
        until(lambda: service.json("device", "show", "ext")["attach_state"] == "TERMINATED")


def test_statistics(service: Service, store: Path) -> None:
    """Counts since the start of the host; rates and latencies between two ticks, and none where nothing happened."""
    made = service.json("device", "create", "disk", "--store", str(store))
    with peer(made["nbd_uri"]) as client, service.client() as api:
        for block in range(10):
            client.read(block * BLOCK, BLOCK)
        client.call(Command.WRITE, 0, BLOCK, payload=bytes(BLOCK))
        client.call(Command.FLUSH)
        stats = service.json("device", "stats", "disk")
        figures = ("reads", "read_bytes", "writes", "write_bytes", "flushes", "errors", "connections", "in_flight")
        assert [stats[name] for name in figures] == [10, 10 * BLOCK, 1, BLOCK, 1, 0, 1, 0]
        assert 0 < stats["read_p50_us"] <= stats["read_p95_us"] <= stats["read_p99_us"] <= stats["read_max_us"]
        table = service.snapctl("device", "stats", "disk")
        assert "read latency" in table
        assert "p99" in table

        ticks = api.watch_devices("devices/disk", interval_ms=100)
        (quiet,) = next(ticks)
        assert (quiet.io.reads, quiet.io.reads_per_second, quiet.io.read_latency.count) == (10, 0, 0)
        client.read(0, BLOCK)
        busy = next(tick for (tick,) in ticks if tick.io.reads == 11)
        assert busy.io.read_latency.count == 1
        assert busy.io.reads_per_second * busy.io.period_ms == pytest.approx(1000)
        assert busy.io.read_bytes_per_second == pytest.approx(busy.io.reads_per_second * BLOCK)


def test_watch_on_the_command_line(service: Service, store: Path) -> None:
    """A line a device and tick; in JSON an object a line; a daemon that is restarted is found again."""
    service.snapctl("device", "create", "disk", "--store", str(store))
    command = [sys.executable, "-m", "snapd.ctl", "--server", service.server, "device", "watch", "--interval-ms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as table:
        assert table.stdout is not None
        heading, first = (table.stdout.readline() for _ in range(2))
        service.kill()
        service.start()
        lines = [table.stdout.readline() for _ in range(10)]
        table.terminate()
    assert heading.split()[:4] == ["device", "state", "attach", "flight"]
    assert first.split()[:2] == ["disk", "SERVING"]
    assert all(line.split()[:2] in (["disk", "SERVING"], ["device", "state"]) for line in lines)
    with subprocess.Popen([*command, "disk", "-o", "json"], stdout=subprocess.PIPE, text=True) as objects:
        assert objects.stdout is not None
        assert [json.loads(line)["name"] for line in itertools.islice(objects.stdout, 2)] == ["devices/disk"] * 2
        objects.terminate()


def test_what_is_refused_changes_nothing(service: Service, store: Path, images: Callable[..., Images]) -> None:
    """One clear sentence each, and the status that goes with it."""
    text = str(store)
    create = ("device", "create", "disk", "--store", text)
    for arguments, said in (
        ((*create, "--tcp", "0.0.0.0:0"), "not a loopback address: without TLS"),
        ((*create, "--tcp", "nowhere"), "not HOST:PORT"),
        ((*create, "--size", "1MiB"), "as large as its store"),
        (("device", "create", "disk", "--store", "/nowhere"), "No such file"),
        (("device", "create", "disk"), "not absolute"),
        (("device", "create", "disk", "--route", "external", "--store", text), "has no store"),
        (("device", "create", "disk", "--route", "external", "--size", "100"), "whole sectors"),
        (("device", "create", "Disk!", "--store", text), "1 to 63 of a-z"),
        ((*create, "--export", "dm"), "no dm-user device"),
        (("device", "delete", "disk"), "no device disk"),
        (("device", "stats", "disk"), "no device disk"),
        (("device", "watch", "disk"), "no device disk"),
        (("device", "watch", "--interval-ms", "99"), "from 100"),
    ):
        assert said in service.snapctl(*arguments, code=1), arguments
    odd = store.with_name("odd.img")
    odd.write_bytes(b"x" * 1000)
    assert "whole sectors" in service.snapctl("device", "create", "disk", "--store", str(odd), code=1)
    assert service.json("device", "list") == []
    service.snapctl(*create)
    assert "exists" in service.snapctl(*create, code=1)
    assert "its route is raw" in service.snapctl("device", "set", "disk", "--attach-timeout-ms", "5", code=1)
    pair = images(blocks=512)
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    device = service.json("snapshot", "map", "u/s", "--policy", "fail_fast")["device"]
    assert "unmap that" in service.snapctl("device", "delete", device, code=1)
    assert "other settings" in service.snapctl("snapshot", "map", "u/s", "--policy", "restart", code=1)
    assert "other settings" in service.snapctl("snapshot", "map", "u/s", "--tcp", "127.0.0.1:0", code=1)
    service.snapctl("snapshot", "map", "u/s")
    assert service.json("device", "show", device)["snapshot"] == "updates/u/snapshots/s"


def test_a_client_that_hangs_up_leaves_nothing_half_done(service: Service, store: Path) -> None:
    """The verb it asked for is finished: the device is recorded, listed, and can be deleted."""
    with grpc.insecure_channel(service.server) as channel:
        devices = devices_pb2_grpc.DevicesStub(channel)
        devices.ListDevices(devices_pb2.ListDevicesRequest(), timeout=20)
        request = devices_pb2.CreateDeviceRequest(
            device_id="disk", route=devices_pb2.ROUTE_WORKER, store_path=str(store)
        )
        call = devices.CreateDevice.future(request)
        until(lambda: processes_of(service.directory) != [service.pid])
        call.cancel()
    with service.client() as client:
        until(client.list_devices)
        assert read_device(client.get_device("devices/disk").nbd_uri) == store.read_bytes()
    service.snapctl("device", "delete", "disk")


def test_the_reason_travels(service: Service, store: Path) -> None:
    with service.client() as client, pytest.raises(SnapdError) as caught:
        create(client, store, tcp_address="192.0.2.1:5")
    assert caught.value.reason == "TCP_WITHOUT_TLS"


def create(client: Client, store: Path, **export: str) -> devices_pb2.Device:
    return client.create_device(
        devices_pb2.CreateDeviceRequest(
            device_id="disk",
            route=devices_pb2.ROUTE_RAW,
            store_path=str(store),
            export=devices_pb2.ExportSettings(tcp_address=export["tcp_address"]),
        )
    )

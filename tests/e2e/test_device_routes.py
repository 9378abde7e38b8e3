"""Every route of a device, with real processes: who serves it, what is written, what is counted, and how it ends."""

import contextlib
import errno
import os
import random
import select
import signal
import socket
from collections.abc import Iterator

import pytest
from devicerig import BLOCK, SIZE, WAIT_S, Device, Images
from nbdpeer import Peer

from snapd.block.bio import MAX_BIO_BYTES
from snapd.device.latency import percentile
from snapd.device.nbd import Command, CommandFlag

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = Command
FUA = CommandFlag.FUA


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(seed=41)


@pytest.fixture(params=["raw", "worker"])
def device(request: pytest.FixtureRequest, images: Images) -> Iterator[Device]:
    with Device(images, request.param) as device:
        assert device.start()["ok"]
        yield device


@pytest.fixture
def worker(images: Images) -> Iterator[Device]:
    """A store behind a worker; not started."""
    with Device(images, "worker") as device:
        yield device


@contextlib.contextmanager
def peer_of(device: Device, *, structured: bool = False, allocation: bool = False) -> Iterator[Peer]:
    with Peer(device.nbd_path, WAIT_S) as peer:
        yield peer.negotiate(structured=structured, allocation=allocation)


def wait_for_exit(device: Device) -> int:
    assert device.host is not None
    status = device.host.wait(WAIT_S * 1000)
    device.host = None
    assert device.connection is not None
    device.connection.close()
    return status


@pytest.mark.parametrize("route", ["snapshot", "raw", "worker"])
@pytest.mark.parametrize("structured", [False, True])
def test_large_and_odd_reads(images: Images, route: str, structured: bool) -> None:
    """DMU-182: one request of any length and place has its bytes, though nothing else wakes the host."""
    expected = images.new if route == "snapshot" else images.old
    with Device(images, route) as device:
        device.start()
        with peer_of(device, structured=structured) as peer:
            for offset, length in [
                (0, SIZE),
                (1, SIZE - 1),
                (SIZE - 1, 1),
                (511, 2),
                (513, MAX_BIO_BYTES),
                (BLOCK, 2 * MAX_BIO_BYTES + 512),
            ]:
                assert peer.read(offset, length) == expected[offset : offset + length]
        assert device.status()["in_flight_bytes"] == 0


def test_everything_a_store_can_do(device: Device, images: Images) -> None:
    """Writes, zeroes, discards and flushes against a copy in memory; the store has it all, as a file too."""
    choice = random.Random(17)
    copy = bytearray(images.old)
    with peer_of(device, structured=True, allocation=True) as peer:
        for _ in range(150):
            length = 512 * choice.choice([1, 3, 8, 100, 600, 4096])
            offset = 512 * choice.randrange((SIZE - length) // 512)
            flags = choice.choice([0, FUA])
            kind = choice.choice([READ, WRITE, WRITE_ZEROES, TRIM, FLUSH])
            payload = choice.randbytes(length) if kind == WRITE else b""
            where = (0, 0) if kind == FLUSH else (offset, length)
            reply = peer.call(kind, *where, flags=0 if kind == READ else flags, payload=payload)
            assert not reply.error
            if kind == READ:
                assert reply.data == copy[offset : offset + length]
            elif kind == WRITE:
                copy[offset : offset + length] = payload
            elif kind == WRITE_ZEROES:
                copy[offset : offset + length] = bytes(length)
            elif kind == TRIM:
                # What is discarded reads as zeros here, or as before where the file system knows no holes.
                copy[offset : offset + length] = peer.read(offset, length)
        assert sum(length for length, _ in peer.extents(0, SIZE)) <= SIZE
        assert peer.read(0, SIZE) == copy
    assert device.content() == copy


def test_stats(device: Device) -> None:
    """Each request is counted once, by its kind, with its bytes and its latency."""
    with peer_of(device) as peer:
        for _ in range(5):
            peer.read(0, 1000)
        for _ in range(3):
            assert not peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error
        for kind in (TRIM, WRITE_ZEROES):
            assert not peer.call(kind, 0, BLOCK).error
        assert not peer.call(FLUSH).error
        assert peer.call(WRITE, SIZE, 512, payload=bytes(512)).error == errno.ENOSPC
        stats = device.stats()
        assert stats["connections"] == 1
    expected = {"reads": 5, "read_bytes": 5000, "writes": 3, "write_bytes": 3 * BLOCK}
    expected |= {"flushes": 1, "discards": 1, "zeroes": 1, "errors": 1, "queued": 0, "in_flight": 0}
    assert {name: stats[name] for name in expected} == expected
    assert [sum(count for _, count in stats[f"{kind}_latency"]) for kind in ("read", "write", "flush")] == [5, 3, 1]
    assert percentile(stats["read_latency"], 1.0) > 0
    assert stats["state"] == "RUNNING"
    assert stats["uptime_ms"] >= 0
    is_raw = device.route == "raw"
    assert stats["attach_state"] == ("none" if is_raw else "attached")
    assert (stats["worker_pid"] == 0) is is_raw


@pytest.mark.parametrize("route", ["raw", "worker"])
def test_read_only_store(images: Images, route: str) -> None:
    """It serves reads, succeeds with flushes, and refuses the rest."""
    with Device(images, route) as device:
        device.start(read_only=True)
        with peer_of(device) as peer:
            assert peer.read(0, SIZE) == images.old
            assert not peer.call(FLUSH).error
            assert peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error == errno.EPERM
            assert peer.call(TRIM, 0, BLOCK).error == errno.EPERM
            assert peer.call(WRITE_ZEROES, 0, BLOCK).error == errno.EPERM
        assert device.content() == images.old


def test_snapshot_refuses_changes(images: Images) -> None:
    with Device(images) as device:
        device.start()
        with peer_of(device) as peer:
            assert peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error == errno.EPERM
            assert not peer.call(FLUSH).error
            assert peer.read(0, SIZE) == images.new
        assert device.content() == images.old


def test_device_that_is_smaller_than_its_store(images: Images) -> None:
    with Device(images, "raw") as device:
        device.start(size_bytes=SIZE // 2)
        with peer_of(device) as peer:
            assert peer.size_bytes == SIZE // 2
            assert peer.call(WRITE, SIZE // 2, 512, payload=bytes(512)).error == errno.ENOSPC


# Workers that go.


def requests_of_all_kinds(peer: Peer, choice: random.Random, copy: bytearray) -> int:
    """Send requests that do not touch each other; returns how many. `copy` becomes what the device holds afterwards."""
    count = 40
    step = SIZE // count // 512 * 512
    for i in range(count):
        offset, length = i * step, 512 * choice.randint(1, step // 512)
        kind = [READ, WRITE, WRITE_ZEROES, WRITE][i % 4]
        payload = choice.randbytes(length) if kind == WRITE else b""
        if kind == WRITE:
            copy[offset : offset + length] = payload
        elif kind == WRITE_ZEROES:
            copy[offset : offset + length] = bytes(length)
        flags = FUA if i % 8 == 1 else 0
        assert peer.send(peer.ready(kind, offset, length, flags=flags, payload=payload))
    assert peer.send(peer.ready(FLUSH))
    return count + 1


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_everything_in_flight_is_replayed(worker: Device, images: Images, end: str) -> None:
    """DMU-148, DMU-184: reads, writes, zeroes and a flush that a dead or stopped worker had taken, done by the next."""
    worker.start(request_timeout_ms=1500)
    copy = bytearray(images.old)
    with peer_of(worker) as peer:
        for round_number in range(3):
            assert peer.read(0, SIZE) == copy
            status = worker.status()
            before = bytes(copy)
            os.kill(status["worker_pid"], signal.SIGSTOP)
            count = requests_of_all_kinds(peer, random.Random(round_number), copy)
            worker.wait_for(lambda s: s["in_flight"] > 10)
            if end == "kill":
                os.kill(status["worker_pid"], signal.SIGKILL)
            replies = [peer.reply() for _ in range(count)]
            for reply in replies:
                assert not reply.error
                if reply.command == READ:
                    assert reply.data == before[reply.offset : reply.offset + reply.length]
            after = worker.status()
            assert after["worker_pid"] != status["worker_pid"]
            assert after["worker_restarts"] == round_number + 1
        assert peer.read(0, SIZE) == copy
    assert worker.content() == copy


def test_nothing_waits_for_a_worker_that_cannot_come(worker: Device, images: Images) -> None:
    """DMU-148, DMU-184: requests in flight when the last worker of a crash loop goes end in EIO, as do later ones."""
    worker.start()
    with peer_of(worker) as peer:
        assert peer.read(0, SIZE) == images.old
        pid = int(worker.status()["worker_pid"])
        os.kill(pid, signal.SIGSTOP)
        assert peer.send(*(peer.ready(READ, i * BLOCK, BLOCK) for i in range(20)))
        worker.wait_for(lambda s: s["in_flight"] == 20)
        # Nobody gets as far as answering from now on.
        killed = 0
        while (status := worker.status())["state"] != "CRASH_LOOP":
            if status["worker_pid"] not in (0, killed):
                killed = int(status["worker_pid"])
                os.kill(killed, signal.SIGSTOP)
                os.kill(killed, signal.SIGKILL)
        replies = peer.replies()
        # A worker that was quick may have answered before it was stopped.
        assert replies[-1].error == errno.EIO
        assert {reply.error for reply in replies} <= {0, errno.EIO}
        assert peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error == errno.EIO
        assert peer.call(FLUSH).error == errno.EIO
    assert worker.content() == images.old


def test_next_host_comes_after_the_old_worker(worker: Device, images: Images) -> None:
    """DMU-185: the worker of a host that was killed is gone before the next host's answers anything."""
    worker.start()
    with peer_of(worker) as peer:
        assert peer.read(0, BLOCK) == images.old[:BLOCK]
        pid = int(worker.status()["worker_pid"])
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        # Its late write, which must not land behind a newer one.
        assert peer.send(peer.ready(WRITE, 0, BLOCK, payload=b"old" * 1365 + b"."))
        worker.wait_for(lambda s: s["in_flight"] == 1)
        worker.kill_host()
    worker.start()
    with peer_of(worker) as peer:
        assert not peer.call(WRITE, 0, BLOCK, payload=b"n" * BLOCK).error
        assert select.select([pidfd], [], [], 0)[0] == [pidfd]
        assert peer.read(0, BLOCK) == b"n" * BLOCK
        assert worker.status()["worker_pid"] != pid
    os.close(pidfd)
    assert worker.content()[:BLOCK] == b"n" * BLOCK


def test_data_outlives_the_host(device: Device, images: Images) -> None:
    """The same URI answers again, with what was written; a client only has to connect again."""
    with peer_of(device) as peer:
        assert not peer.call(WRITE, BLOCK, BLOCK, payload=b"x" * BLOCK).error
        device.kill_host()
        with pytest.raises(EOFError):
            peer.receive(1)
    device.start()
    with peer_of(device) as peer:
        assert peer.read(0, 2 * BLOCK) == images.old[:BLOCK] + b"x" * BLOCK


# The end of a host.


def tell_to_end(device: Device, how: str) -> None:
    if how == "verb":
        assert device.call({"verb": "stop"})[0]["ok"]
    else:
        assert device.host is not None
        device.host.signal(signal.SIGTERM)


@pytest.mark.parametrize("how", ["verb", "signal"])
def test_drain_finishes_what_is_in_flight(worker: Device, images: Images, how: str) -> None:
    """`stop` and SIGTERM: every request that was taken is answered, a new one is not, and the process ends well."""
    worker.start()
    copy = bytearray(images.old)
    with peer_of(worker) as peer, Peer(worker.nbd_path, WAIT_S) as half_way, peer_of(worker) as late:
        half_way.negotiate()
        assert peer.read(0, SIZE) == images.old
        pid = int(worker.status()["worker_pid"])
        os.kill(pid, signal.SIGSTOP)
        count = requests_of_all_kinds(peer, random.Random(5), copy)
        worker.wait_for(lambda s: s["in_flight"] + s["queued"] > 10 and s["in_flight_bytes"] > 0)
        assert half_way.send(half_way.ready(WRITE, 0, 1 << 20, payload=bytes(100_000)))
        tell_to_end(worker, how)
        if how == "verb":
            # The reply has come, so it counts from now on.
            late.send(late.ready(WRITE, SIZE - 512, 512, payload=b"l" * 512))
        os.kill(pid, signal.SIGCONT)
        replies = []
        with contextlib.suppress(EOFError):
            replies = [peer.reply() for _ in range(count)]
        assert len(replies) == count
        assert {reply.error for reply in replies} == {0}
        assert wait_for_exit(worker) == 0
        for client in (peer, half_way, late):
            assert client.rest() == b""
    if how == "verb":
        assert worker.content()[-512:] == images.old[-512:]
    assert worker.content() == copy
    assert not os.path.exists(f"/proc/{pid}")


def test_drain_has_an_end(worker: Device) -> None:
    """A worker that never answers holds the host for so long and no longer."""
    worker.start()
    with peer_of(worker) as peer:
        peer.read(0, BLOCK)
        pid = int(worker.status()["worker_pid"])
        os.kill(pid, signal.SIGSTOP)
        assert peer.send(peer.ready(READ, 0, BLOCK))
        worker.wait_for(lambda s: s["in_flight"] == 1)
        tell_to_end(worker, "verb")
        # Still there, and still talking.
        assert worker.status()["in_flight"] == 1
        tell_to_end(worker, "verb")
        assert wait_for_exit(worker) == 0
        assert peer.rest() == b""
    assert not os.path.exists(f"/proc/{pid}")


def test_drained_host_hands_its_listener_on(worker: Device, images: Images) -> None:
    """Who connects while nobody serves is served by the next host; with the same descriptors."""
    worker.start()
    assert worker.stop() == 0
    with Peer(worker.nbd_path, WAIT_S) as peer:
        worker.start()
        peer.negotiate()
        assert peer.read(0, BLOCK) == images.old[:BLOCK]


def test_set_refuses_nonsense(worker: Device) -> None:
    """One clear error, and nothing is changed."""
    worker.start()
    for value in (-1, "4000", None, True, 1.5):
        reply = worker.call({"verb": "set", "attach_timeout_ms": value})[0]
        assert (reply["ok"], reply["errno"]) == (False, errno.EINVAL)
        assert "attach_timeout_ms" in reply["message"]
    assert worker.status()["attach_timeout_ms"] == 4000
    assert worker.call({"verb": "set", "attach_timeout_ms": 17})[0]["ok"]
    assert worker.status()["attach_timeout_ms"] == 17


def test_tcp_and_unix_serve_one_device(images: Images) -> None:
    """Two listeners, one device: what is written through one is read through the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Device(images, "raw") as device:
        device.give("nbd_tcp_listener", listener.fileno())
        device.start()
        with peer_of(device) as one, Peer(listener.getsockname(), WAIT_S) as other:
            other.negotiate()
            assert not one.call(WRITE, 0, BLOCK, payload=b"t" * BLOCK).error
            assert other.read(0, SIZE) == b"t" * BLOCK + images.old[BLOCK:]
            assert device.status()["connections"] == 2

"""Workers killed again and again under load: with successors nobody notices, without one everything fails at once.

`SNAPD_KILLS` is how often each storm kills; each kill waits until the worker has answered something, as whoever
kills at random from outside would find it. Times are printed, never judged.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from devicerig import BLOCK, Device, Images
from nbdpeer import Peer

from snapd.client.nbd import NbdClient
from snapd.device.nbd import Command, CommandFlag

KILLS = int(os.environ.get("SNAPD_KILLS", "15"))
BLOCKS = 16_384
FIO_BYTES = 48 << 20
"""The front of a device is fio's, the rest belongs to a client that checks every byte itself."""
WAIT_S = 60


def run_fio(device: Device, seed: int, *extra: str) -> "subprocess.Popen[str]":
    fio = shutil.which("fio")
    if fio is None:
        pytest.skip("fio is not installed")
    if "nbd" not in subprocess.run([fio, "--enghelp"], capture_output=True, text=True, check=True).stdout.split():
        pytest.skip("this fio has no nbd engine")
    return subprocess.Popen(
        [
            *(fio, "--name=storm", f"--randseed={seed}", f"--size={FIO_BYTES}", "--rw=randrw", "--bsrange=4k-64k"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=32"),
            # By turns: deeper and no deeper than what a worker answers at once.
            *(f"--iodepth={16 if seed % 2 else 256}", "--output-format=terse", *extra),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=device.directory,
    )


class Checker:
    """A client of the rest of the device: a few requests in flight at a time, and a copy of what it wrote."""

    def __init__(self, device: Device, seed: int) -> None:
        self._choice = random.Random(seed)
        self._start = FIO_BYTES
        self.copy = bytearray(device.images.old[FIO_BYTES:])
        self.rounds = 0
        self.longest_pause_ms = 0.0
        self.failures: list[str] = []
        self._done = threading.Event()
        self._peer = Peer(device.nbd_path, WAIT_S).negotiate(structured=True)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """End after the round under way."""
        self._done.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._peer.socket.close()

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self._round()
                self.rounds += 1
        except (AssertionError, EOFError, OSError, KeyError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def _round(self) -> None:
        choice, area = self._choice, len(self.copy) // 16
        requests = []
        reads: dict[int, bytes] = {}
        # Each in an area of its own: requests in flight together may be done in any order.
        for number in choice.sample(range(16), 8):
            at = number * area + 512 * choice.randrange(area // 1024)
            length = 512 * choice.choice([1, 8, 33, 512])
            kind = choice.choice([Command.READ, Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.FLUSH])
            payload = choice.randbytes(length) if kind == Command.WRITE else b""
            if kind == Command.READ:
                reads[self._start + at] = bytes(self.copy[at : at + length])
            elif kind != Command.FLUSH:
                self.copy[at : at + length] = payload or bytes(length)
            flags = choice.choice([0, CommandFlag.FUA]) if kind in (Command.WRITE, Command.WRITE_ZEROES) else 0
            where = (0, 0) if kind == Command.FLUSH else (self._start + at, length)
            requests.append(self._peer.ready(kind, *where, flags=flags, payload=payload))
        assert self._peer.send(*requests)
        for _ in requests:
            before = time.monotonic()
            reply = self._peer.reply()
            self.longest_pause_ms = max(self.longest_pause_ms, (time.monotonic() - before) * 1000)
            assert not reply.error, f"error {reply.error} of command {reply.command} at {reply.offset}"
            if reply.command == Command.READ:
                assert reply.data == reads.pop(reply.offset), f"wrong bytes at {reply.offset}"
        assert not reads


def answered(status: dict[str, Any]) -> int:
    """Requests that have been answered; on a route through the worker, all of them by one."""
    return int(status["reads"] + status["writes"] + status["flushes"] + status["zeroes"])


def wait_for_worker(device: Device, other_than: int) -> int:
    """The process id of a worker that is not this one."""
    return int(device.wait_for(lambda s: s["worker_pid"] not in (0, other_than))["worker_pid"])


def wait_for_answers(device: Device, count: int) -> dict[str, Any]:
    """Until so many more have been answered, by workers that there are now."""
    before = answered(device.stats())
    return device.wait_for(lambda s: answered(s) >= before + count, "stats")


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(seed=31, blocks=BLOCKS)


@pytest.fixture
def writable(images: Images) -> Iterator[Device]:
    with Device(images, "worker") as device:
        yield device


@pytest.mark.timeout(1800)
def test_writes_and_reads_survive_kills(writable: Device) -> None:
    """DMU-148, DMU-185, DMU-41: fio and another verifying client see no error, and each reply once."""
    device = writable
    device.start()
    checker = Checker(device, seed=1)
    seed = 0
    fio = run_fio(device, seed, "--ioengine=nbd", f"--uri={device.uri}")
    killed = 0
    choice = random.Random(7)
    began = time.monotonic()
    pauses_ms: list[float] = []
    try:
        for _ in range(KILLS):
            worker = wait_for_worker(device, killed)
            # Not always just after its start.
            status = wait_for_answers(device, choice.choice([1, 1, 100, 400]))
            assert status["worker_pid"] == worker, "a worker died that nobody killed"
            if fio.poll() is not None:
                assert fio.returncode == 0, fio.communicate()[0]
                fio.communicate()
                seed += 1
                fio = run_fio(device, seed, "--ioengine=nbd", f"--uri={device.uri}")
            killed = device.kill_worker()
            at = time.monotonic()
            wait_for_worker(device, killed)
            wait_for_answers(device, 1)
            pauses_ms.append((time.monotonic() - at) * 1000)
            assert checker.failures == []
        output, _ = fio.communicate(timeout=WAIT_S)
        assert fio.returncode == 0, output
    finally:
        fio.kill()
        fio.communicate()
        checker.stop()
    assert checker.failures == []
    status = device.stats()
    assert (status["worker_restarts"], status["state"], status["errors"]) == (KILLS, "RUNNING", 0)
    assert status["in_flight"] == status["in_flight_bytes"] == 0
    # What lies in the store now, as fio wrote it, read without any of us.
    base = ["--ioengine=psync", f"--filename={device.base_path}"]
    check = run_fio(device, seed, *base, "--verify_only=1")
    assert check.wait(WAIT_S) == 0, check.communicate()[0]
    check.communicate()
    assert device.content()[FIO_BYTES:] == checker.copy
    pauses_ms.sort()
    print(
        f"{KILLS} kills in {time.monotonic() - began:.1f} s, {status['reads']} reads, {status['writes']} writes, "
        f"{status['flushes']} flushes, {seed + 1} runs of fio; from kill to the next answer: "
        f"median {pauses_ms[len(pauses_ms) // 2]:.0f} ms, at most {pauses_ms[-1]:.0f} ms; "
        f"longest wait of a client: {checker.longest_pause_ms:.0f} ms"
    )


class Reader:
    """Reads a snapshot device again and again, in pieces of any size, and compares every byte."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._choice = random.Random(3)
        self.progress = threading.Semaphore(0)
        self.failures: list[str] = []
        self.bytes_read = 0
        self.longest_pause_ms = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        new = self._device.images.new
        try:
            with NbdClient.connect(self._device.uri, WAIT_S) as client:
                at = 0
                while not self._done.is_set():
                    # Long enough to need the worker.
                    length = min(self._choice.choice([300_001, 1 << 20, 3 << 20]), len(new) - at)
                    buffer = bytearray(length)
                    before = time.monotonic()
                    client.read_into(buffer, at)
                    self.longest_pause_ms = max(self.longest_pause_ms, (time.monotonic() - before) * 1000)
                    if buffer != new[at : at + length]:
                        self.failures.append(f"wrong bytes in {length} at {at}")
                        return
                    self.bytes_read += length
                    at = (at + length) % len(new)
                    self.progress.release()
        except OSError as error:
            self.failures.append(str(error))

    def wait_for_two(self) -> None:
        """Until a request is over that had not begun when this was called."""
        while self.progress.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.progress.acquire(timeout=WAIT_S), self.failures


@pytest.mark.timeout(1800)
def test_snapshot_reads_survive_kills(images: Images) -> None:
    """DMU-148, DMU-185: whoever compares a whole snapshot device byte by byte sees the new image, and no error."""
    with Device(images) as device:
        device.start()
        began = time.monotonic()
        reader = Reader(device)
        killed = 0
        try:
            for _ in range(KILLS):
                worker = wait_for_worker(device, killed)
                reader.wait_for_two()
                killed = device.kill_worker()
                assert killed == worker
            wait_for_worker(device, killed)
            reader.wait_for_two()
        finally:
            reader.stop()
        assert reader.failures == []
        status = device.stats()
        assert (status["worker_restarts"], status["state"], status["errors"]) == (KILLS, "RUNNING", 0)
        print(
            f"{KILLS} kills in {time.monotonic() - began:.1f} s, {reader.bytes_read >> 20} MiB compared; "
            f"longest read: {reader.longest_pause_ms:.0f} ms"
        )


@pytest.mark.parametrize("stopped", [False, True], ids=["busy", "stopped"])
def test_everything_fails_at_once_without_a_successor(images: Images, stopped: bool) -> None:
    """DMU-99, DMU-103, DMU-170: under `fail_fast` each request in flight at a kill ends, and so does each later one."""
    times_ms: list[float] = []
    failed = 0
    for round_number in range(max(2, KILLS // 10)):
        choice = random.Random(round_number)
        with Device(images, "worker") as device:
            device.start(policy="fail_fast")
            with Peer(device.nbd_path, WAIT_S) as peer:
                peer.negotiate()
                assert peer.read(0, BLOCK) == images.old[:BLOCK]
                worker = int(device.status()["worker_pid"])
                if stopped:
                    os.kill(worker, signal.SIGSTOP)
                for _ in range(64):
                    offset = BLOCK * choice.randrange(BLOCKS - 64)
                    kind = choice.choice([Command.READ, Command.WRITE, Command.FLUSH, Command.WRITE_ZEROES])
                    length = 0 if kind == Command.FLUSH else 512 * choice.randint(1, 64)
                    payload = choice.randbytes(length) if kind == Command.WRITE else b""
                    where = (0, 0) if kind == Command.FLUSH else (offset, length)
                    assert peer.send(peer.ready(kind, *where, payload=payload))
                if stopped:
                    device.wait_for(lambda s: s["in_flight"] == 64)
                at = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                while peer.under_way:
                    # Bounded by the peer's own timeout: whoever hangs is found out.
                    reply = peer.reply()
                    times_ms.append((time.monotonic() - at) * 1000)
                    assert reply.error in ((errno.EIO,) if stopped else (0, errno.EIO))
                    failed += bool(reply.error)
                device.wait_for(lambda s: s["state"] == "FAILED")
                for kind, length in ((Command.READ, 512), (Command.WRITE, 512), (Command.FLUSH, 0)):
                    payload = bytes(length) if kind == Command.WRITE else b""
                    assert peer.call(kind, 0, length, payload=payload).error == errno.EIO
                status = device.status()
                assert (status["worker_pid"], status["worker_restarts"], status["in_flight_bytes"]) == (0, 0, 0)
                assert status["attach_state"] == "terminated"
            assert device.stop() == 0
    times_ms.sort()
    print(
        f"{len(times_ms)} requests in flight at a kill, {failed} of them failed; from kill to reply: "
        f"median {times_ms[len(times_ms) // 2]:.2f} ms, at most {times_ms[-1]:.2f} ms"
    )


def test_fio_fails_at_once_without_a_successor(images: Images) -> None:
    """DMU-99: a load that meets a dead worker ends with EIO instead of waiting."""
    with Device(images, "worker") as device:
        device.start(policy="fail_fast")
        fio = run_fio(device, 1, "--ioengine=nbd", f"--uri={device.uri}", "--time_based", "--runtime=3600")
        try:
            device.wait_for(lambda s: s["writes"] > 100, "stats")
            device.kill_worker()
            at = time.monotonic()
            output, _ = fio.communicate(timeout=WAIT_S)
            print(f"fio ended {(time.monotonic() - at) * 1000:.0f} ms after the kill")
        finally:
            fio.kill()
            fio.communicate()
        assert fio.returncode != 0
        assert "nput/output error" in output or "error 5" in output.lower() or "EIO" in output, output
        device.wait_for(lambda s: s["state"] == "FAILED" and s["in_flight_bytes"] == 0)

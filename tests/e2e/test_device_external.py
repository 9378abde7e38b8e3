"""A dm-user target whose daemon is somebody else's: plain sockets against a real device host, every timeout live.

The daemon of these tests is a thread that knows nothing of this project but the bytes of a message.
"""

import contextlib
import errno
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from devicerig import BLOCK, SIZE, WAIT_S, Device, Images
from nbdpeer import Peer

from snapd.device.nbd import Command, CommandFlag

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = Command
FUA = CommandFlag.FUA
HEADER = struct.Struct("<QQQQQ")
PREFLUSH_SYNC, FUA_FLAG, NOUNMAP = 0x408, 0x200, 0x8000
NEVER_MS = 3_600_000
EIO = errno.EIO


class Daemon:
    """Serves `image` on a connection of its own, as long as `holds` is not set; a context manager.

    `seen` is what came: (seq, type, flags, sector, length).
    """

    def __init__(self, device: Device, image: bytearray, *, holds: bool = False) -> None:
        self.seen: list[tuple[int, int, int, int, int]] = []
        self.hung_up = threading.Event()
        self.answered = 0
        self._image = image
        self._holds = holds
        self._released = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(device.daemon_path)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._socket.close()

    def release(self) -> None:
        """Answer what was held, and all that comes."""
        self._released.set()

    def die(self) -> None:
        """Hang up with whatever is unanswered."""
        self._holds, self._image = True, bytearray()
        self._released.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def send(self, raw: bytes) -> None:
        """Say something, sense or nonsense."""
        self._socket.sendall(raw)

    def _run(self) -> None:
        try:
            while (header := self._receive(HEADER.size)) is not None:
                seq, kind, flags, sector, length = HEADER.unpack(header)
                payload = self._receive(length) if kind == WRITE else b""
                if payload is None:
                    break
                self.seen.append((seq, kind, flags, sector, length))
                if self._holds and not self._released.wait(WAIT_S):
                    break
                self._serve(seq, kind, sector * 512, length, payload)
                self.answered += 1
        except OSError:
            pass
        self.hung_up.set()

    def _serve(self, seq: int, kind: int, start: int, length: int, payload: bytes) -> None:
        if not self._image:
            raise BrokenPipeError
        data = b""
        if kind == 0:
            data = bytes(self._image[start : start + length])
        elif kind == 1 and length:
            self._image[start : start + length] = payload
        elif kind in (3, 6):
            self._image[start : start + length] = bytes(length)
        # In two pieces, as a stream may have it.
        raw = HEADER.pack(seq, 0, 0, 0, 0) + data
        self._socket.sendall(raw[:17])
        self._socket.sendall(raw[17:])

    def _receive(self, length: int) -> bytes | None:
        received = bytearray()
        while len(received) < length:
            got = self._socket.recv(length - len(received))
            if not got:
                return None
            received += got
        return bytes(received)


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(seed=53)


@pytest.fixture
def device(images: Images) -> Iterator[Device]:
    """Not started."""
    with Device(images, "external") as device:
        yield device


@pytest.fixture
def image(images: Images) -> bytearray:
    return bytearray(images.old)


@pytest.fixture
def peer(device: Device) -> Iterator[Peer]:
    """Connected, and negotiated when the host serves."""
    with Peer(device.nbd_path, WAIT_S) as peer:
        yield peer


def test_everything_a_daemon_can_do(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-5, DMU-16, DMU-24, DMU-154: reads, writes, flush, discard and zeroes as plain messages with payload."""
    device.start()
    peer.negotiate()
    with Daemon(device, image) as daemon:
        choice = random.Random(2)
        assert peer.read(0, SIZE) == image
        assert max(length for *_, length in daemon.seen) <= 1 << 20
        copy = bytearray(image)
        for _ in range(40):
            length = 512 * choice.choice([1, 8, 100, 4096])
            offset = 512 * choice.randrange((SIZE - length) // 512)
            payload = choice.randbytes(length)
            assert not peer.call(WRITE, offset, length, payload=payload).error
            copy[offset : offset + length] = payload
            assert peer.read(offset, length) == payload
        daemon.seen.clear()
        assert not peer.call(WRITE, 512, 512, flags=FUA, payload=bytes(512)).error
        assert not peer.call(FLUSH).error
        assert not peer.call(TRIM, BLOCK, BLOCK).error
        assert not peer.call(WRITE_ZEROES, 2 * BLOCK, BLOCK).error
        assert not peer.call(WRITE_ZEROES, 3 * BLOCK, BLOCK, flags=CommandFlag.NO_HOLE).error
        assert [rest for _, *rest in daemon.seen] == [
            [1, FUA_FLAG, 1, 512],
            [1, PREFLUSH_SYNC, 0, 0],
            [3, 0, 8, BLOCK],
            [6, 0, 16, BLOCK],
            [6, NOUNMAP, 24, BLOCK],
        ]
        seqs = [seq for seq, *_ in daemon.seen]
        assert seqs == list(range(seqs[0], seqs[0] + 5))
        for start in (512, BLOCK, 2 * BLOCK, 3 * BLOCK):
            copy[start : start + (512 if start == 512 else BLOCK)] = bytes(512 if start == 512 else BLOCK)
        assert image == copy
        status = device.status()
        assert (status["attach_state"], status["state"], status["worker_pid"]) == ("attached", "RUNNING", 0)


def test_requests_wait_for_the_first_daemon(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-91, DMU-93: what comes before the first attach is queued, and served then."""
    device.start(attach_timeout_ms=NEVER_MS)
    peer.negotiate()
    assert peer.send(*(peer.ready(READ, i * BLOCK, BLOCK) for i in range(10)))
    status = device.wait_for(lambda s: s["queued"] == 10)
    assert (status["attach_state"], status["in_flight"]) == ("never", 0)
    with Daemon(device, image):
        for reply in peer.replies():
            assert (reply.error, reply.data) == (0, image[reply.offset : reply.offset + BLOCK])


@pytest.mark.parametrize("timeout_ms", [0, 300])
def test_attach_timeout(device: Device, peer: Peer, timeout_ms: int) -> None:
    """DMU-92, DMU-109: nobody comes in time: EIO, for reads and writes alike, and again for later ones."""
    device.start(attach_timeout_ms=timeout_ms)
    peer.negotiate()
    for _ in range(2):
        assert peer.call(READ, 0, BLOCK).error == EIO
        assert peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error == EIO
        assert peer.call(FLUSH).error == EIO
    status = device.status()
    assert (status["attach_state"], status["queued"], status["in_flight_bytes"]) == ("never", 0, 0)


def test_attach_timeout_changed_at_run_time(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-108: a changed timeout holds for what comes from now on; what is queued keeps its own."""
    device.start(attach_timeout_ms=NEVER_MS)
    peer.negotiate()
    assert peer.send(peer.ready(READ, 0, BLOCK))
    device.wait_for(lambda s: s["queued"] == 1)
    assert device.call({"verb": "set", "attach_timeout_ms": 50})[0]["ok"]
    assert device.status()["attach_timeout_ms"] == 50
    with Peer(device.nbd_path, WAIT_S) as other:
        assert other.negotiate().call(READ, 0, BLOCK).error == EIO
    assert device.status()["queued"] == 1
    with Daemon(device, image):
        assert peer.reply().data == image[:BLOCK]
        assert list(peer.under_way) == []


def test_probe_changes_nothing(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-119: who connects and reads nothing is no daemon; the queue waits on."""
    device.start(attach_timeout_ms=NEVER_MS)
    peer.negotiate()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(device.daemon_path)
    # The host sees it come in one round and go in the next.
    for _ in range(3):
        device.status()
    assert peer.send(peer.ready(READ, 0, BLOCK))
    device.wait_for(lambda s: s["queued"] == 1 and s["attach_state"] == "never")
    with Daemon(device, image):
        assert peer.reply().data == image[:BLOCK]


def test_two_daemons_share_the_work(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-42 to DMU-46, DMU-139: each message goes to one of them, and both get some."""
    device.start()
    peer.negotiate()
    with Daemon(device, image) as one, Daemon(device, image) as other:
        for i in range(50):
            assert peer.read(i * BLOCK, BLOCK) == image[i * BLOCK : (i + 1) * BLOCK]
        seqs = sorted(seq for daemon in (one, other) for seq, *_ in daemon.seen)
        assert seqs == list(range(50))
        assert one.answered
        assert other.answered


@pytest.mark.parametrize("policy", ["restart", "fail_fast"])
def test_one_of_two_daemons_dies(device: Device, peer: Peer, image: bytearray, policy: str) -> None:
    """DMU-97, DMU-98: what it had read is the other's under a grace, and fails without one; the rest goes on."""
    device.start(policy=policy)
    peer.negotiate()
    with Daemon(device, image) as good:
        assert peer.read(0, BLOCK) == image[:BLOCK]
        with Daemon(device, image, holds=True) as bad:
            sent = 0
            while not bad.seen:
                assert peer.send(peer.ready(READ, sent * 512, 512))
                sent += 1
                # One at a time, until it is the other's turn; the first one has answered a read already.
                device.wait_for(lambda _status, sent=sent: good.answered + len(bad.seen) > sent)  # type: ignore[misc]
        replies = peer.replies()
        failed = [reply for reply in replies if reply.error]
        assert len(failed) == (policy == "fail_fast")
        for reply in replies:
            assert reply.error == EIO or reply.data == image[reply.offset : reply.offset + 512]
        assert peer.read(0, BLOCK) == image[:BLOCK]
        assert device.status()["attach_state"] == "attached"


def test_next_daemon_sees_it_again(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-148: read but not answered: put back in the order of the numbers, payload kept; newer ones wait."""
    device.start(restart_grace_ms=NEVER_MS, request_timeout_ms=0)
    peer.negotiate()
    with Daemon(device, image, holds=True) as first:
        payloads = [bytes([i]) * BLOCK for i in range(6)]
        for i, payload in enumerate(payloads):
            assert peer.send(peer.ready(WRITE, i * BLOCK, BLOCK, payload=payload))
        assert peer.send(peer.ready(FLUSH), peer.ready(READ, SIZE - BLOCK, BLOCK))
        device.wait_for(lambda s: s["in_flight"] == 8)
    assert len(first.seen) == 1
    status = device.wait_for(lambda s: s["queued"] == 8)
    assert (status["attach_state"], status["state"]) == ("terminated", "RESTARTING")
    assert peer.send(peer.ready(WRITE, 6 * BLOCK, BLOCK, payload=b"6" * BLOCK))
    device.wait_for(lambda s: s["queued"] == 9)
    with Daemon(device, image) as second:
        assert {reply.error for reply in peer.replies()} == {0}
        assert second.seen[0] == first.seen[0]
        assert [seq for seq, *_ in second.seen] == list(range(9))
    assert image[: 7 * BLOCK] == b"".join(payloads) + b"6" * BLOCK


def test_grace_has_an_end(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-148, DMU-103, DMU-104: nobody came: EIO; later ones fail at once; who comes late serves all the same."""
    device.start(restart_grace_ms=300, attach_timeout_ms=NEVER_MS)
    peer.negotiate()
    with Daemon(device, image, holds=True) as daemon:
        assert peer.send(*(peer.ready(READ, i * BLOCK, BLOCK) for i in range(5)))
        device.wait_for(lambda s: s["in_flight"] == 5 and len(daemon.seen) == 1)
    assert {reply.error for reply in peer.replies()} == {EIO}
    assert peer.call(WRITE, 0, BLOCK, payload=bytes(BLOCK)).error == EIO
    with Daemon(device, image):
        assert peer.read(0, BLOCK) == image[:BLOCK]


def test_fail_fast(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-99, DMU-103, DMU-104: in flight and new ones fail at once, until another daemon attaches."""
    device.start(policy="fail_fast", attach_timeout_ms=NEVER_MS, restart_grace_ms=NEVER_MS)
    peer.negotiate()
    with Daemon(device, image, holds=True):
        kinds = [peer.ready(READ, 0, BLOCK), peer.ready(WRITE, 0, BLOCK, payload=bytes(BLOCK)), peer.ready(FLUSH)]
        assert peer.send(*kinds)
        device.wait_for(lambda s: s["in_flight"] == 3)
    assert [reply.error for reply in peer.replies()] == [EIO] * 3
    assert peer.call(READ, 0, BLOCK).error == EIO
    assert device.status()["attach_state"] == "terminated"
    with Daemon(device, image):
        assert peer.read(0, BLOCK) == image[:BLOCK]
    assert peer.call(READ, 0, BLOCK).error == EIO


def test_stuck_daemon_is_cut_off(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-96, DMU-184: it keeps a request for too long, so it loses the connection, and another gets the request."""
    device.start(request_timeout_ms=300)
    peer.negotiate()
    with Daemon(device, image, holds=True) as stuck:
        assert peer.send(peer.ready(READ, 0, BLOCK))
        device.wait_for(lambda s: s["queued"] == 1 and s["attach_state"] == "terminated")
        stuck.release()
        assert stuck.hung_up.wait(WAIT_S)
        with Daemon(device, image):
            assert peer.reply().data == image[:BLOCK]


def test_patience_without_a_timeout(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-96: under `fail_fast` a daemon may think as long as it likes; `request_timeout_ms` does not count."""
    device.start(policy="fail_fast", request_timeout_ms=1)
    peer.negotiate()
    with Daemon(device, image, holds=True) as slow:
        assert peer.send(peer.ready(READ, 0, BLOCK))
        device.wait_for(lambda s: s["in_flight"] == 1)
        # So many rounds of the host later it is still there.
        for _ in range(200):
            assert device.status()["in_flight"] == 1
        slow.release()
        assert peer.reply().data == image[:BLOCK]


@pytest.mark.parametrize(
    "said",
    [
        HEADER.pack(77, 0, 0, 0, 0),
        HEADER.pack((1 << 64) - 1, 1, 0, 0, 0),
        b"GET / HTTP/1.1\r\nHost: localhost.example\r\n",
    ],
    ids=["unknown number", "huge number", "another protocol"],
)
def test_nonsense_poisons(device: Device, peer: Peer, image: bytearray, said: bytes) -> None:
    """DMU-69, DMU-156: an answer nobody asked for ends that connection; the request goes to the next daemon."""
    device.start()
    peer.negotiate()
    with Daemon(device, image, holds=True) as bad:
        assert peer.send(peer.ready(READ, 0, BLOCK))
        device.wait_for(lambda s: s["in_flight"] == 1)
        bad.send(said)
        device.wait_for(lambda s: s["queued"] == 1)
        with Daemon(device, image):
            assert peer.reply().data == image[:BLOCK]


@pytest.mark.parametrize("code", [1, 2, 3, 1 << 63])
def test_errors_of_a_daemon(device: Device, peer: Peer, image: bytearray, code: int) -> None:
    """DMU-64 to DMU-67: ERROR and unknown codes are EIO, UNSUPPORTED says so; no data follows."""
    device.start()
    peer.negotiate()
    with Daemon(device, image, holds=True) as daemon:
        assert peer.send(peer.ready(READ, 0, BLOCK))
        device.wait_for(lambda s: s["in_flight"] == 1 and len(daemon.seen) == 1)
        daemon.send(HEADER.pack(daemon.seen[0][0], code, 9, 9, 9))
        assert peer.reply().error == (errno.ENOTSUP if code == 2 else EIO)


def test_stop_ends_the_stream(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-155: when the device goes, a daemon reads the end of the stream."""
    device.start()
    peer.negotiate()
    with Daemon(device, image) as daemon:
        assert peer.read(0, BLOCK) == image[:BLOCK]
        assert device.stop() == 0
        assert daemon.hung_up.wait(WAIT_S)
        assert peer.rest() == b""


def test_daemon_survives_the_host(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-151: the next host listens on the same socket; whoever connects again serves again."""
    device.start()
    peer.negotiate()
    with Daemon(device, image) as daemon:
        assert peer.read(0, BLOCK) == image[:BLOCK]
        device.kill_host()
        assert daemon.hung_up.wait(WAIT_S)
    # Before the next host comes: it waits in the backlog.
    with Daemon(device, image), Peer(device.nbd_path, WAIT_S) as again:
        device.start()
        assert again.negotiate().read(0, SIZE) == image


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused(device: Device, peer: Peer, image: bytearray) -> None:
    """DMU-188: whatever the mode of the socket, who connects is looked at; another user answers nothing."""
    os.chmod(device.directory, 0o755)
    os.chmod(device.daemon_path, 0o666)
    device.start(attach_timeout_ms=NEVER_MS)
    peer.negotiate()
    assert peer.send(peer.ready(READ, 0, BLOCK))
    script = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.settimeout(30);"
        "s.connect(sys.argv[1]); print(s.recv(40))"
    )
    # No arguments of ours: only what this user may import.
    said = subprocess.run(
        [sys.executable, "-I", "-c", script, device.daemon_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip() == "b''"
    assert device.status()["attach_state"] == "never"
    with Daemon(device, image):
        assert peer.reply().data == image[:BLOCK]

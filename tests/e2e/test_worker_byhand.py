"""`python -m snapd.worker` on a unix socket: what it refuses, what it locks, and how it ends."""

import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from workerimages import WorkerImages
from workerprocess import WorkerProcess, worker_process

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.block.lock import open_locked
from snapd.cow.claim import claim, claim_path, release
from snapd.dmuser.message import HEADER_BYTES, Answer, Flag, Request

BLOCKS = 1200
_ANSWER = struct.Struct("<QQ24x")


@pytest.fixture
def images(tmp_path: Path) -> WorkerImages:
    return WorkerImages(tmp_path, 1, blocks=BLOCKS, digests=True)


class Target:
    """A listening socket in the place of a target."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "channel")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(60)
        self.listener.bind(self.path)
        self.listener.listen()
        self._connections: list[socket.socket] = []

    def accept(self) -> "Connection":
        """The next connection of a worker."""
        connection, _ = self.listener.accept()
        connection.settimeout(60)
        self._connections.append(connection)
        return Connection(connection)

    def close(self) -> None:
        for opened in (self.listener, *self._connections):
            opened.close()


class Connection:
    """One channel."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def receive(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length and (more := self.socket.recv(length - len(content))):
            content += more
        return bytes(content)

    def answer(self) -> tuple[int, int]:
        seq, code = _ANSWER.unpack(self.receive(HEADER_BYTES))
        return seq, code

    def read(self, sector: int, length: int) -> bytes:
        self.socket.sendall(Request(1, BioOp.READ, 0, sector, length).pack())
        assert self.answer() == (1, Answer.SUCCESS)
        return self.receive(length)


@pytest.fixture
def target() -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="snapd-", dir="/tmp") as directory:
        target = Target(directory)
        yield target
        target.close()


def refused(*arguments: object, status: int = 1) -> str:
    """The last line that a worker says which does not start; without a traceback."""
    worker = WorkerProcess(*arguments)
    found, said = worker.finish()
    assert found == status, said
    assert "Traceback" not in said
    if status == 1:
        assert len(said.splitlines()) == 1
    return said.splitlines()[-1]


def test_an_image(images: WorkerImages, target: Target) -> None:
    """DMU-154, DMU-158: reads of any sectors over a connection; the end of the stream is a clean end."""
    with worker_process("--channel", target.path, "--base", images.base, "--cow", images.cow) as worker:
        channel = target.accept()
        for sector, length in [(0, 4096), (3, 512), (5, 1536), (9, 1 << 20), (0, len(images.new))]:
            assert channel.read(sector, length) == images.new[sector * 512 : sector * 512 + length]
        channel.socket.close()
        assert worker.finish() == (0, "")


def test_threads_have_connections(images: WorkerImages, target: Target) -> None:
    """DMU-173: as many channels as threads, all served; when one ends, all do."""
    arguments = ("--channel", target.path, "--base", images.base, "--cow", images.cow, "--threads", 3)
    with worker_process(*arguments) as worker:
        channels = [target.accept() for _ in range(3)]
        for _ in range(20):
            for i, channel in enumerate(channels):
                channel.socket.sendall(Request(7, BioOp.READ, 0, 80 * i, 65536).pack())
            for i, channel in enumerate(channels):
                assert channel.answer() == (7, Answer.SUCCESS)
                assert channel.receive(65536) == images.new[40960 * i : 40960 * i + 65536]
        channels[1].socket.close()
        assert worker.finish() == (0, "")
        assert [channels[i].receive(1) for i in (0, 2)] == [b"", b""]


def test_sigterm_answers_what_has_come(images: WorkerImages, target: Target) -> None:
    """DMU-189: nothing that was sent before is left unanswered."""
    with worker_process("--channel", target.path, "--base", images.base, "--cow", images.cow) as worker:
        channel = target.accept()
        assert channel.read(0, 512) == images.new[:512]
        numbers = range(100)
        channel.socket.sendall(b"".join(Request(seq, BioOp.READ, 0, 8 * seq, 4096).pack() for seq in numbers))
        worker.signal(signal.SIGTERM)
        for seq in numbers:
            assert channel.answer() == (seq, Answer.SUCCESS)
            assert channel.receive(4096) == images.new[4096 * seq : 4096 * seq + 4096]
        assert channel.receive(1) == b""
        assert worker.finish() == (0, "")


def test_a_store_is_locked_and_written(images: WorkerImages, target: Target) -> None:
    """Design 2.1: one writer, and nobody else beside it; what was flushed is in the file."""
    with worker_process("--channel", target.path, "--base", images.base) as worker:
        channel = target.accept()
        for writable in (False, True):
            with pytest.raises(SnapdError) as busy:
                open_locked(images.base, writable=writable)
            assert busy.value.errno == errno.EBUSY
        write = Request(3, BioOp.WRITE, int(Flag.FUA), 1, 1024)
        channel.socket.sendall(write.pack() + b"\x07" * 1024)
        assert channel.answer() == (3, Answer.SUCCESS)
        worker.kill()
    assert images.base.read_bytes() == images.old[:512] + b"\x07" * 1024 + images.old[1536:]
    os.close(open_locked(images.base))


def test_a_store_read_only(images: WorkerImages, target: Target) -> None:
    """`--read-only`: others may read too, and writes are refused."""
    with worker_process("--channel", target.path, "--base", images.base, "--read-only") as worker:
        channel = target.accept()
        os.close(open_locked(images.base, writable=False))
        channel.socket.sendall(Request(3, BioOp.WRITE, 0, 1, 512).pack() + bytes(512))
        assert channel.answer() == (3, Answer.ERROR)
        assert channel.read(1 << 3, 512) == images.old[4096:4608]
        channel.socket.close()
        assert worker.finish()[0] == 0
    assert images.base.read_bytes() == images.old


def test_an_image_is_locked(images: WorkerImages, target: Target) -> None:
    """Design 2.1: the locks of the offline verbs: readers beside it, no writer of base or COW."""
    with worker_process("--channel", target.path, "--base", images.base, "--cow", images.cow):
        target.accept()
        for path in (images.base, images.cow):
            os.close(open_locked(path, writable=False))
            with pytest.raises(SnapdError) as busy:
                open_locked(path)
            assert busy.value.errno == errno.EBUSY


@pytest.mark.parametrize("taken", ["base", "cow"])
def test_files_in_use(images: WorkerImages, target: Target, taken: str) -> None:
    """Design 2.1: EBUSY, in one line that names the file."""
    path = getattr(images, taken)
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    said = refused("--channel", target.path, "--base", images.base, "--cow", images.cow)
    assert said.endswith(f"{path}: in use, somebody else holds its lock")
    os.close(fd)


def test_a_cow_that_somebody_merges(images: WorkerImages, target: Target) -> None:
    """UNDO-28: from the first base write on, base and COW alone give a wrong image."""
    snapshot = uuid.UUID(int=5)
    claim(images.cow, snapshot, "/somewhere")
    arguments = ("--channel", target.path, "--base", images.base, "--cow", images.cow)
    assert "a service has begun to merge it" in refused(*arguments)
    release(images.cow, snapshot)
    os.mkdir(claim_path(images.cow))
    assert "an offline merge of it has begun" in refused(*arguments)


def test_damage(images: WorkerImages, target: Target) -> None:
    """A COW or a table that is not whole is refused at the start, in one line."""
    table = Path(f"{images.cow}.digests")
    whole = table.read_bytes()
    table.write_bytes(whole[:100] + b"\xff" + whole[101:])
    arguments = ("--channel", target.path, "--base", images.base, "--cow", images.cow)
    assert "digests table" in refused(*arguments)
    table.unlink()
    images.cow.write_bytes(b"\0" * 4096)
    assert refused(*arguments).startswith("ota-snapd worker: ")


def test_what_is_no_channel(images: WorkerImages, target: Target, tmp_path: Path) -> None:
    """DMU-165: neither read from nor written to, whatever it is."""
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(4096))
    for path in (plain, tmp_path, "/dev/null", "/dev/zero"):
        said = refused("--channel", path, "--base", images.base)
        assert said.endswith(f"{path}: neither a unix socket nor a dm-user node")
    assert plain.read_bytes() == bytes(4096)
    assert "No such file" in refused("--channel", tmp_path / "none", "--base", images.base)
    target.listener.close()
    assert "refused" in refused("--channel", target.path, "--base", images.base)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--base is missing"),
        (("--base", "x"), "one channel is needed"),
        (("--channel", "x"), "--base is missing"),
        (("--channel", "x", "--base", "x", "--threads", "0"), "0 threads: expected 1 to 64"),
        (("--channel", "x", "--base", "x", "--threads", "65"), "65 threads: expected 1 to 64"),
        (("--channel", "x", "--base", "x", "--inherited", "base"), "cannot go with --inherited"),
        (("--inherited", "channel,base,wrong"), "expected base, and others of arena"),
        (("--inherited", "channel"), "expected base, and others of arena"),
        (("--inherited", "channel,base,cow"), "cow and extent_map go together"),
        (("--inherited", "channel,base,cow,extent_map,shared_map"), "shared_map and undo_directory go together"),
        (("--inherited", "channel,base", "--channel", "x"), "one channel is needed"),
        (("--inherited", "arena,base", "--channel", "x"), "an arena belongs to an inherited channel"),
        (("--inherited", "channel,base", "--threads", "2"), "an inherited channel has one thread"),
    ],
)
def test_command_lines(arguments: tuple[str, ...], complaint: str) -> None:
    """Status 2, and what does not fit."""
    assert complaint in refused(*arguments, status=2)


def test_a_serving_worker_has_not_kept_numpy(images: WorkerImages, target: Target) -> None:
    """Parsing takes numpy, serving does not: it is gone from the process that serves."""
    with worker_process("--channel", target.path, "--base", images.base, "--cow", images.cow) as worker:
        channel = target.accept()
        kept = next(first for kind, first, _ in images.runs if kind == "packed")
        assert channel.read(kept * 8, 4096) == images.new[kept * 4096 : kept * 4096 + 4096]
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "zstandard" in maps
        assert "numpy" not in maps


def test_help_names_both_ways() -> None:
    """The command explains itself."""
    shown = subprocess.run(
        [sys.executable, "-m", "snapd.worker", "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "--channel PATH --base IMAGE [--cow COW]" in shown
    assert "--inherited NAME,NAME" in shown

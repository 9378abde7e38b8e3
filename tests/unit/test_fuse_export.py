"""The FUSE export over a packet socket: one packet a request, one an answer, as `/dev/fuse` has them."""

import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.device.datapath import DataPath
from snapd.device.fuse import NOTIFY_RESEND, Opcode
from snapd.device.fuseexport import MAX_REQUESTS, FuseExport
from snapd.device.loop import Loop
from snapd.device.routes import WholeRoute
from snapd.device.slowio import SlowIo
from snapd.device.traffic import Traffic
from snapd.dmuser.arena import create_arena, map_arena
from snapd.dmuser.target import ATTACH_TIMEOUT_MS, Target
from snapd.proc.log import Log

SIZE = 4 << 20
IMAGE = 2
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


class GatedStore(FileStore):
    """A store whose flushes wait, and that fails on demand."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.gate = threading.Event()
        self.gate.set()
        self.flushes = 0
        self.fails_with = 0

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        if self.fails_with:
            raise SnapdError(self.fails_with, "asked to")
        super().write(data, offset)

    def flush(self) -> None:
        assert self.gate.wait(30)
        self.flushes += 1
        super().flush()


class Rig:
    """A device over a file, its export, and the kernel's end of the descriptor."""

    def __init__(self, image: Path, *, read_only: bool = False, with_target: bool = False) -> None:
        self.content = Random(3).randbytes(SIZE)
        image.write_bytes(self.content)
        self.store = GatedStore(os.open(image, os.O_RDWR))
        self.kernel, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.loop = Loop()
        self.clock = ManualClock()
        self.traffic = Traffic()
        self.target = Target(self.clock)
        arena_fd = create_arena()
        self.path = DataPath(
            size_bytes=SIZE,
            read_only=read_only,
            routes=WholeRoute(is_local=not with_target),
            memory=map_arena(arena_fd),
            shares_memory=with_target,
            target=self.target if with_target else None,
            store=None if with_target else self.store,
            slow=SlowIo(self.loop),
        )
        os.close(arena_fd)
        self._last_unique = 0
        self.export = self.take_over()

    def take_over(self, fd: int | None = None) -> FuseExport:
        """Another export, by default on the same descriptor, as after a restart."""
        fd = self.ours.fileno() if fd is None else fd
        log = Log("test", self.clock)
        self.export = FuseExport(self.loop, fd, self.path, traffic=self.traffic, clock=self.clock, log=log)
        return self.export

    def close(self) -> None:
        self.store.gate.set()
        self.export.close()
        for end in (self.kernel, self.ours):
            end.close()
        os.close(self.store.fd)

    def send(self, opcode: int, body: bytes, node: int = IMAGE) -> int:
        """Ask; returns the request's number."""
        self._last_unique += 2
        unique = self._last_unique
        self.kernel.send(struct.pack("=IIQQ16x", 40 + len(body), opcode, unique, node) + body)
        return unique

    def receive(self) -> tuple[int, int, bytes]:
        """Run the loop until there is an answer: its number, errno and payload."""
        for _ in range(100):
            self.turn()
            with contextlib.suppress(BlockingIOError):
                packet = self.kernel.recv(2 << 20)
                length, number, unique = struct.unpack_from("=IiQ", packet)
                assert length == len(packet)
                return unique, -number, packet[16:]
        raise AssertionError("no answer")

    def turn(self, timeout_ms: int = 50) -> None:
        """One round of the host's loop."""
        self.path.submit_waiting()
        self.path.read_local()
        self.path.read_cold()
        self.path.serve_room_waiters()
        self.loop.run_once(timeout_ms)
        self.path.read_local()
        self.path.read_cold()

    def ask(self, opcode: int, body: bytes, node: int = IMAGE) -> tuple[int, bytes]:
        unique = self.send(opcode, body, node)
        answered, number, payload = self.receive()
        assert answered == unique
        return number, payload

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        return self.ask(Opcode.READ, io(offset, length))

    def write(self, offset: int, data: bytes, flags: int = 0) -> tuple[int, bytes]:
        return self.ask(Opcode.WRITE, io(offset, len(data), flags) + data)

    def stored(self, offset: int, length: int) -> bytes:
        return os.pread(self.store.fd, length, offset)


def io(offset: int, length: int, flags: int = 0) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, length, 0, 0, flags, 0)


def fallocate(mode: int, offset: int, length: int) -> bytes:
    return struct.pack("=QQQII", 0, offset, length, mode, 0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "image")
    assert rig.kernel.recv(100) == NOTIFY_RESEND
    yield rig
    rig.close()


@pytest.fixture
def read_only_rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "image", read_only=True)
    assert rig.kernel.recv(100) == NOTIFY_RESEND
    yield rig
    rig.close()


def test_asks_again_before_it_reads(rig: Rig) -> None:
    """A successor first has everything sent again; what was there before it came is untouched until then."""
    unique = rig.send(Opcode.READ, io(0, 4096))
    rig.export.close()
    rig.take_over()
    assert rig.kernel.recv(100) == NOTIFY_RESEND
    assert rig.export.in_flight == 0
    assert rig.receive() == (unique, 0, rig.content[:4096])


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (4096, 4096), (512, 100 * 512), (SIZE - 512, 512)])
def test_read(rig: Rig, read_only_rig: Rig, offset: int, length: int) -> None:
    assert rig.read(offset, length) == (0, rig.content[offset : offset + length])
    assert read_only_rig.read(offset, length) == (0, rig.content[offset : offset + length])


def test_reads_end_with_the_device(rig: Rig) -> None:
    assert rig.read(SIZE - 4096, 65536) == (0, rig.content[-4096:])
    assert rig.read(SIZE, 4096) == (0, b"")
    assert rig.read(SIZE + 4096, 4096) == (0, b"")


def test_reads_of_part_sectors_are_refused(rig: Rig) -> None:
    """Direct I/O: whole sectors, as on any block device."""
    assert rig.read(100, 512) == (errno.EINVAL, b"")
    assert rig.read(0, 100) == (errno.EINVAL, b"")
    assert rig.read(0, (1 << 20) + 512) == (errno.EINVAL, b"")


def test_write(rig: Rig) -> None:
    data = Random(4).randbytes(65536)
    assert rig.write(8192, data) == (0, struct.pack("=II", 65536, 0))
    assert rig.stored(8192, 65536) == data
    assert rig.stored(0, 8192) == rig.content[:8192]
    assert rig.store.flushes == 0


def test_synchronous_write_is_flushed(rig: Rig) -> None:
    """It is not answered before it is durable."""
    assert rig.write(0, bytes(512), os.O_DSYNC) == (0, struct.pack("=II", 512, 0))
    assert rig.store.flushes == 1


def test_bad_writes_change_nothing(rig: Rig) -> None:
    assert rig.write(SIZE - 512, bytes(1024)) == (errno.ENOSPC, b"")
    assert rig.write(1 << 63, bytes(512)) == (errno.ENOSPC, b"")
    assert rig.write(100, bytes(512)) == (errno.EINVAL, b"")
    assert rig.write(0, bytes(100)) == (errno.EINVAL, b"")
    assert rig.write(0, b"") == (errno.EINVAL, b"")
    assert rig.stored(0, SIZE + 512) == rig.content
    assert rig.export.in_flight == 0


def test_error_of_the_store(rig: Rig) -> None:
    """Its errno, for this request alone."""
    rig.store.fails_with = errno.ENOSPC
    assert rig.write(0, bytes(512)) == (errno.ENOSPC, b"")
    rig.store.fails_with = 0
    assert rig.write(0, bytes(512))[0] == 0
    assert rig.traffic.to_dict()["errors"] == 1


def test_read_only_device(read_only_rig: Rig) -> None:
    """Nobody can open it for writing; whoever tries otherwise changes nothing."""
    rig = read_only_rig
    assert rig.ask(Opcode.OPEN, struct.pack("=II", os.O_RDWR, 0)) == (errno.EROFS, b"")
    assert rig.write(0, bytes(512)) == (errno.EROFS, b"")
    assert rig.ask(Opcode.FALLOCATE, fallocate(PUNCH_HOLE | KEEP_SIZE, 0, 4096)) == (errno.EROFS, b"")
    assert rig.ask(Opcode.FSYNC, bytes(16)) == (0, b"")
    assert rig.stored(0, SIZE) == rig.content
    assert rig.store.flushes == 0


def test_flush(rig: Rig) -> None:
    assert rig.ask(Opcode.FSYNC, bytes(16)) == (0, b"")
    assert rig.store.flushes == 1


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_holes_and_zero_ranges_read_as_zeros(rig: Rig, mode: int) -> None:
    """BOW-130: a loop device sends the same for a discard and for zeroing, so the stronger of both is done."""
    assert rig.ask(Opcode.FALLOCATE, fallocate(mode, 8192, 65536)) == (0, b"")
    assert rig.stored(0, SIZE + 1) == rig.content[:8192] + bytes(65536) + rig.content[8192 + 65536 :]


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (fallocate(0, 0, 4096), errno.EOPNOTSUPP),
        (fallocate(COLLAPSE, 0, 4096), errno.EOPNOTSUPP),
        (fallocate(PUNCH_HOLE, 0, 4096), errno.EOPNOTSUPP),
        (fallocate(ZERO_RANGE, 0, SIZE + 4096), errno.ENOSPC),
        (fallocate(ZERO_RANGE, 100, 4096), errno.EINVAL),
        (fallocate(ZERO_RANGE, 0, 0), errno.EINVAL),
    ],
)
def test_bad_fallocates_change_nothing(rig: Rig, body: bytes, number: int) -> None:
    assert rig.ask(Opcode.FALLOCATE, body) == (number, b"")
    assert rig.stored(0, SIZE + 1) == rig.content


def test_names_longer_than_the_head(rig: Rig) -> None:
    """They go on where a payload would be."""
    assert rig.ask(Opcode.LOOKUP, b"i" * 255 + b"\0", 1) == (errno.ENOENT, b"")
    assert rig.ask(Opcode.LOOKUP, b"image\0", 1)[0] == 0


def test_many_at_once(rig: Rig) -> None:
    """Answers come in any order, each to its own request."""
    wanted = {}
    for number in range(100):
        offset = Random(number).randrange(SIZE // 512) * 512
        wanted[rig.send(Opcode.READ, io(offset, 512))] = rig.content[offset : offset + 512]
    for _ in range(100):
        unique, number, payload = rig.receive()
        assert number == 0
        assert payload == wanted.pop(unique)
    assert rig.export.in_flight == 0
    assert rig.export.in_flight_bytes == 0
    assert rig.traffic.to_dict()["reads"] == 100
    assert rig.traffic.to_dict()["read_bytes"] == 100 * 512


def test_number_in_flight_is_bounded(rig: Rig) -> None:
    """Beyond it the descriptor is not read, until something has been answered."""
    rig.store.gate.clear()
    sent = []
    for number in range(MAX_REQUESTS + 20):
        sent.append(rig.send(Opcode.FSYNC, bytes(16)))
        if number % 50 == 0:
            rig.turn()
    for _ in range(10):
        rig.turn(0)
    assert rig.export.in_flight == MAX_REQUESTS
    rig.store.gate.set()
    assert [rig.receive()[0] for _ in sent] == sent
    assert rig.export.in_flight == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_waits_for_room(tmp_path: Path, read_only: bool) -> None:
    """A request for which the arena has no room is answered when there is some."""
    rig = Rig(tmp_path / "image", read_only=read_only)
    assert rig.kernel.recv(100) == NOTIFY_RESEND
    taken = [rig.path.local.allocate(1 << 20) for _ in range(4)]
    assert rig.path.local.room() == 0
    first, second = rig.send(Opcode.READ, io(0, 4096)), rig.send(Opcode.READ, io(4096, 4096))
    for _ in range(5):
        rig.turn(0)
    assert rig.export.in_flight == 0
    with pytest.raises(BlockingIOError):
        rig.kernel.recv(100)
    for region in taken:
        assert region is not None
        region.free()
    answers = {rig.receive() for _ in range(2)}
    assert answers == {(first, 0, rig.content[:4096]), (second, 0, rig.content[4096:8192])}
    rig.close()


def test_places_are_given_back(rig: Rig) -> None:
    """Requests with and without payload, done and refused, leave the arena as it was."""
    whole = (rig.path.local.room(), rig.path.arena.room())
    for number in range(200):
        rig.write(number * 4096, bytes(4096))
        rig.read(number * 4096, 4096)
        rig.write(SIZE, bytes(512))
        rig.ask(Opcode.GETATTR, bytes(16))
    assert (rig.path.local.room(), rig.path.arena.room()) == whole


def test_drain(rig: Rig) -> None:
    """What is in flight is answered, nothing new is taken."""
    rig.store.gate.clear()
    flush = rig.send(Opcode.FSYNC, bytes(16))
    rig.turn()
    assert rig.export.in_flight == 1
    rig.export.drain()
    rig.send(Opcode.READ, io(0, 4096))
    rig.store.gate.set()
    assert rig.receive() == (flush, 0, b"")
    for _ in range(3):
        rig.turn(0)
    assert rig.export.in_flight == 0
    with pytest.raises(BlockingIOError):
        rig.kernel.recv(100)


def test_target_that_gives_up(tmp_path: Path) -> None:
    """DMU-91: what no daemon ever takes ends in EIO, each for itself, and leaves nothing behind."""
    rig = Rig(tmp_path / "image", with_target=True)
    assert rig.kernel.recv(100) == NOTIFY_RESEND
    asked = {
        rig.send(Opcode.WRITE, io(4096, 512, os.O_DSYNC) + b"w" * 512),
        rig.send(Opcode.FALLOCATE, fallocate(PUNCH_HOLE | KEEP_SIZE, 0, 4096)),
        rig.send(Opcode.READ, io(0, 1024)),
        rig.send(Opcode.FSYNC, bytes(16)),
    }
    rig.turn()
    rig.turn(0)
    assert rig.export.in_flight == 4
    rig.clock.advance(ATTACH_TIMEOUT_MS)
    rig.target.expire()
    answers = [rig.receive() for _ in asked]
    assert {unique for unique, _, _ in answers} == asked
    assert {(number, payload) for _, number, payload in answers} == {(errno.EIO, b"")}
    assert rig.export.in_flight == 0
    rig.close()


def test_end_of_the_mount(rig: Rig) -> None:
    """The device goes on without it; what is in flight ends quietly."""
    rig.store.gate.clear()
    rig.send(Opcode.FSYNC, bytes(16))
    rig.turn()
    rig.kernel.close()
    rig.turn()
    rig.store.gate.set()
    for _ in range(100):
        rig.turn()
        if not rig.export.in_flight:
            break
    assert rig.export.in_flight == 0


def test_kernel_that_does_not_send_again(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """EINVAL for the notification: said once, and served all the same."""
    rig.export.close()
    with select.epoll() as refuses_writes:
        rig.take_over(refuses_writes.fileno()).drain()
    assert capsys.readouterr().err.count("Linux 6.9") == 1


def test_descriptor_that_is_not_mounted(rig: Rig) -> None:
    """EPERM: nobody would ever ask anything."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    rig.export.close()
    with pytest.raises(SnapdError, match="use the FUSE descriptor") as raised:
        rig.take_over(fd)
    assert raised.value.errno == errno.EPERM
    os.close(fd)

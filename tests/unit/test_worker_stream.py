"""The plain byte stream, over a socket: what every kind of request does, and what it is answered."""

import errno
import random
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from random import Random

import pytest
from simholes import HoleyStore

from snapd.block.bio import MAX_BIO_BYTES, BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk
from snapd.block.store import Buffer, WritableBuffer, read_bytes
from snapd.dmuser.client import ChannelClient, ChannelError
from snapd.dmuser.message import HEADER_BYTES, Answer, Flag, Request
from snapd.proc.log import Log
from snapd.worker.backend import Backend, ImageBackend, StoreBackend
from snapd.worker.stream import StreamService

SIZE = 8 << 20
CONTENT = Random(1).randbytes(SIZE)
PREFLUSH, FUA = int(Flag.PREFLUSH), int(Flag.FUA)
_ANSWER = struct.Struct("<QQ24x")


class Peer:
    """A service in a thread of its own, and the target's end of its channel; `error` is what `run` raised."""

    def __init__(self, backend: Backend) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        self.error: SnapdError | None = None
        self.service = StreamService(ChannelClient(theirs.detach()), backend, Log("test", ManualClock()))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._seq = 0

    def _run(self) -> None:
        try:
            self.service.run()
        except SnapdError as error:
            self.error = error
        finally:
            self.service.close()

    def send(self, op: int, *, sector: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; returns its number."""
        self._seq += 1
        self.socket.sendall(Request(self._seq, op, flags, sector, length or len(data)).pack() + data)
        return self._seq

    def answer(self) -> tuple[int, int]:
        """The next answer's number and code."""
        seq, code = _ANSWER.unpack(self.receive(HEADER_BYTES))
        return seq, code

    def receive(self, length: int) -> bytes:
        """So many bytes, or fewer at the end of the stream."""
        content = bytearray()
        while len(content) < length and (more := self.socket.recv(length - len(content))):
            content += more
        return bytes(content)

    def ask(self, op: int, *, sector: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """The code that a request without an answering payload is answered with."""
        seq = self.send(op, sector=sector, length=length, flags=flags, data=data)
        found, code = self.answer()
        assert found == seq
        return code

    def read(self, sector: int, length: int) -> bytes | None:
        """What a READ gives; None when it fails."""
        if self.ask(BioOp.READ, sector=sector, length=length):
            return None
        return self.receive(length)

    def close(self) -> None:
        """End the stream, and wait for the service."""
        self.socket.close()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the service, which ends by itself."""
        self._thread.join(60)
        assert not self._thread.is_alive()


class Image:
    """An image that fails to read at `broken`, and counts how often each 1 MiB piece was read."""

    size_bytes = SIZE

    def __init__(self, broken: range = range(0), *, breaks_at: int = 0) -> None:
        self.broken = broken
        self.breaks_at = breaks_at
        self.reads = 0

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        self.reads += 1
        end = offset + len(buffer)
        if end > SIZE:
            raise SnapdError(errno.EIO, "behind the end")
        if self.broken.start < end and offset < self.broken.stop and self.reads > self.breaks_at:
            raise SnapdError(errno.EBADMSG, "payload does not decompress")
        buffer[:] = CONTENT[offset:end]


@pytest.fixture
def image() -> Image:
    return Image()


@pytest.fixture
def snapshot(image: Image) -> Iterator[Peer]:
    peer = Peer(ImageBackend(image, SIZE))
    yield peer
    peer.close()
    assert peer.error is None


class Disk:
    """A store on a simulated disk, with what a power cut would leave of it."""

    def __init__(self) -> None:
        self._disk = SimDisk(Random(5))
        self.store = HoleyStore(self._disk, "store", CONTENT)

    def after_power_cut(self) -> bytes:
        self._disk.power_cut()
        return read_bytes(self.store, 0, SIZE)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def through(disk: Disk) -> Iterator[Peer]:
    peer = Peer(StoreBackend(disk.store))
    yield peer
    peer.close()
    assert peer.error is None


@pytest.mark.parametrize(("sector", "length"), [(0, 4096), (3, 512), (5, 1536), (9, MAX_BIO_BYTES), (7, 0)])
def test_reads(snapshot: Peer, sector: int, length: int) -> None:
    """DMU-7, DMU-178: any whole sectors, exactly `len` bytes behind the header."""
    assert snapshot.read(sector, length) == CONTENT[sector * 512 : sector * 512 + length]


@pytest.mark.parametrize("length", [MAX_BIO_BYTES + 512, 5 * MAX_BIO_BYTES, SIZE])
def test_a_read_larger_than_any_buffer(snapshot: Peer, image: Image, length: int) -> None:
    """DMU-182, DMU-178: verified once as a whole, then read again piece by piece."""
    assert snapshot.read(0, length) == CONTENT[:length]
    assert image.reads == 2 * -(-length // MAX_BIO_BYTES)


def test_a_large_read_that_does_not_verify_is_an_error(
    snapshot: Peer, image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    """DMU-167, DMU-182: no header before all of it verified; the channel goes on."""
    image.broken = range(SIZE - 1, SIZE)
    assert snapshot.read(0, SIZE) is None
    assert snapshot.read(0, 4096) == CONTENT[:4096]
    assert "does not decompress" in capsys.readouterr().err


def test_a_large_read_that_breaks_in_the_second_pass_closes_the_channel() -> None:
    """DMU-182, DMU-167: after the header nothing can be taken back, so the channel ends in the middle."""
    pieces = SIZE // MAX_BIO_BYTES
    peer = Peer(ImageBackend(Image(range(3 << 20, 4 << 20), breaks_at=pieces), SIZE))
    peer.send(BioOp.READ, length=SIZE)
    assert peer.answer() == (1, Answer.SUCCESS)
    assert peer.receive(SIZE) == CONTENT[: 3 << 20]
    peer.join()
    assert isinstance(peer.error, ChannelError)
    peer.socket.close()


@pytest.mark.parametrize("sector", [SIZE // 512, SIZE // 512 - 1, 1 << 55, (1 << 64) - 1])
@pytest.mark.parametrize("length", [1024, 2 * MAX_BIO_BYTES, 1 << 62])
def test_reads_outside_the_device(sector: int, length: int, disk: Disk) -> None:
    """DMU-178: an error for this request, whatever numbers it has, and no memory for it."""
    for backend in (ImageBackend(Image(), SIZE), StoreBackend(disk.store)):
        peer = Peer(backend)
        assert peer.read(sector, length) is None
        assert peer.read(0, 512) == CONTENT[:512]
        peer.close()


def test_a_bad_block_fails_its_own_request(snapshot: Peer, image: Image) -> None:
    """DMU-167, DMU-65: sent at once, each is answered for itself, in order, and the error has no data behind it."""
    image.broken = range(8192, 12288)
    numbers = [snapshot.send(BioOp.READ, sector=8 * i, length=4096) for i in range(6)]
    for i, number in enumerate(numbers):
        assert snapshot.answer() == (number, Answer.ERROR if i == 2 else Answer.SUCCESS)
        if i != 2:
            assert snapshot.receive(4096) == CONTENT[4096 * i : 4096 * (i + 1)]


class TestSnapshot:
    """Everything but a READ, on an image that nobody writes."""

    @pytest.mark.parametrize("sector", [0, 777])
    def test_flushes_succeed(self, snapshot: Peer, sector: int) -> None:
        """DMU-16, DMU-175: also the empty write of device mapper, whatever sector it names."""
        assert snapshot.ask(BioOp.FLUSH) == Answer.SUCCESS
        assert snapshot.ask(BioOp.WRITE, sector=sector, flags=PREFLUSH | int(Flag.SYNC)) == Answer.SUCCESS

    @pytest.mark.parametrize("length", [512, 3 << 20])
    @pytest.mark.parametrize("flags", [0, PREFLUSH, FUA, PREFLUSH | FUA])
    def test_writes_fail(self, snapshot: Peer, length: int, flags: int) -> None:
        """DMU-168: answered ERROR, once all of the payload is read; the next request is understood."""
        assert snapshot.ask(BioOp.WRITE, data=b"\xff" * length, flags=flags) == Answer.ERROR
        assert snapshot.read(0, 512) == CONTENT[:512]

    @pytest.mark.parametrize("op", [BioOp.DISCARD, BioOp.SECURE_ERASE, BioOp.WRITE_SAME, BioOp.WRITE_ZEROES, 7, 11, 99])
    def test_the_rest_is_unsupported(self, snapshot: Peer, op: int) -> None:
        """DMU-17, DMU-66."""
        assert snapshot.ask(op, length=4096) == Answer.UNSUPPORTED
        assert snapshot.read(0, 512) == CONTENT[:512]


class TestPassThrough:
    """A writable store."""

    @pytest.mark.parametrize("length", [512, 70_144, MAX_BIO_BYTES, 5 << 20])
    def test_writes_of_any_size(self, through: Peer, disk: Disk, length: int) -> None:
        """DMU-178: a payload larger than any buffer is written as it comes."""
        data = Random(length).randbytes(length)
        assert through.ask(BioOp.WRITE, sector=7, data=data) == Answer.SUCCESS
        assert through.read(7, length) == data
        assert read_bytes(disk.store, 0, SIZE) == CONTENT[:3584] + data + CONTENT[3584 + length :]

    def test_fua_is_durable_when_answered(self, through: Peer, disk: Disk) -> None:
        """DMU-24: on a disk that forgets what was not flushed."""
        assert through.ask(BioOp.WRITE, sector=1, data=b"\x01" * 4096, flags=FUA) == Answer.SUCCESS
        assert disk.after_power_cut()[512:4608] == b"\x01" * 4096

    @pytest.mark.parametrize(("op", "sector"), [(BioOp.FLUSH, 0), (BioOp.WRITE, 0), (BioOp.WRITE, 1 << 40)])
    def test_what_was_answered_before_a_flush_is_durable(self, through: Peer, disk: Disk, op: int, sector: int) -> None:
        """DMU-16, DMU-24, DMU-175: FLUSH, and the empty write with PREFLUSH and any sector."""
        for i in range(16):
            assert through.ask(BioOp.WRITE, sector=100 * i, data=bytes([i]) * 512) == Answer.SUCCESS
        assert through.ask(op, sector=sector, flags=PREFLUSH) == Answer.SUCCESS
        left = disk.after_power_cut()
        assert all(left[51200 * i : 51200 * i + 512] == bytes([i]) * 512 for i in range(16))

    def test_preflush_with_data(self, through: Peer, disk: Disk) -> None:
        """DMU-24: what was answered before is durable; the data itself only with FUA."""
        assert through.ask(BioOp.WRITE, sector=0, data=b"\x01" * 512) == Answer.SUCCESS
        flushes = disk.store._disk.trace.count("flush store")
        assert through.ask(BioOp.WRITE, sector=8, data=b"\x02" * 512, flags=PREFLUSH) == Answer.SUCCESS
        assert disk.store._disk.trace.count("flush store") == flushes + 1
        assert through.ask(BioOp.WRITE, sector=16, data=b"\x03" * 512, flags=PREFLUSH | FUA) == Answer.SUCCESS
        left = disk.after_power_cut()
        assert [left[4096 * i] for i in range(3)] == [1, 2, 3]

    def test_a_write_without_flags_is_not_flushed(self, through: Peer, disk: Disk) -> None:
        """DMU-24: durability is paid for only where it is asked for."""
        assert through.ask(BioOp.WRITE, sector=0, data=bytes(512)) == Answer.SUCCESS
        assert "flush store" not in disk.store._disk.trace

    @pytest.mark.parametrize("flags", [0, int(Flag.NOUNMAP), FUA])
    def test_write_zeroes(self, through: Peer, disk: Disk, flags: int) -> None:
        """DMU-11: the range is the header's; NOUNMAP is honoured, FUA makes it durable."""
        assert through.ask(BioOp.WRITE_ZEROES, sector=3, length=70_144, flags=flags) == Answer.SUCCESS
        assert bool(disk.store.unmapped) == (not flags & int(Flag.NOUNMAP))
        zeroed = CONTENT[:1536] + bytes(70_144) + CONTENT[1536 + 70_144 :]
        assert (disk.after_power_cut() if flags == FUA else read_bytes(disk.store, 0, SIZE)) == zeroed

    def test_discard_keeps_the_neighbours(self, through: Peer, disk: Disk) -> None:
        """DMU-11: what is discarded may read as anything."""
        assert through.ask(BioOp.DISCARD, sector=8, length=4096) == Answer.SUCCESS
        left = read_bytes(disk.store, 0, SIZE)
        assert left[:4096] + left[8192:] == CONTENT[:4096] + CONTENT[8192:]

    @pytest.mark.parametrize("op", [BioOp.SECURE_ERASE, BioOp.WRITE_SAME, 7, 12, 1 << 40])
    def test_the_rest_is_unsupported(self, through: Peer, op: int) -> None:
        """DMU-17."""
        assert through.ask(op, length=4096) == Answer.UNSUPPORTED

    @pytest.mark.parametrize("op", [BioOp.WRITE, BioOp.DISCARD, BioOp.WRITE_ZEROES])
    def test_outside_the_device(self, through: Peer, disk: Disk, op: int) -> None:
        """A store never grows; nothing of the request is done, and the next one is understood."""
        data = {"data": bytes(1024)} if op == BioOp.WRITE else {"length": 1024}
        for sector in (SIZE // 512 - 1, SIZE // 512, 1 << 55):
            assert through.ask(op, sector=sector, **data) == Answer.ERROR
        assert read_bytes(disk.store, 0, SIZE) == CONTENT
        assert disk.store.size() == SIZE

    def test_a_failing_disk(self, through: Peer, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        """A write or a flush that fails is an ERROR for that request, and the service goes on."""

        def fail(*_arguments: object) -> None:
            raise SnapdError(errno.ENOSPC, "full")

        monkeypatch.setattr(disk.store, "write", fail)
        assert through.ask(BioOp.WRITE, data=bytes(2 << 20)) == Answer.ERROR
        monkeypatch.undo()
        monkeypatch.setattr(disk.store, "flush", fail)
        assert through.ask(BioOp.WRITE, data=bytes(512), flags=FUA) == Answer.ERROR
        assert through.ask(BioOp.FLUSH) == Answer.ERROR
        assert through.read(8, 512) == CONTENT[4096:4608]


@pytest.mark.parametrize("seed", range(4))
def test_cut_anywhere(through: Peer, disk: Disk, seed: int) -> None:
    """DMU-51, DMU-154: requests that come in any pieces do the same."""
    choice = random.Random(seed)
    expected = bytearray(CONTENT)
    stream = b""
    count = 40
    for seq in range(count):
        sector, data = choice.randrange(SIZE // 512 - 200), choice.randbytes(512 * choice.choice([1, 8, 150]))
        expected[sector * 512 : sector * 512 + len(data)] = data
        stream += Request(seq, BioOp.WRITE, 0, sector, len(data)).pack() + data
    at = 0
    while at < len(stream):
        step = choice.choice([1, 39, 40, 41, 552, 9000, 300_000])
        through.socket.sendall(stream[at : at + step])
        at += step
    assert [through.answer() for _ in range(count)] == [(seq, Answer.SUCCESS) for seq in range(count)]
    assert read_bytes(disk.store, 0, SIZE) == expected


def test_stop_answers_what_has_come() -> None:
    """DMU-189: everything sent before is answered, then the stream ends."""
    reached, released = threading.Event(), threading.Event()

    class Slow(Image):
        def read_into(self, buffer: WritableBuffer, offset: int) -> None:
            reached.set()
            assert released.wait(60)
            super().read_into(buffer, offset)

    peer = Peer(ImageBackend(Slow(), SIZE))
    numbers = [peer.send(BioOp.READ, sector=i, length=512) for i in range(50)]
    assert reached.wait(60)
    peer.service.stop()
    released.set()
    for i, number in enumerate(numbers):
        assert peer.answer() == (number, Answer.SUCCESS)
        assert peer.receive(512) == CONTENT[512 * i : 512 * i + 512]
    peer.join()
    assert peer.error is None
    assert peer.receive(1) == b""
    peer.socket.close()


def test_stop_in_the_middle_of_a_write() -> None:
    """DMU-189: a request of which the rest will not come any more holds nothing up."""
    begun = threading.Event()

    class Begun(StoreBackend):
        def change(self, request: Request, payload: Iterable[Buffer]) -> None:
            begun.set()
            super().change(request, payload)

    peer = Peer(Begun(Disk().store))
    peer.socket.sendall(Request(1, BioOp.WRITE, 0, 0, 4096).pack() + bytes(100))
    assert begun.wait(60)
    peer.service.stop()
    peer.join()
    assert peer.error is None
    peer.socket.close()


def test_the_stream_ends_in_the_middle_of_a_write() -> None:
    """DMU-155: that is an error of the channel, not of the request."""
    peer = Peer(StoreBackend(Disk().store))
    peer.socket.sendall(Request(1, BioOp.WRITE, 0, 0, 4096).pack() + bytes(100))
    peer.socket.shutdown(socket.SHUT_WR)
    peer.join()
    assert isinstance(peer.error, ChannelError)
    assert peer.error.errno == errno.EPROTO
    peer.socket.close()

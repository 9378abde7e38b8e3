"""The arena form: headers through the socket, payload in shared memory."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from random import Random

import pytest
from simholes import HoleyStore

from snapd.block.bio import BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk
from snapd.block.store import WritableBuffer, read_bytes
from snapd.dmuser.arena import ARENA_BYTES, PLACE_SHIFT, create_arena, map_arena
from snapd.dmuser.client import ChannelEnd, ChannelError
from snapd.dmuser.message import HEADER_BYTES, SUSPECTS, Answer, Flag, Request
from snapd.proc.log import Log
from snapd.worker.arenaservice import ArenaService
from snapd.worker.backend import ImageBackend, StoreBackend

SIZE = 4 << 20
CONTENT = Random(1).randbytes(SIZE)


class Refusing:
    """An image whose second block is damaged."""

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        if offset < 8192 and offset + len(buffer) > 4096:
            raise SnapdError(errno.EBADMSG, "payload does not decompress")
        if offset + len(buffer) > SIZE:
            raise SnapdError(errno.EIO, "behind the end")
        buffer[:] = CONTENT[offset : offset + len(buffer)]


class Peer:
    """A service in a thread of its own, the host's end of its channel, and the host's view of the arena."""

    def __init__(self, *, writable: bool) -> None:
        fd = create_arena()
        self.arena = map_arena(fd)
        self.disk = SimDisk(Random(5))
        self.store = HoleyStore(self.disk, "store", CONTENT)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        self.error: SnapdError | None = None
        backend = StoreBackend(self.store) if writable else ImageBackend(Refusing(), SIZE)
        end = ChannelEnd(theirs.detach())
        self.service = ArenaService(end, map_arena(fd), backend, Log("test", ManualClock()))
        os.close(fd)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except SnapdError as error:
            self.error = error
        finally:
            self.service.close()

    def answers(self, count: int) -> list[tuple[int, int]]:
        """The next answers' numbers and codes."""
        raw = bytearray()
        while len(raw) < count * HEADER_BYTES:
            more = self.socket.recv(count * HEADER_BYTES - len(raw))
            assert more, "the service has ended"
            raw += more
        found = []
        for at in range(0, len(raw), HEADER_BYTES):
            seq, code = memoryview(raw)[at : at + 16].cast("Q")
            found.append((int(seq), int(code)))
        return found

    def ask(self, op: int, sector: int, length: int, place: int = 0, flags: int = 0) -> int:
        """The code of the answer to one request."""
        self.socket.sendall(packed(7, op, sector, length, place, flags))
        ((seq, code),) = self.answers(1)
        assert seq == 7
        return code

    def close(self) -> None:
        self.socket.close()
        self._thread.join(60)
        assert not self._thread.is_alive()


def packed(seq: int, op: int, sector: int, length: int, place: int, flags: int = 0) -> bytes:
    return Request(seq, op, flags | place << PLACE_SHIFT, sector, length).pack()


@pytest.fixture
def image() -> Iterator[Peer]:
    peer = Peer(writable=False)
    yield peer
    peer.close()
    assert peer.error is None


@pytest.fixture
def store() -> Iterator[Peer]:
    peer = Peer(writable=True)
    yield peer
    peer.close()
    assert peer.error is None


@pytest.mark.parametrize("pieces", [1, 39, 41, 1000, 1 << 20])
def test_many_at_once_are_answered_in_order(image: Peer, pieces: int) -> None:
    """DMU-8, DMU-9: reads of a whole queue, cut anywhere, each to its own place; a bad block fails alone."""
    count = 200
    stream = b"".join(packed(seq, BioOp.READ, 8 * seq, 4096, 8192 * seq) for seq in range(count))
    for at in range(0, len(stream), pieces):
        image.socket.sendall(stream[at : at + pieces])
    assert image.answers(count) == [(seq, Answer.ERROR if seq == 1 else Answer.SUCCESS) for seq in range(count)]
    for seq in range(count):
        if seq != 1:
            place = 8192 * seq
            assert image.arena[place : place + 4096] == CONTENT[4096 * seq : 4096 * seq + 4096]
            assert image.arena[place + 4096 : place + 8192] == bytes(4096)


@pytest.mark.parametrize(("place", "length"), [(ARENA_BYTES, 512), (ARENA_BYTES - 512, 1024), ((1 << 32) - 1, 512)])
@pytest.mark.parametrize("op", [BioOp.READ, BioOp.WRITE])
def test_a_place_outside_the_arena(store: Peer, op: int, place: int, length: int) -> None:
    """Nothing is read or written there; the request is answered ERROR, and the next one is served."""
    assert store.ask(op, 0, length, place) == Answer.ERROR
    assert store.ask(BioOp.READ, 0, 512, ARENA_BYTES - 512) == Answer.SUCCESS
    assert store.arena[ARENA_BYTES - 512 :] == CONTENT[:512]
    assert read_bytes(store.store, 0, SIZE) == CONTENT


@pytest.mark.parametrize("sector", [SIZE // 512, (1 << 64) - 1])
@pytest.mark.parametrize("op", [BioOp.READ, BioOp.WRITE, BioOp.DISCARD, BioOp.WRITE_ZEROES])
def test_outside_the_device(store: Peer, op: int, sector: int) -> None:
    """DMU-65: answered ERROR, whatever number it is."""
    assert store.ask(op, sector, 512) == Answer.ERROR
    assert read_bytes(store.store, 0, SIZE) == CONTENT


def test_writes_and_flushes(store: Peer) -> None:
    """DMU-24, DMU-16: payload from the arena, durable when asked for, in the order of the requests."""
    store.arena[4096:8192] = b"\x07" * 4096
    assert store.ask(BioOp.WRITE, 8, 4096, 4096) == Answer.SUCCESS
    assert "flush store" not in store.disk.trace
    assert store.ask(BioOp.WRITE, 1 << 40, 0, 0, int(Flag.PREFLUSH)) == Answer.SUCCESS
    store.arena[4096:8192] = b"\x08" * 4096
    assert store.ask(BioOp.WRITE, 16, 4096, 4096, int(Flag.FUA)) == Answer.SUCCESS
    assert store.ask(BioOp.WRITE_ZEROES, 24, 2 << 20, 0, int(Flag.FUA)) == Answer.SUCCESS
    store.disk.power_cut()
    wanted = CONTENT[:4096] + b"\x07" * 4096 + b"\x08" * 4096 + bytes(2 << 20) + CONTENT[12288 + (2 << 20) :]
    assert read_bytes(store.store, 0, SIZE) == wanted


def test_a_discard_has_no_payload(store: Peer) -> None:
    """DMU-11: its length is a range of the device, not of the arena."""
    assert store.ask(BioOp.DISCARD, 0, SIZE) == Answer.SUCCESS
    assert store.ask(BioOp.READ, 0, 0) == Answer.SUCCESS


def test_read_only(image: Peer) -> None:
    """DMU-16, DMU-66: flushes succeed, writes are errors, the rest is unsupported."""
    assert image.ask(BioOp.FLUSH, 0, 0) == Answer.SUCCESS
    assert image.ask(BioOp.WRITE, 0, 0, 0, int(Flag.PREFLUSH)) == Answer.SUCCESS
    assert image.ask(BioOp.WRITE, 0, 512) == Answer.ERROR
    assert image.ask(BioOp.DISCARD, 0, 512) == Answer.UNSUPPORTED
    assert image.ask(BioOp.WRITE_SAME, 0, 512) == Answer.UNSUPPORTED


def test_stop_answers_what_has_come(image: Peer) -> None:
    """DMU-189: everything sent before is answered; then the stream ends, without an error."""
    image.socket.sendall(b"".join(packed(seq, BioOp.READ, 8000, 4096, 0) for seq in range(300)))
    image.service.stop()
    assert image.answers(300) == [(seq, Answer.SUCCESS) for seq in range(300)]
    assert image.socket.recv(1) == b""


def test_the_stream_ends_inside_a_header() -> None:
    """DMU-155: that is an error of the channel."""
    peer = Peer(writable=False)
    peer.socket.sendall(packed(1, BioOp.READ, 0, 512, 0)[:39])
    peer.close()
    assert isinstance(peer.error, ChannelError)


def test_few_done_requests_are_unanswered(image: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """DMU-148: only the oldest `SUSPECTS` count as replayed when a worker dies, however small the requests are."""
    count = 5 * SUSPECTS
    release = threading.Event()
    read_into = image.service._backend.read_into

    def stop_at_the_last(buffer: WritableBuffer, offset: int) -> None:
        if offset == 8192 + (count - 1) * 512:
            assert release.wait(60)
        read_into(buffer, offset)

    monkeypatch.setattr(image.service._backend, "read_into", stop_at_the_last)
    image.socket.sendall(b"".join(packed(i, BioOp.READ, 16 + i, 512, i * 512) for i in range(count)))
    try:
        # All but what may be held back have been answered before the last one is done.
        assert image.answers(count - SUSPECTS) == [(i, 0) for i in range(count - SUSPECTS)]
    finally:
        release.set()
    assert image.answers(SUSPECTS) == [(i, 0) for i in range(count - SUSPECTS, count)]

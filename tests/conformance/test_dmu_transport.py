"""The socket form: both ends, every cut of the stream (DMU-154 to DMU-158, DMU-166 to DMU-178)."""

import errno
import os
import random
import select
import socket
import threading
from collections.abc import Iterator

import pytest
from answers import pack_answer
from dmurig import EIO, OK, PREFLUSH, Rig, Submitted

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import WritableBuffer
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.client import ChannelClient
from snapd.dmuser.message import HEADER_BYTES, Answer, Request
from snapd.dmuser.target import QUEUE_MESSAGES
from snapd.proc.log import Log
from snapd.worker.serve import ReadService


class Link:
    """A target's channel and the daemon's raw end of the same socket."""

    def __init__(self, **timeouts_ms: int) -> None:
        self.rig = Rig(**timeouts_ms)
        ours, self.daemon = socket.socketpair()
        self.channel = SocketChannel(self.rig.target, ours)

    def requests(self, count: int) -> list[Request]:
        """Pass on what is queued and read it as the daemon."""
        client = ChannelClient(self.daemon.fileno())
        received: list[Request] = []
        while len(received) < count:
            self.channel.send()
            more = client.receive()
            assert more is not None
            received += more
        return received

    def close(self) -> None:
        self.channel.close()
        self.daemon.close()


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


class Pattern:
    """A view whose bytes tell their offset; refuses to read at `broken`."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        if offset == self.broken:
            raise SnapdError(errno.EBADMSG, "payload does not decompress")
        buffer[:] = pattern(offset, len(buffer))


def pattern(offset: int, length: int) -> bytes:
    return random.Random(offset).randbytes(length)


def received_now(client: ChannelClient) -> list[Request]:
    """What is complete on a non-blocking descriptor."""
    try:
        return client.receive() or []
    except SnapdError as error:
        if error.errno != errno.EAGAIN:
            raise
        return []


def served(link: Link, requests: list[Submitted], view: Pattern) -> None:
    """Let a read service answer what has been submitted, then end the stream for it."""
    link.channel.send()
    # The service sees the end of the stream behind the requests and returns.
    link.rig.target.destroy()
    link.channel.send()
    service = ReadService(ChannelClient(link.daemon.fileno()), view, Log("test", link.rig.clock))
    thread = threading.Thread(target=service.run)
    thread.start()
    while any(request.result is None for request in requests):
        select.select([link.channel], [], [])
        assert link.channel.receive()
    thread.join()


def test_all_waiting_messages_leave_in_one_send(link: Link) -> None:
    """DMU-154: what is queued arrives as one run of bytes, in number order."""
    for sector in range(100):
        link.rig.submit(sector=sector)
    link.channel.send()
    raw = link.daemon.recv(1 << 20)
    assert len(raw) == 100 * HEADER_BYTES
    assert [raw[i : i + 1][0] for i in range(0, len(raw), HEADER_BYTES)] == list(range(100))
    assert link.rig.target.queued == 0


def test_write_payload_follows_its_header(link: Link) -> None:
    """DMU-6: payload towards the daemon exists only for WRITE and has `len` bytes."""
    write, flush = Submitted(BioOp.WRITE, sector=5, length=1024), Submitted(BioOp.WRITE, flags=PREFLUSH, length=0)
    write.memory[:] = pattern(5, 1024)
    link.rig.target.submit(write.bio)
    link.rig.target.submit(flush.bio)
    link.channel.send()
    raw = link.daemon.recv(1 << 20)
    assert raw == (
        Request(0, BioOp.WRITE, 0, 5, 1024).pack() + pattern(5, 1024) + Request(1, BioOp.WRITE, PREFLUSH, 0, 0).pack()
    )


@pytest.mark.parametrize("seed", range(8))
def test_answers_in_any_pieces(link: Link, seed: int) -> None:
    """DMU-60, DMU-8, DMU-166: answers cut anywhere, with scrambled flags, sector and len, fill the right bios."""
    choice = random.Random(seed)
    bios = [link.rig.submit(sector=i, length=choice.choice([512, 4096, 70_000])) for i in range(20)]
    numbers = [request.seq for request in link.requests(20)]
    choice.shuffle(numbers)
    stream = b""
    for seq in numbers:
        header = bytearray(pack_answer(seq, Answer.SUCCESS))
        header[16:] = choice.randbytes(24)
        stream += bytes(header) + pattern(seq, len(bios[seq].memory))
    at = 0
    while at < len(stream):
        step = choice.choice([1, 39, 40, 41, 500, 9000])
        link.daemon.sendall(stream[at : at + step])
        at += step
        assert link.channel.receive()
    assert [bio.result for bio in bios] == [OK] * 20
    assert all(bytes(bio.memory) == pattern(seq, len(bio.memory)) for seq, bio in enumerate(bios))


@pytest.mark.parametrize("sent", [39, 40, 41, 40 + 4095])
def test_stream_ends_inside_an_answer(link: Link, sent: int) -> None:
    """DMU-75: whatever part of the answer came, the bio fails and was never completed before."""
    bio = link.rig.submit(length=4096)
    link.requests(1)
    link.daemon.sendall((pack_answer(0, Answer.SUCCESS) + bytes(4096))[:sent])
    link.daemon.shutdown(socket.SHUT_WR)
    while link.channel.receive():
        assert bio.result is None
    link.channel.close()
    assert bio.result == EIO


def test_answers_sent_before_death_count(link: Link) -> None:
    """DMU-76: an answer that was sent whole before the daemon died is taken in before the close."""
    answered, unanswered = link.rig.submit(), link.rig.submit()
    link.requests(2)
    link.daemon.sendall(pack_answer(0, Answer.SUCCESS) + bytes(SECTOR_BYTES))
    link.daemon.close()
    while link.channel.receive():
        pass
    link.channel.close()
    assert (answered.result, unanswered.result) == (OK, EIO)


def test_data_after_an_error_poisons(link: Link) -> None:
    """DMU-68, DMU-69, DMU-156: it is parsed as a header; the receiving side is shut down, and all it held fails."""
    failed, held = link.rig.submit(), link.rig.submit()
    link.requests(2)
    link.daemon.sendall(pack_answer(0, Answer.ERROR) + b"\xff" * SECTOR_BYTES)
    with pytest.raises(SnapdError) as error:
        link.channel.receive()
    assert error.value.errno == errno.EINVAL
    assert (failed.result, held.result) == (EIO, EIO)
    with pytest.raises(SnapdError) as refused:
        ChannelClient(link.daemon.fileno()).send(pack_answer(1, Answer.SUCCESS))
    assert refused.value.errno == errno.EINVAL


def test_full_socket_is_backpressure(link: Link) -> None:
    """DMU-143: while the daemon does not read, messages wait in the queue, the queue fills up, nothing fails."""
    bios: list[Submitted] = []
    while link.rig.target.has_room():
        bios.append(link.rig.submit(BioOp.WRITE, length=64 << 10))
        link.channel.send()
    assert link.channel.wants_to_send
    client = ChannelClient(link.daemon.fileno())
    received: list[Request] = []
    link.daemon.setblocking(False)
    while len(received) < len(bios):
        link.channel.send()
        received += received_now(client)
    assert [request.seq for request in received] == list(range(len(bios)))
    assert {bio.result for bio in bios} == {None}


def test_destroy_ends_the_stream(link: Link) -> None:
    """DMU-155, DMU-57, DMU-73: the daemon sees a clean end at a message boundary and may still answer."""
    bio = link.rig.submit()
    link.channel.send()
    link.rig.target.destroy()
    link.channel.send()
    client = ChannelClient(link.daemon.fileno())
    requests = client.receive()
    assert requests is not None
    assert client.receive() is None
    client.send(pack_answer(requests[0].seq, Answer.SUCCESS) + bytes(SECTOR_BYTES))
    assert link.channel.receive()
    assert bio.result == OK


class TestClient:
    """The daemon's end on its own."""

    @pytest.mark.parametrize("step", [1, 13, 40, 1000])
    def test_requests_in_any_pieces(self, step: int) -> None:
        """DMU-51, DMU-158: short reads of any size give the same requests; a WRITE comes when its payload has."""
        ours, theirs = socket.socketpair()
        expected = [Request(i, BioOp.WRITE if i % 3 else BioOp.READ, 0, i, 512 * i) for i in range(20)]
        stream = b"".join(r.pack() + bytes(r.length if r.op == BioOp.WRITE else 0) for r in expected)
        client = ChannelClient(theirs.fileno())
        theirs.setblocking(False)
        received: list[Request] = []
        for at in range(0, len(stream), step):
            ours.sendall(stream[at : at + step])
            received += received_now(client)
        assert received == expected
        ours.close()
        theirs.close()

    def test_write_larger_than_the_buffer(self) -> None:
        """DMU-178: memory is bounded by the client, not by the length of a request."""
        ours, theirs = os.pipe()
        client = ChannelClient(ours)
        request = Request(0, BioOp.WRITE, 0, 0, 1 << 20)
        os.write(theirs, request.pack())
        payload = threading.Thread(target=lambda: [os.write(theirs, bytes(4096)) for _ in range(256)])
        payload.start()
        assert client.receive() == [request]
        payload.join()
        os.close(theirs)
        assert client.receive() is None
        os.close(ours)

    @pytest.mark.parametrize("cut", [1, 39, 41])
    def test_end_inside_a_message(self, cut: int) -> None:
        """DMU-155: the end of the stream is clean only at a message boundary."""
        ours, theirs = socket.socketpair()
        ours.sendall((Request(0, BioOp.WRITE, 0, 0, 512).pack() + bytes(512))[:cut])
        ours.close()
        with pytest.raises(SnapdError) as error:
            ChannelClient(theirs.fileno()).receive()
        assert error.value.errno == errno.EPROTO
        theirs.close()

    def test_peer_died_with_answers_unread(self) -> None:
        """DMU-155: a reset between two messages is the end of the channel, not an error."""
        ours, theirs = socket.socketpair()
        theirs.sendall(b"an answer that nobody reads")
        ours.close()
        assert ChannelClient(theirs.fileno()).receive() is None
        theirs.close()


class TestReadService:
    """The worker's loop over a real channel."""

    def test_reads_of_all_sizes(self, link: Link) -> None:
        """DMU-167, DMU-46: a whole batch is answered, each read with its own bytes, up to the largest bio."""
        sizes = [512, 4096, 512 * 7, MAX_BIO_BYTES, 65536, 0, 512]
        bios = [link.rig.submit(sector=1000 * i, length=size) for i, size in enumerate(sizes)]
        served(link, bios, Pattern())
        assert [bio.result for bio in bios] == [OK] * len(sizes)
        for i, bio in enumerate(bios):
            assert bytes(bio.memory) == pattern(1000 * i * SECTOR_BYTES, sizes[i])

    def test_failed_read_fails_alone(self, link: Link, capsys: pytest.CaptureFixture[str]) -> None:
        """DMU-167, DMU-65, DMU-158: what does not verify is answered ERROR without data, and the service goes on."""
        bios = [link.rig.submit(sector=8 * i, length=4096) for i in range(3)]
        served(link, bios, Pattern(broken=4096))
        assert [bio.result for bio in bios] == [OK, EIO, OK]
        assert bytes(bios[1].memory) == bytes(4096)
        assert bytes(bios[2].memory) == pattern(8192, 4096)
        assert "sector 8: payload does not decompress" in capsys.readouterr().err

    def test_read_only(self, link: Link) -> None:
        """DMU-16, DMU-24: nothing is written, so both flushes succeed, and everything that would write fails."""
        flushes = [link.rig.submit(BioOp.FLUSH, length=0), link.rig.submit(BioOp.WRITE, length=0, flags=PREFLUSH)]
        changes = [
            link.rig.submit(op, length=4096)
            for op in (BioOp.WRITE, BioOp.DISCARD, BioOp.WRITE_ZEROES, BioOp.SECURE_ERASE)
        ]
        read = link.rig.submit(sector=9)
        served(link, [*flushes, *changes, read], Pattern())
        assert [bio.result for bio in flushes] == [OK, OK]
        assert [bio.result for bio in changes] == [EIO] * 4
        assert bytes(read.memory) == pattern(9 * SECTOR_BYTES, SECTOR_BYTES)

    def test_read_above_the_limit_is_refused(self, link: Link, capsys: pytest.CaptureFixture[str]) -> None:
        """DMU-182, DMU-178: a read of more than 1 MiB never makes the worker allocate; the target cuts before."""
        large, small = link.rig.submit(length=MAX_BIO_BYTES + SECTOR_BYTES), link.rig.submit()
        served(link, [large, small], Pattern())
        assert (large.result, small.result) == (EIO, OK)
        assert "more than 1048576" in capsys.readouterr().err

    def test_a_full_queue_of_large_reads(self, link: Link) -> None:
        """DMU-143, DMU-46: both ends bounded, more bytes than any buffer on the way, nothing lost or mixed up."""
        ours = link.channel
        bios = [link.rig.submit(sector=i * 64, length=32 << 10) for i in range(QUEUE_MESSAGES)]
        served(link, bios, Pattern())
        assert ours.fileno() >= 0
        assert all(bytes(bio.memory) == pattern(i * 64 * SECTOR_BYTES, 32 << 10) for i, bio in enumerate(bios))

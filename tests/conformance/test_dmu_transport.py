"""The socket form: the target's end, every cut of the stream (DMU-154 to DMU-157, DMU-166 to DMU-170)."""

import errno
import random
import socket
from collections.abc import Iterator

import pytest
from dmuforms import Seen, parse
from dmurig import EIO, OK, PREFLUSH, Rig, Submitted, answer_header, raises

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.message import HEADER_BYTES, Answer, Request


class Link:
    """A target's channel and the daemon's raw end of the same socket."""

    def __init__(self, **timeouts_ms: int) -> None:
        self.rig = Rig(**timeouts_ms)
        ours, self.daemon = socket.socketpair()
        self.channel = SocketChannel(self.rig.target, ours)

    def requests(self) -> list[Request]:
        """Pass on what is queued and read it as the daemon."""
        return [request for request, _ in self.messages()]

    def messages(self) -> list[Seen]:
        stream = bytearray()
        self.daemon.setblocking(False)
        while True:
            self.channel.send()
            try:
                stream += self.daemon.recv(1 << 20)
            except BlockingIOError:
                break
        self.daemon.setblocking(True)
        return parse(bytes(stream))

    def messages_to_the_end(self) -> list[Seen]:
        """Everything up to the end of the stream."""
        stream = bytearray()
        while True:
            self.channel.send()
            more = self.daemon.recv(1 << 20)
            if not more:
                return parse(bytes(stream))
            stream += more

    def close(self) -> None:
        self.channel.close()
        self.daemon.close()


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


def pattern(offset: int, length: int) -> bytes:
    return random.Random(offset).randbytes(length)


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
    numbers = [request.seq for request in link.requests()]
    choice.shuffle(numbers)
    stream = b""
    for seq in numbers:
        header = bytearray(answer_header(seq, Answer.SUCCESS))
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
    link.requests()
    link.daemon.sendall((answer_header(0, Answer.SUCCESS) + bytes(4096))[:sent])
    link.daemon.shutdown(socket.SHUT_WR)
    while link.channel.receive():
        assert bio.result is None
    link.channel.close()
    assert bio.result == EIO


def test_answers_sent_before_death_count(link: Link) -> None:
    """DMU-76: an answer that was sent whole before the daemon died is taken in before the close."""
    answered, unanswered = link.rig.submit(), link.rig.submit()
    link.requests()
    link.daemon.sendall(answer_header(0, Answer.SUCCESS) + bytes(SECTOR_BYTES))
    link.daemon.close()
    while link.channel.receive():
        pass
    link.channel.close()
    assert (answered.result, unanswered.result) == (OK, EIO)


def test_data_after_an_error_poisons(link: Link) -> None:
    """DMU-68, DMU-69, DMU-156, DMU-186: it is parsed as a header; the receiving side is shut down, what it held fails.

    A daemon learns so from a later write, which is EPIPE here.
    """
    failed, held = link.rig.submit(), link.rig.submit()
    link.requests()
    link.daemon.sendall(answer_header(0, Answer.ERROR) + b"\xff" * SECTOR_BYTES)
    with raises(errno.EINVAL):
        link.channel.receive()
    assert (failed.result, held.result) == (EIO, EIO)
    with pytest.raises(BrokenPipeError):
        link.daemon.sendall(answer_header(1, Answer.SUCCESS))
    link.rig.submit()
    assert link.requests() == []


def test_full_socket_is_backpressure(link: Link) -> None:
    """DMU-143: while the daemon does not read, messages wait in the queue, the queue fills up, nothing fails."""
    bios: list[Submitted] = []
    while link.rig.target.has_room():
        bios.append(link.rig.submit(BioOp.WRITE, length=64 << 10))
        link.channel.send()
    assert link.channel.wants_to_send
    assert [request.seq for request in link.requests()] == list(range(len(bios)))
    assert {bio.result for bio in bios} == {None}


def test_a_full_queue_of_large_reads(link: Link) -> None:
    """DMU-143, DMU-46: more bytes than any buffer on the way; nothing is lost or mixed up."""
    bios = [link.rig.submit(sector=i * 64, length=32 << 10) for i in range(100)]
    for request in reversed(link.requests()):
        stream = answer_header(request.seq, Answer.SUCCESS) + pattern(request.seq, request.length)
        link.daemon.sendall(stream)
        while bios[request.seq].result is None:
            assert link.channel.receive()
    assert all(bytes(bio.memory) == pattern(i, 32 << 10) for i, bio in enumerate(bios))


def test_destroy_ends_the_stream(link: Link) -> None:
    """DMU-155, DMU-57, DMU-73: the daemon sees the end of the stream at a message's border and may still answer."""
    bio = link.rig.submit()
    link.channel.send()
    link.rig.target.destroy()
    link.channel.send()
    assert len(link.daemon.recv(4096)) == HEADER_BYTES
    assert link.daemon.recv(4096) == b""
    link.daemon.sendall(answer_header(0, Answer.SUCCESS) + bytes(SECTOR_BYTES))
    assert link.channel.receive()
    assert bio.result == OK


def test_destroy_in_the_middle_of_a_message(link: Link) -> None:
    """DMU-58, DMU-155: a WRITE that is half way through the socket arrives whole before the stream ends."""
    link.rig.submit(BioOp.WRITE, length=4 << 20)
    link.channel.send()
    assert link.channel.wants_to_send
    link.rig.target.destroy()
    (request, payload), *more = link.messages_to_the_end()
    assert (request.length, len(payload), more) == (4 << 20, 4 << 20, [])


def test_hanging_up_in_every_state(link: Link) -> None:
    """DMU-170, DMU-152: a broken connection is a close: header read, payload half read, reply half written, unread."""
    bios = [link.rig.submit(), link.rig.submit(), link.rig.submit(BioOp.WRITE, length=4 << 20)]
    link.channel.send()
    unread = link.rig.submit()
    link.daemon.recv(3 * HEADER_BYTES + 100)
    link.daemon.sendall(answer_header(0, Answer.SUCCESS) + bytes(100))
    link.daemon.close()
    link.channel.send()
    while link.channel.receive():
        pass
    link.channel.close()
    assert [bio.result for bio in bios] == [EIO] * 3
    link.rig.target.expire()
    assert unread.result == EIO


def test_probe_that_reads_nothing_changes_nothing(link: Link) -> None:
    """DMU-119: a daemon that was gone before the socket took a request has read none, whatever was on its way."""
    waiting = link.rig.submit()
    link.daemon.close()
    link.channel.send()
    assert not link.channel.receive()
    link.channel.close()
    assert link.rig.target.state == "never"
    assert waiting.result is None

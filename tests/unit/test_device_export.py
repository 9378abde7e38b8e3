"""The export over real sockets, with the clock and the answers in the test's hand."""

import errno
import os
import random
import socket
import struct
import tempfile
import uuid
from collections.abc import Iterator

import pytest
from zeromap import zero_map

from snapd.block.bio import MAX_BIO_BYTES
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import WritableBuffer
from snapd.device.connection import CREDIT_BYTES, MIN_CHARGE_BYTES, STALL_MS
from snapd.device.export import CREDIT_BYTES as EXPORT_CREDIT_BYTES
from snapd.device.export import MAX_CONNECTIONS, Export
from snapd.device.loop import Loop
from snapd.device.nbd import MAX_REQUEST_BYTES, REPLY, REPLY_MAGIC, REQUEST, REQUEST_MAGIC
from snapd.device.readpath import ReadPath
from snapd.dmuser.message import Answer
from snapd.dmuser.target import Channel, Message, Target
from snapd.merge.sharedmap import SharedMap
from snapd.proc.log import Log

BLOCK = 4096
BLOCKS = 10_240
SIZE = BLOCKS * BLOCK
RANDOM_BYTES = 3000 * BLOCK
OLD = random.Random(4).randbytes(RANDOM_BYTES)
DAEMONS_BLOCKS = ((100, 200), (300, 2900))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)


class Base:
    """A sparse base whose reads can be made to fail, or to run into a rollback."""

    def __init__(self, store: FileStore) -> None:
        self.store = store
        self.fails = False
        self.withdraw: SharedMap | None = None

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        if self.fails:
            raise SnapdError(errno.EIO, "medium error")
        self.store.read_into(buffer, offset)
        if self.withdraw is not None:
            self.withdraw.withdraw()


class Client:
    """A raw NBD client that has negotiated."""

    def __init__(self, bench: "Bench", *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(bench.path)
        self.bench = bench
        bench.turn()
        if negotiate:
            self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 6) + bytes(6))
            bench.turn()
            self.socket.recv(4096)
        self.socket.setblocking(False)

    def send(self, *requests: bytes) -> None:
        self.socket.sendall(b"".join(requests))
        self.bench.turn()

    def receive(self, length: int = 1 << 26) -> bytes | None:
        """What there is, going round until there is no more; None when the server hung up."""
        received = bytearray()
        while len(received) < length:
            try:
                got = self.socket.recv(length - len(received))
            except BlockingIOError:
                break
            except ConnectionResetError:
                return None
            if not got:
                return bytes(received) or None
            received += got
            self.bench.turn()
        return bytes(received)

    def replies(self, lengths: dict[int, int]) -> dict[int, tuple[int, bytes]]:
        """All replies there are, by cookie: (error, payload); `lengths` are those of the reads."""
        raw = self.receive()
        assert raw is not None
        found: dict[int, tuple[int, bytes]] = {}
        at = 0
        while at < len(raw):
            magic, number, cookie = REPLY.unpack_from(raw, at)
            assert magic == REPLY_MAGIC
            assert cookie not in found
            at += REPLY.size
            length = 0 if number else lengths.get(cookie, 0)
            found[cookie] = number, raw[at : at + length]
            assert len(found[cookie][1]) == length
            at += length
        return found


class Bench:
    """An export over a target whose daemon is the test, on a base with random content.

    Blocks 100 to 199 and 300 to 2899 belong to the daemon; it answers with the base's bytes, every bit turned.
    """

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "nbd")
        self.closed = False
        self.clock = ManualClock()
        self.loop = Loop()
        self.target = Target(self.clock)
        self.file = open(os.path.join(directory, "base"), "w+b")  # noqa: SIM115
        self.file.truncate(SIZE)
        self.file.write(OLD)
        self.file.flush()
        self.base = Base(FileStore(self.file.fileno()))
        changed = {block for start, end in DAEMONS_BLOCKS for block in range(start, end)}
        extent_map = zero_map(changed, BLOCKS, block_size=BLOCK)
        with open(os.path.join(directory, "shared"), "w+b") as file:
            self.shared = SharedMap.create(file.fileno(), extent_map, uuid.UUID(int=1), 1)
        self.read_path = ReadPath(self.target, self.base, self.shared, BLOCK)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(100)
        self.export = Export(
            self.loop,
            self.listener,
            size_bytes=SIZE,
            read_path=self.read_path,
            clock=self.clock,
            log=Log("test", self.clock),
        )
        self.daemon: Channel = self.target.open()
        self.taken: list[Message] = []

    def turn(self) -> None:
        """The host's rounds, until nothing more happens; the daemon takes its messages and keeps them."""
        for _ in range(6):
            self.loop.run_once(0)
            self.target.expire()
            self.export.expire()
            while True:
                self.read_path.submit_waiting()
                while (message := self.daemon.take()) is not None:
                    self.daemon.handed_over()
                    self.taken.append(message)
                if self.read_path.can_submit:
                    continue
                self.read_path.read_local()
                if not self.export.flush():
                    break

    def answer(self, message: Message, code: int = Answer.SUCCESS) -> None:
        self.taken.remove(message)
        if self.daemon.answer(message.seq, code) is not None:
            assert message.bio.data is not None
            start = message.bio.sector * 512
            message.bio.data[:] = turned(OLD[start : start + message.bio.length])
            self.daemon.answered()
        self.turn()

    def close_export(self) -> None:
        if not self.closed:
            self.closed = True
            self.export.close()

    def close(self) -> None:
        self.close_export()
        self.listener.close()
        self.daemon.close()
        self.file.close()


_TURN = bytes(255 - i for i in range(256))


def turned(data: bytes) -> bytes:
    return data.translate(_TURN)


def new_image() -> bytes:
    """What the export reads as."""
    image = bytearray(OLD)
    for start, end in DAEMONS_BLOCKS:
        image[start * BLOCK : end * BLOCK] = turned(OLD[start * BLOCK : end * BLOCK])
    return bytes(image) + bytes(SIZE - RANDOM_BYTES)


NEW = new_image()


def new(offset: int, length: int) -> bytes:
    return NEW[offset : offset + length]


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        bench = Bench(directory)
        yield bench
        bench.close()


@pytest.fixture
def client(bench: Bench) -> Iterator[Client]:
    client = Client(bench)
    yield client
    client.socket.close()


def test_pass_down_needs_no_worker(bench: Bench, client: Client) -> None:
    """DMU-146, UNDO-26: ranges the worker does not own are answered without it, in order, in one batch."""
    ranges = {1: (0, 100 * BLOCK), 2: (200 * BLOCK, 1), 3: (SIZE - 10, 10), 4: (BLOCK + 1, 999)}
    client.send(*(request(READ, cookie, *where) for cookie, where in ranges.items()))
    replies = client.replies({cookie: length for cookie, (_, length) in ranges.items()})
    assert list(replies) == [1, 2, 3, 4]
    for cookie, (offset, length) in ranges.items():
        assert replies[cookie] == (0, new(offset, length))
    assert bench.taken == []
    assert bench.read_path.reads_passed_down == 4
    assert bench.export.in_flight_bytes == 0


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (100 * BLOCK, BLOCK),
        (100 * BLOCK + 1, 1),
        (100 * BLOCK + 511, 2),
        (100 * BLOCK - 7, 14),
        (99 * BLOCK, 300 * BLOCK),
        (199 * BLOCK + 100, 101 * BLOCK),
        (300 * BLOCK + 13, 2 * MAX_BIO_BYTES),
        (0, 3000 * BLOCK),
    ],
)
def test_any_alignment_and_mixture(bench: Bench, client: Client, offset: int, length: int) -> None:
    """DMU-182, DMU-178: bios are whole sectors of at most 1 MiB, whatever the request; the bytes are the image's."""
    client.send(request(READ, 9, offset, length))
    assert bench.taken
    while bench.taken:
        message = bench.taken[-1]
        assert message.bio.length <= MAX_BIO_BYTES
        assert message.bio.length % 512 == 0
        assert client.receive() == b""
        bench.answer(message)
    assert client.replies({9: length}) == {9: (0, new(offset, length))}
    assert bench.export.in_flight_bytes == 0


def test_replies_in_any_order(bench: Bench, client: Client) -> None:
    """DMU-46: a request that is answered late holds up no other."""
    client.send(*(request(READ, i, (100 + i) * BLOCK, BLOCK) for i in range(3)), request(READ, 3, 0, BLOCK))
    assert list(client.replies({3: BLOCK})) == [3]
    for cookie in (2, 0, 1):
        bench.answer(next(m for m in bench.taken if m.bio.sector == (100 + cookie) * 8))
        assert client.replies({cookie: BLOCK}) == {cookie: (0, new((100 + cookie) * BLOCK, BLOCK))}


@pytest.mark.parametrize("code", [1, 2, 9])
def test_failed_piece_fails_its_request_alone(bench: Bench, client: Client, code: int) -> None:
    """DMU-65 to DMU-67: any failed piece makes the whole request EIO, and the connection goes on."""
    client.send(request(READ, 1, 100 * BLOCK, 3000 * 512), request(READ, 2, 150 * BLOCK, BLOCK))
    messages = list(bench.taken)
    bench.answer(messages[0], code)
    for message in messages[1:]:
        bench.answer(message)
    assert client.replies({2: BLOCK}) == {1: (errno.EIO, b""), 2: (0, new(150 * BLOCK, BLOCK))}
    assert bench.export.in_flight_bytes == 0


def test_failed_base_read(bench: Bench, client: Client) -> None:
    bench.base.fails = True
    client.send(request(READ, 1, 0, BLOCK), request(READ, 2, 99 * BLOCK, 2 * BLOCK))
    bench.answer(bench.taken[0])
    assert client.replies({}) == {1: (errno.EIO, b""), 2: (errno.EIO, b"")}


def test_pass_down_withdrawn_while_reading(bench: Bench, client: Client) -> None:
    """UNDO-26: a base read is believed only if the shared map still allows it afterwards."""
    bench.shared.mark_merged(100, 100)
    bench.base.withdraw = bench.shared
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    assert client.receive() == b""
    bench.answer(bench.taken[0])
    assert client.replies({1: BLOCK}) == {1: (0, new(100 * BLOCK, BLOCK))}
    assert bench.read_path.reads_passed_down == 0


def test_merged_blocks_are_passed_down(bench: Bench, client: Client) -> None:
    """UNDO-26: once marked merged, a block is read from the base."""
    bench.shared.mark_merged(100, 100)
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    assert client.replies({1: BLOCK}) == {1: (0, OLD[100 * BLOCK : 101 * BLOCK])}


REFUSED = {
    "behind the end": (request(READ, 5, SIZE, 1), errno.EINVAL),
    "over the end": (request(READ, 5, SIZE - 1, 2), errno.EINVAL),
    "offset overflow": (request(READ, 5, (1 << 64) - 1, 2), errno.EINVAL),
    "empty read": (request(READ, 5, 0, 0), errno.EINVAL),
    "too long": (request(READ, 5, 0, MAX_REQUEST_BYTES + 1), errno.EINVAL),
    "flags": (request(READ, 5, 0, 1, flags=4), errno.EINVAL),
    "write": (request(WRITE, 5, 0, 3) + b"abc", errno.EPERM),
    "long write": (request(WRITE, 5, 0, 3 << 20) + bytes(3 << 20), errno.EPERM),
    "trim": (request(TRIM, 5, 0, BLOCK), errno.EPERM),
    "write zeroes": (request(WRITE_ZEROES, 5, 0, BLOCK), errno.EPERM),
    "flush": (request(FLUSH, 5), errno.EINVAL),
    "cache": (request(CACHE, 5, 0, BLOCK), errno.EINVAL),
    "unknown command": (request(999, 5), errno.EINVAL),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(bench: Bench, client: Client, case: str) -> None:
    raw, number = REFUSED[case]
    for start in range(0, len(raw), 100_000):
        client.send(raw[start : start + 100_000])
    client.send(request(READ, 6, 0, BLOCK))
    assert client.replies({6: BLOCK}) == {5: (number, b""), 6: (0, new(0, BLOCK))}
    assert bench.export.in_flight_bytes == 0


@pytest.mark.parametrize(
    "raw",
    [bytes(28), request(WRITE, 1, 0, MAX_REQUEST_BYTES + 1), b"GET / HTTP/1.1\r\n" * 2, request(DISC, 0)],
    ids=["zeros", "huge write", "another protocol", "goodbye"],
)
def test_only_that_connection_is_closed(bench: Bench, client: Client, raw: bytes) -> None:
    other = Client(bench)
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    client.send(raw)
    assert client.receive() is None
    assert len(bench.export.connections) == 1
    other.send(request(READ, 2, 0, BLOCK))
    assert other.replies({2: BLOCK}) == {2: (0, new(0, BLOCK))}
    assert bench.export.in_flight_bytes == BLOCK
    bench.answer(bench.taken[0])
    assert bench.export.in_flight_bytes == 0
    other.socket.close()


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_harm_nobody_else(bench: Bench, client: Client, seed: int) -> None:
    choice = random.Random(seed)
    stream = bytearray(
        b"".join(
            request(choice.choice([0, 0, 1, 4, 7]), i, choice.randrange(SIZE), choice.randrange(4000)) + bytes(99)
            for i in range(20)
        )
    )
    for _ in range(choice.randrange(1, 6)):
        stream[choice.randrange(len(stream))] = choice.randrange(256)
    other = Client(bench)
    for start in range(0, len(stream), 777):
        try:
            client.send(bytes(stream[start : start + 777]))
        except (BrokenPipeError, ConnectionResetError):
            break
    other.send(request(READ, 2, 0, BLOCK))
    assert other.replies({2: BLOCK}) == {2: (0, new(0, BLOCK))}
    client.socket.close()
    other.socket.close()
    while bench.taken:
        bench.answer(bench.taken[0])
    bench.turn()
    assert bench.export.in_flight_bytes == 0
    assert bench.export.connections == set()


def test_connection_credit(bench: Bench, client: Client) -> None:
    """A connection has 4 MiB in flight: the rest is not even parsed until replies have left."""
    count = CREDIT_BYTES // (64 << 10) + 10
    client.send(*(request(READ, i, (300 + i * 16) * BLOCK, 64 << 10) for i in range(count)))
    assert len(bench.taken) == CREDIT_BYTES // (64 << 10)
    assert bench.export.in_flight_bytes == CREDIT_BYTES
    answered = 0
    while bench.taken:
        bench.answer(bench.taken[0])
        answered += len(client.replies(dict.fromkeys(range(count), 64 << 10)))
    assert answered == count
    assert bench.export.in_flight_bytes == 0


def test_number_of_small_requests_is_bounded(bench: Bench, client: Client) -> None:
    client.send(*(request(READ, i, 100 * BLOCK, 1) for i in range(3000)))
    assert len(bench.taken) == CREDIT_BYTES // MIN_CHARGE_BYTES
    while bench.taken:
        for message in list(bench.taken):
            bench.answer(message)
        client.receive()
    assert bench.export.in_flight_bytes == 0


def test_large_request_goes_alone(bench: Bench, client: Client) -> None:
    """A request above the credit is admitted when nothing else is in flight, and is served."""
    client.send(request(READ, 1, 100 * BLOCK, BLOCK), request(READ, 2, 3000 * BLOCK, 20 << 20), request(READ, 3, 0, 1))
    assert client.receive() == b""
    bench.answer(bench.taken[0])
    replies = client.replies({1: BLOCK, 2: 20 << 20, 3: 1})
    assert list(replies) == [1, 2, 3]
    assert replies[2] == (0, bytes(20 << 20))


def test_export_credit_is_shared_in_order(bench: Bench) -> None:
    """16 MiB for all connections; who waited first goes first, and nobody waits for ever."""
    clients = [Client(bench) for _ in range(6)]
    piece = 1 << 20
    for client in clients:
        client.send(*(request(READ, i, 300 * BLOCK + i * piece, piece) for i in range(4)))
    assert bench.export.in_flight_bytes == EXPORT_CREDIT_BYTES
    seen = [0] * len(clients)
    while bench.taken:
        bench.answer(bench.taken[0])
        assert bench.export.in_flight_bytes <= EXPORT_CREDIT_BYTES
        for i, client in enumerate(clients):
            seen[i] += len(client.replies(dict.fromkeys(range(4), piece)))
    assert seen == [4] * len(clients)
    for client in clients:
        client.socket.close()


def test_client_that_does_not_drain_is_cut(bench: Bench, client: Client) -> None:
    """Replies that nobody takes for 30 s end the connection and give the credit back; others do not notice."""
    client.send(request(READ, 99, 100 * BLOCK, BLOCK), *(request(READ, i, 3000 * BLOCK, 1 << 20) for i in range(20)))
    assert bench.export.in_flight_bytes > 0
    bench.clock.advance(STALL_MS - 1)
    # One more reply for it is no progress of the client's.
    bench.answer(bench.taken[0])
    assert len(bench.export.connections) == 1
    assert bench.export.next_deadline_ms() == STALL_MS
    bench.clock.advance(1)
    bench.turn()
    assert bench.export.connections == set()
    assert bench.export.in_flight_bytes == 0
    assert bench.export.next_deadline_ms() is None


@pytest.mark.parametrize(("count", "length"), [(40, 1 << 20), (1, 28 << 20)])
def test_client_that_drains_slowly_is_not_cut(bench: Bench, client: Client, count: int, length: int) -> None:
    """Whether the socket takes more at once, or only after most of its buffer has been drained."""
    client.send(*(request(READ, i, 3000 * BLOCK, length) for i in range(count)))
    received = 0
    while received < count * (length + REPLY.size):
        bench.clock.advance(STALL_MS - 1)
        bench.turn()
        got = client.receive(1 << 20)
        assert got is not None
        received += len(got)
    assert bench.export.next_deadline_ms() is None


def test_client_that_never_negotiates_is_cut(bench: Bench) -> None:
    silent = Client(bench, negotiate=False)
    bench.clock.advance(STALL_MS)
    bench.turn()
    assert silent.receive() is not None
    assert bench.export.connections == set()
    silent.socket.close()


def test_abort_gets_its_reply(bench: Bench) -> None:
    leaving = Client(bench, negotiate=False)
    leaving.receive(18)
    leaving.send(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 2, 0))
    reply = leaving.receive()
    assert reply is not None
    assert struct.unpack(">QIII", reply)[1:] == (2, 1, 0)
    assert bench.export.connections == set()
    leaving.socket.close()


def test_number_of_connections_is_bounded(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [Client(bench, negotiate=False) for _ in range(MAX_CONNECTIONS + 1)]
    assert len(bench.export.connections) == MAX_CONNECTIONS
    assert clients[-1].receive() is None
    assert clients[0].receive() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert "64 are connected" in capsys.readouterr().err
    for client in clients:
        client.socket.close()


def test_close_cuts_everybody(bench: Bench, client: Client) -> None:
    """DMU-106: reads still under way end without harm after their client is gone."""
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    bench.close_export()
    assert client.receive() is None
    bench.taken.clear()
    bench.target.destroy()
    bench.daemon.close()
    assert bench.export.in_flight_bytes == 0

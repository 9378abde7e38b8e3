"""The export over real sockets: who is served how, who is refused, and who is cut off."""

import errno
import random
import struct
import tempfile
from collections.abc import Iterator

import pytest
from exportrig import BLOCK, OLD, SIZE, Bench, BenchClient, new, request

from snapd.block.bio import MAX_BIO_BYTES
from snapd.device.connection import CREDIT_BYTES, OWN_CREDIT_BYTES, STALL_MS
from snapd.device.datapath import LOCAL_BYTES
from snapd.device.export import CREDIT_BYTES as EXPORT_CREDIT_BYTES
from snapd.device.export import MAX_CONNECTIONS
from snapd.device.nbd import MAX_REQUEST_BYTES, REPLY, Command
from snapd.device.requests import MIN_CHARGE_BYTES

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, _BLOCK_STATUS = Command


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        bench = Bench(directory)
        yield bench
        bench.close()


@pytest.fixture
def client(bench: Bench) -> Iterator[BenchClient]:
    client = BenchClient(bench)
    yield client
    client.socket.close()


def test_pass_down_needs_no_worker(bench: Bench, client: BenchClient) -> None:
    """DMU-146, UNDO-26: ranges the worker does not own are answered without it, in order, in one batch."""
    ranges = {1: (0, 100 * BLOCK), 2: (200 * BLOCK, 1), 3: (SIZE - 10, 10), 4: (BLOCK + 1, 999)}
    client.send(*(request(READ, cookie, *where) for cookie, where in ranges.items()))
    replies = client.replies({cookie: length for cookie, (_, length) in ranges.items()})
    assert list(replies) == [1, 2, 3, 4]
    for cookie, (offset, length) in ranges.items():
        assert replies[cookie] == (0, new(offset, length))
    assert bench.taken == []
    assert bench.data_path.reads_passed_down == 4
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
def test_any_alignment_and_mixture(bench: Bench, client: BenchClient, offset: int, length: int) -> None:
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


def test_replies_in_any_order(bench: Bench, client: BenchClient) -> None:
    """DMU-46: a request that is answered late holds up none that came later, and none that the host serves."""
    for i in range(3):
        client.send(request(READ, i, (100 + i) * BLOCK, BLOCK))
    client.send(request(READ, 3, 0, BLOCK))
    assert list(client.replies({3: BLOCK})) == [3]
    for cookie in (2, 0, 1):
        bench.answer(next(m for m in bench.taken if m.bio.sector == (100 + cookie) * 8))
        assert client.replies({cookie: BLOCK}) == {cookie: (0, new((100 + cookie) * BLOCK, BLOCK))}


@pytest.mark.parametrize(("code", "number"), [(1, errno.EIO), (2, errno.ENOTSUP), (9, errno.EIO)])
def test_failed_piece_fails_its_request_alone(bench: Bench, client: BenchClient, code: int, number: int) -> None:
    """DMU-65 to DMU-67: any failed piece fails the whole request, and the connection goes on."""
    client.send(request(READ, 1, 100 * BLOCK, 3000 * 512), request(READ, 2, 150 * BLOCK, BLOCK))
    messages = list(bench.taken)
    bench.answer(messages[0], code)
    for message in messages[1:]:
        bench.answer(message)
    assert client.replies({2: BLOCK}) == {1: (number, b""), 2: (0, new(150 * BLOCK, BLOCK))}
    assert bench.export.in_flight_bytes == 0


def test_failed_base_read(bench: Bench, client: BenchClient) -> None:
    bench.store.fails = errno.EIO
    client.send(request(READ, 1, 0, BLOCK), request(READ, 2, 99 * BLOCK, 2 * BLOCK))
    bench.answer(bench.taken[0])
    assert client.replies({}) == {1: (errno.EIO, b""), 2: (errno.EIO, b"")}


def test_pass_down_withdrawn_while_reading(bench: Bench, client: BenchClient) -> None:
    """UNDO-26: a base read is believed only if the shared map still allows it afterwards."""
    bench.shared.mark_merged(100, 100)
    bench.store.withdraw = bench.shared
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    assert client.receive() == b""
    bench.answer(bench.taken[0])
    assert client.replies({1: BLOCK}) == {1: (0, new(100 * BLOCK, BLOCK))}
    assert bench.data_path.reads_passed_down == 0


def test_merged_blocks_are_passed_down(bench: Bench, client: BenchClient) -> None:
    """UNDO-26: once marked merged, a block is read from the base."""
    bench.shared.mark_merged(100, 100)
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    assert client.replies({1: BLOCK}) == {1: (0, OLD[100 * BLOCK : 101 * BLOCK])}


REFUSED = {
    "behind the end": (request(READ, 5, SIZE, 1), errno.EINVAL),
    "over the end": (request(READ, 5, SIZE - 1, 2), errno.EINVAL),
    "offset overflow": (request(READ, 5, (1 << 64) - 1, 2), errno.EINVAL),
    "empty read": (request(READ, 5, 0, 0), errno.EINVAL),
    "too long": (request(READ, 5, 0, MAX_REQUEST_BYTES + 1), errno.EOVERFLOW),
    "flags": (request(READ, 5, 0, 1, flags=16), errno.EINVAL),
    "a flag of another command": (request(READ, 5, 0, BLOCK, flags=2), errno.EINVAL),
    "write": (request(WRITE, 5, 0, 3) + b"abc", errno.EPERM),
    "long write": (request(WRITE, 5, 0, 3 << 20) + bytes(3 << 20), errno.EPERM),
    "trim": (request(TRIM, 5, 0, BLOCK), errno.EPERM),
    "write zeroes": (request(WRITE_ZEROES, 5, 0, BLOCK), errno.EPERM),
    "flush of a range": (request(FLUSH, 5, 0, BLOCK), errno.EINVAL),
    "block status that was not negotiated": (request(7, 5, 0, BLOCK), errno.EINVAL),
    "cache": (request(CACHE, 5, 0, BLOCK), errno.EINVAL),
    "unknown command": (request(999, 5), errno.EINVAL),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(bench: Bench, client: BenchClient, case: str) -> None:
    raw, number = REFUSED[case]
    client.send(raw)
    client.send(request(READ, 6, 0, BLOCK))
    assert client.replies({6: BLOCK}) == {5: (number, b""), 6: (0, new(0, BLOCK))}
    assert bench.export.in_flight_bytes == 0


@pytest.mark.parametrize(
    "raw",
    [bytes(28), request(WRITE, 1, 0, MAX_REQUEST_BYTES + 1), b"GET / HTTP/1.1\r\n" * 2, request(DISC, 0)],
    ids=["zeros", "huge write", "another protocol", "goodbye"],
)
def test_only_that_connection_is_closed(bench: Bench, client: BenchClient, raw: bytes) -> None:
    other = BenchClient(bench)
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
def test_random_bytes_harm_nobody_else(bench: Bench, client: BenchClient, seed: int) -> None:
    choice = random.Random(seed)
    stream = bytearray(
        b"".join(
            request(choice.choice([0, 0, 1, 4, 7]), i, choice.randrange(SIZE), choice.randrange(4000)) + bytes(99)
            for i in range(20)
        )
    )
    for _ in range(choice.randrange(1, 6)):
        stream[choice.randrange(len(stream))] = choice.randrange(256)
    other = BenchClient(bench)
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
    assert not bench.export.connections


def test_connection_credit(bench: Bench, client: BenchClient) -> None:
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


def test_number_of_small_requests_is_bounded(bench: Bench, client: BenchClient) -> None:
    client.send(*(request(READ, i, 100 * BLOCK, 1) for i in range(3000)))
    assert len(bench.taken) == CREDIT_BYTES // MIN_CHARGE_BYTES
    while bench.taken:
        for message in list(bench.taken):
            bench.answer(message)
        client.receive()
    assert bench.export.in_flight_bytes == 0


def test_large_request_goes_alone(bench: Bench, client: BenchClient) -> None:
    """A request above the credit is admitted when nothing else is in flight, and is served."""
    client.send(request(READ, 1, 100 * BLOCK, BLOCK), request(READ, 2, 3000 * BLOCK, 20 << 20), request(READ, 3, 0, 1))
    assert client.receive() == b""
    bench.answer(bench.taken[0])
    replies = client.replies({1: BLOCK, 2: 20 << 20, 3: 1})
    assert list(replies) == [1, 2, 3]
    assert replies[2] == (0, bytes(20 << 20))


def test_room_is_shared_in_order(bench: Bench) -> None:
    """Reads of the daemon that find no room in the arena wait; who waited first goes first, and nobody for ever."""
    clients = [BenchClient(bench) for _ in range(6)]
    piece = 1 << 20
    for client in clients:
        client.send(*(request(READ, i, 300 * BLOCK + i * piece, piece) for i in range(4)))
    assert piece <= bench.export.in_flight_bytes < EXPORT_CREDIT_BYTES
    assert bench.data_path.is_short_of_room
    seen = [0] * len(clients)
    first: list[int] = []
    while bench.taken:
        bench.answer(bench.taken[0])
        for i, client in enumerate(clients):
            count = len(client.replies(dict.fromkeys(range(4), piece)))
            seen[i] += count
            if count and i not in first:
                first.append(i)
    assert seen == [4] * len(clients)
    assert first == [*range(len(clients))]
    assert bench.daemon_room == len(bench.memory) - LOCAL_BYTES
    for client in clients:
        client.socket.close()


def test_export_credit_is_shared_in_order(bench: Bench) -> None:
    """16 MiB for all connections, of which slow readers hold most; who waits for credit gets it when they read.

    A small request need not wait: each connection has a part of its own.
    """
    piece, count = 1 << 20, 16
    bound = EXPORT_CREDIT_BYTES + 6 * OWN_CREDIT_BYTES
    slow = [BenchClient(bench) for _ in range(5)]
    for client in slow:
        client.send(*(request(READ, i, 3000 * BLOCK, piece) for i in range(count)))
        assert bench.export.in_flight_bytes <= bound
    assert bench.export.in_flight_bytes > EXPORT_CREDIT_BYTES - piece
    late = BenchClient(bench)
    late.send(request(READ, 0, 3000 * BLOCK, OWN_CREDIT_BYTES))
    assert late.replies({0: OWN_CREDIT_BYTES}) == {0: (0, new(3000 * BLOCK, OWN_CREDIT_BYTES))}
    late.send(request(READ, 1, 100 * BLOCK, piece))
    assert bench.taken == []
    received = [0] * len(slow)
    for _ in range(count):
        for i, client in enumerate(slow):
            got = client.receive()
            assert got is not None
            received[i] += len(got)
            assert bench.export.in_flight_bytes <= bound
    assert received == [count * (piece + REPLY.size)] * len(slow)
    bench.answer_everything()
    assert late.replies({1: piece}) == {1: (0, new(100 * BLOCK, piece))}
    assert bench.export.in_flight_bytes == 0
    for client in [*slow, late]:
        client.socket.close()


def test_client_that_does_not_drain_is_cut(bench: Bench, client: BenchClient) -> None:
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
    assert not bench.export.connections
    assert bench.export.in_flight_bytes == 0
    assert bench.export.next_deadline_ms() is None


@pytest.mark.parametrize(("count", "length"), [(40, 1 << 20), (1, 28 << 20)])
def test_client_that_drains_slowly_is_not_cut(bench: Bench, client: BenchClient, count: int, length: int) -> None:
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
    silent = BenchClient(bench, negotiate=False)
    bench.clock.advance(STALL_MS)
    bench.turn()
    assert silent.receive() is not None
    assert not bench.export.connections
    silent.socket.close()


def test_abort_gets_its_reply(bench: Bench) -> None:
    leaving = BenchClient(bench, negotiate=False)
    leaving.receive(18)
    leaving.send(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 2, 0))
    reply = leaving.receive()
    assert reply is not None
    assert struct.unpack(">QIII", reply)[1:] == (2, 1, 0)
    assert not bench.export.connections
    leaving.socket.close()


def test_number_of_connections_is_bounded(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [BenchClient(bench) for _ in range(MAX_CONNECTIONS)]
    refused = BenchClient(bench, negotiate=False)
    assert len(bench.export.connections) == MAX_CONNECTIONS
    assert refused.receive() is None
    assert "64 are connected" in capsys.readouterr().err
    clients[0].send(request(READ, 1, 3000 * BLOCK, BLOCK))
    assert clients[0].replies({1: BLOCK}) == {1: (0, new(3000 * BLOCK, BLOCK))}
    for client in [*clients, refused]:
        client.socket.close()


def test_a_client_that_has_not_negotiated_makes_room(bench: Bench) -> None:
    """The oldest of them goes when others want to connect; nobody can be kept out by clients that say nothing."""
    strangers = [BenchClient(bench, negotiate=False) for _ in range(MAX_CONNECTIONS)]
    assert strangers[0].receive() == b"NBDMAGICIHAVEOPT\x00\x03"
    late = BenchClient(bench)
    assert len(bench.export.connections) == MAX_CONNECTIONS
    assert strangers[0].receive() is None
    assert strangers[1].receive() == b"NBDMAGICIHAVEOPT\x00\x03"
    late.send(request(READ, 1, 3000 * BLOCK, BLOCK))
    assert late.replies({1: BLOCK}) == {1: (0, new(3000 * BLOCK, BLOCK))}
    for client in [*strangers, late]:
        client.socket.close()


def test_close_cuts_everybody(bench: Bench, client: BenchClient) -> None:
    """DMU-106: reads still under way end without harm after their client is gone."""
    client.send(request(READ, 1, 100 * BLOCK, BLOCK))
    bench.close_export()
    assert client.receive() is None
    bench.taken.clear()
    bench.target.destroy()
    bench.daemon.close()
    assert bench.export.in_flight_bytes == 0

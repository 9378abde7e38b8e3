"""The requests of a client on the wire: payload in any pieces, every refusal, credit, room, and the end of a host."""

import errno
import os
import random
import struct
import tempfile
from collections.abc import Iterator

import pytest
from exportrig import BLOCK, OLD, SIZE, Bench, BenchClient, new, request

from snapd.block.bio import MAX_BIO_BYTES, BioOp
from snapd.device.config import Route
from snapd.device.connection import CREDIT_BYTES, STALL_MS
from snapd.device.datapath import LOCAL_BYTES
from snapd.device.export import CREDIT_BYTES as EXPORT_CREDIT_BYTES
from snapd.device.nbd import (
    ALLOCATION_CONTEXT_ID,
    DATA_CHUNK,
    ERROR_CHUNK,
    EXTENT,
    MAX_REQUEST_BYTES,
    REPLY,
    STATUS_CHUNK,
    Chunk,
    Command,
    CommandFlag,
)
from snapd.device.requests import MIN_CHARGE_BYTES
from snapd.device.writing import WRITE_PIECE_BYTES
from snapd.dmuser.message import Flag

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = Command
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = CommandFlag
CONTENT = random.Random(9).randbytes(MAX_REQUEST_BYTES)


def serve(route: Route) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        bench = Bench(directory, route)
        yield bench
        bench.close()


@pytest.fixture
def snapshot() -> Iterator[Bench]:
    yield from serve(Route.SNAPSHOT)


@pytest.fixture
def raw() -> Iterator[Bench]:
    yield from serve(Route.RAW)


@pytest.fixture
def worker() -> Iterator[Bench]:
    yield from serve(Route.WORKER)


@pytest.fixture(params=[Route.RAW, Route.WORKER])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from serve(request.param)


@pytest.fixture
def clients() -> Iterator[list[BenchClient]]:
    """What a test puts in here is closed at its end."""
    clients: list[BenchClient] = []
    yield clients
    for client in clients:
        client.socket.close()


@pytest.fixture
def client(bench: Bench, clients: list[BenchClient]) -> BenchClient:
    clients.append(BenchClient(bench))
    return clients[-1]


def content(bench: Bench, offset: int, length: int) -> bytes:
    """What is stored now."""
    if bench.route is Route.RAW:
        return bench.store.content(offset, length)
    return bytes(bench.image[offset : offset + length])


def push(bench: Bench, client: BenchClient, data: bytes) -> None:
    """Send all of it, with the daemon doing its work meanwhile."""
    sent = 0
    while sent < len(data):
        got = client.offer(data[sent : sent + (4 << 20)])
        assert got or bench.taken, "neither the client nor the daemon gets on"
        sent += got
        bench.answer_everything()


@pytest.mark.parametrize(
    "length",
    [
        *(512, 1024, BLOCK, (64 << 10) - 512, 64 << 10, WRITE_PIECE_BYTES - 512, WRITE_PIECE_BYTES),
        *(WRITE_PIECE_BYTES + 512, MAX_BIO_BYTES, 3 * MAX_BIO_BYTES + 1536, CREDIT_BYTES + 512, MAX_REQUEST_BYTES),
    ],
)
def test_writes_of_every_size(bench: Bench, client: BenchClient, length: int) -> None:
    """DMU-182: cut into what a bio may be; then read back as one request, and nothing around it is touched."""
    offset = 3 * BLOCK + 512
    push(bench, client, request(WRITE, 1, offset, length) + CONTENT[:length])
    assert client.replies() == {1: (0, b"")}
    assert content(bench, offset, length) == CONTENT[:length]
    assert content(bench, 0, offset) == OLD[:offset]
    assert content(bench, offset + length, 512) == (OLD + bytes(SIZE - len(OLD)))[offset + length :][:512]
    push(bench, client, request(READ, 2, offset, length))
    received = bytearray()
    while len(received) < REPLY.size + length:
        got = client.receive()
        assert got is not None
        received += got
        bench.answer_everything()
    assert received[REPLY.size :] == CONTENT[:length]
    assert bench.export.in_flight_bytes == 0
    assert bench.daemon_room == len(bench.memory) - LOCAL_BYTES


@pytest.mark.parametrize("piece", [1, 13, 511, 512, 4096])
def test_payload_in_small_pieces(bench: Bench, client: BenchClient, piece: int) -> None:
    """Headers and payload of several requests, cut anywhere, also inside a header."""
    stream = b"".join(
        request(WRITE, i, i * BLOCK, 1536)
        + CONTENT[i * 1536 : (i + 1) * 1536]
        + request(READ, 100 + i, SIZE - 512, 512)
        for i in range(3)
    )
    for start in range(0, len(stream), piece):
        client.socket.send(stream[start : start + piece])
        bench.turn()
    bench.answer_everything()
    replies = client.replies({100 + i: 512 for i in range(3)})
    assert replies == dict.fromkeys(range(3), (0, b"")) | {100 + i: (0, bytes(512)) for i in range(3)}
    for i in range(3):
        assert content(bench, i * BLOCK, 1536) == CONTENT[i * 1536 : (i + 1) * 1536]


@pytest.mark.parametrize("seed", range(4))
def test_random_streams(bench: Bench, client: BenchClient, seed: int) -> None:
    """Requests of all kinds, sent in random pieces, against a copy in memory; every reply comes once."""
    print(f"seed {seed}")
    choice = random.Random(seed)
    model = bytearray(OLD + bytes(SIZE - len(OLD)))
    for _ in range(4):
        stream = bytearray()
        expected: dict[int, tuple[int, bytes]] = {}
        # Not one byte twice in a round: in flight together, they may be done in any order.
        starts = choice.sample(range(SIZE // (1 << 20)), 12)
        for cookie, start in enumerate(starts):
            offset = (start << 20) + 512 * choice.randrange(64)
            length = 512 * choice.choice([1, 2, 9, 128, 1000, 1984])
            flags = choice.choice([0, FUA])
            kind = choice.choice([READ, READ, WRITE, WRITE, WRITE_ZEROES, FLUSH])
            payload = b""
            if kind == READ:
                skew = choice.choice([0, 0, 1, 511])
                offset, length = offset + skew, length - skew
                expected[cookie] = 0, bytes(model[offset : offset + length])
            else:
                expected[cookie] = 0, b""
            if kind == WRITE:
                payload = choice.randbytes(length)
                model[offset : offset + length] = payload
            elif kind == WRITE_ZEROES:
                model[offset : offset + length] = bytes(length)
            stream += request(kind, cookie, *((0, 0) if kind == FLUSH else (offset, length)), flags) + payload
        replies: dict[int, tuple[int, bytes]] = {}
        received = bytearray()
        wanted = sum(REPLY.size + len(payload) for _, payload in expected.values())
        while stream or len(received) < wanted:
            count = client.offer(bytes(stream[: choice.choice([1, 28, 5000, 200_000])])) if stream else 0
            del stream[:count]
            if choice.random() < 0.5 or not count:
                bench.answer_everything()
            got = client.receive()
            assert got is not None
            received += got
            if not count and not got:
                bench.wait_until(lambda: bench.export.has_replies or bench.export.in_flight_bytes == 0)
        at = 0
        while at < len(received):
            _, number, cookie = REPLY.unpack_from(received, at)
            assert cookie not in replies
            at += REPLY.size
            length = len(expected[cookie][1])
            replies[cookie] = number, bytes(received[at : at + length])
            at += length
        assert replies == expected
        assert content(bench, 0, SIZE) == model
    assert bench.export.in_flight_bytes == 0
    assert bench.data_path.local.room() == LOCAL_BYTES


REFUSED = {
    "unaligned offset": (request(WRITE, 5, 1, 512), errno.EINVAL, 512),
    "unaligned length": (request(WRITE, 5, 0, 513), errno.EINVAL, 513),
    "over the end": (request(WRITE, 5, SIZE - 512, 1024), errno.ENOSPC, 1024),
    "far over the end": (request(WRITE, 5, 1 << 60, 512), errno.ENOSPC, 512),
    "offset overflow": (request(WRITE, 5, (1 << 64) - 512, 1 << 20), errno.ENOSPC, 1 << 20),
    "empty write": (request(WRITE, 5, 0, 0), errno.EINVAL, 0),
    "write with an unknown flag": (request(WRITE, 5, 0, 512, NO_HOLE), errno.EINVAL, 512),
    "largest write over the end": (request(WRITE, 5, SIZE, MAX_REQUEST_BYTES), errno.ENOSPC, MAX_REQUEST_BYTES),
    "trim over the end": (request(TRIM, 5, SIZE, 512), errno.ENOSPC, 0),
    "unaligned trim": (request(TRIM, 5, 0, 100), errno.EINVAL, 0),
    "empty trim": (request(TRIM, 5, 0, 0), errno.EINVAL, 0),
    "unaligned zeroes": (request(WRITE_ZEROES, 5, 512, 100), errno.EINVAL, 0),
    "zeroes over the end": (request(WRITE_ZEROES, 5, 0, SIZE + 512), errno.ENOSPC, 0),
    "zeroes that must be fast": (request(WRITE_ZEROES, 5, 0, 512, FAST_ZERO), errno.EINVAL, 0),
    "flush of a range": (request(FLUSH, 5, 512, 512), errno.EINVAL, 0),
    "cache": (request(CACHE, 5, 0, 512), errno.EINVAL, 0),
    "read over the end": (request(READ, 5, SIZE - 1, 2), errno.EINVAL, 0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(bench: Bench, client: BenchClient, case: str) -> None:
    """Its payload is skipped, nothing is changed, and the next request is served."""
    header, number, payload_bytes = REFUSED[case]
    push(bench, client, header + bytes(payload_bytes) + request(WRITE, 6, 0, 512) + CONTENT[:512])
    assert client.replies() == {5: (number, b""), 6: (0, b"")}
    assert content(bench, 0, 1024) == CONTENT[:512] + OLD[512:1024]
    assert content(bench, SIZE - BLOCK, BLOCK) == bytes(BLOCK)
    assert bench.export.in_flight_bytes == 0
    assert bench.traffic.errors == 1


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
@pytest.mark.parametrize("length", [512, 513, 3 << 20])
def test_read_only_comes_first(snapshot: Bench, clients: list[BenchClient], command: Command, length: int) -> None:
    """EPERM whatever else is wrong; a write's payload is skipped, however long."""
    clients.append(BenchClient(snapshot))
    payload = bytes(length) if command == WRITE else b""
    clients[0].send(request(command, 5, SIZE, length) + payload, request(READ, 6, 0, BLOCK))
    assert clients[0].replies({6: BLOCK}) == {5: (errno.EPERM, b""), 6: (0, new(0, BLOCK))}
    assert snapshot.taken == []


def test_flush_on_a_read_only_device(snapshot: Bench, clients: list[BenchClient]) -> None:
    """It has nothing to do, and does it."""
    clients.append(BenchClient(snapshot))
    clients[0].send(request(FLUSH, 5))
    assert clients[0].replies() == {5: (0, b"")}


def test_largest_write_is_the_limit(bench: Bench, client: BenchClient) -> None:
    """Beyond what was announced there is no way to go on: the connection ends."""
    client.send(request(WRITE, 5, 0, MAX_REQUEST_BYTES + 512))
    assert client.receive() is None
    assert not bench.export.connections


def test_flags_reach_the_worker(worker: Bench, clients: list[BenchClient]) -> None:
    """DMU-16, DMU-24: what a client asks for is what the worker is asked for, FUA on every piece of a write."""
    clients.append(BenchClient(worker))
    clients[0].send(
        request(WRITE, 1, 0, 2 * WRITE_PIECE_BYTES, FUA) + CONTENT[: 2 * WRITE_PIECE_BYTES],
        request(WRITE, 2, BLOCK, 512) + CONTENT[:512],
        request(FLUSH, 3),
        request(TRIM, 4, 0, BLOCK, FUA),
        request(WRITE_ZEROES, 5, 0, BLOCK),
        request(WRITE_ZEROES, 6, 0, BLOCK, NO_HOLE | FUA),
    )
    assert [(m.bio.op, m.bio.length, m.bio.flags) for m in worker.taken] == [
        (BioOp.WRITE, WRITE_PIECE_BYTES, Flag.FUA),
        (BioOp.WRITE, WRITE_PIECE_BYTES, Flag.FUA),
        (BioOp.WRITE, 512, 0),
        (BioOp.WRITE, 0, Flag.PREFLUSH | Flag.SYNC),
        (BioOp.DISCARD, BLOCK, Flag.FUA),
        (BioOp.WRITE_ZEROES, BLOCK, 0),
        (BioOp.WRITE_ZEROES, BLOCK, Flag.NOUNMAP | Flag.FUA),
    ]
    assert clients[0].receive() == b""
    worker.answer(worker.taken[0])
    assert clients[0].receive() == b""
    worker.answer_everything()
    assert list(clients[0].replies()) == [1, 2, 3, 4, 5, 6]


def test_durability_of_the_store(raw: Bench, clients: list[BenchClient]) -> None:
    """DMU-24: the reply to FUA and flush comes behind the store's flush, that of a plain write does not wait."""
    clients.append(BenchClient(raw))
    clients[0].send(request(WRITE, 1, 0, 512) + CONTENT[:512])
    assert clients[0].replies() == {1: (0, b"")}
    assert raw.store.calls == [("write", 0, 512)]
    for cookie, what in enumerate(
        [
            request(FLUSH, 2),
            request(WRITE, 3, 0, 512, FUA) + CONTENT[:512],
            request(WRITE_ZEROES, 4, 0, 512, FUA),
        ],
        start=2,
    ):
        raw.store.calls.clear()
        clients[0].send(what)
        raw.wait_until(lambda: raw.export.in_flight_bytes == 0)
        assert raw.store.calls[-1][0] == "flush"
        assert clients[0].replies() == {cookie: (0, b"")}


@pytest.mark.parametrize(
    ("number", "seen"), [(errno.ENOSPC, errno.ENOSPC), (errno.EIO, errno.EIO), (errno.EROFS, errno.EIO)]
)
def test_errors_of_the_store_are_the_clients(raw: Bench, clients: list[BenchClient], number: int, seen: int) -> None:
    """An errno that the protocol does not know becomes EIO; one failed piece fails a large write, once."""
    clients.append(BenchClient(raw))
    raw.store.fails = number
    length = 3 * WRITE_PIECE_BYTES
    clients[0].send(request(WRITE, 1, 0, length) + CONTENT[:length], request(FLUSH, 2), request(TRIM, 3, 0, 512))
    raw.wait_until(lambda: raw.export.in_flight_bytes == 0)
    assert clients[0].replies() == {1: (seen, b""), 2: (seen, b""), 3: (seen, b"")}
    assert raw.traffic.errors == 3


def test_failures_inside_a_batch(worker: Bench, clients: list[BenchClient]) -> None:
    """DMU-65: reads that are answered together fail one by one, the others keep their bytes."""
    clients.append(BenchClient(worker))
    clients[0].send(*(request(READ, i, i * BLOCK, BLOCK) for i in range(6)))
    for message in list(worker.taken):
        worker.answer(message, 1 if message.bio.sector // 8 in (0, 3, 5) else 0)
    replies = clients[0].replies(dict.fromkeys(range(6), BLOCK))
    assert replies == {
        i: (errno.EIO, b"") if i in (0, 3, 5) else (0, OLD[i * BLOCK : (i + 1) * BLOCK]) for i in range(6)
    }
    assert (worker.traffic.reads, worker.traffic.errors) == (6, 3)


# Structured replies.


def test_structured_reads(worker: Bench, clients: list[BenchClient]) -> None:
    """One data chunk with its offset, for small, unaligned and large reads; an error chunk for what fails."""
    clients.append(BenchClient(worker, structured=True))
    ranges = [(0, BLOCK), (BLOCK + 1, 700), (2 * BLOCK, 2 * MAX_BIO_BYTES + 512), (0, BLOCK), (8 * BLOCK + 3, 5)]
    for i, where in enumerate(ranges):
        clients[0].send(request(READ, i, *where, DF if i < 2 else 0))
        bad = i >= 3
        while worker.taken:
            worker.answer(worker.taken[0], 1 if bad else 0)
    chunks = clients[0].chunks()
    assert list(chunks) == [0, 1, 2, 3, 4]
    for i, (offset, length) in enumerate(ranges):
        ((kind, body),) = chunks[i]
        if i < 3:
            assert kind == Chunk.OFFSET_DATA
            assert body == DATA_CHUNK.pack(offset) + OLD[offset : offset + length]
        else:
            assert (kind, body) == (Chunk.ERROR, ERROR_CHUNK.pack(errno.EIO, 0))


def test_structured_replies_of_everything_else(bench: Bench, clients: list[BenchClient]) -> None:
    """Whatever is not a READ has one empty chunk, or an error chunk."""
    clients.append(BenchClient(bench, structured=True))
    client = clients[0]
    client.send(
        request(WRITE, 1, 0, 512) + CONTENT[:512],
        request(FLUSH, 2),
        request(TRIM, 3, 0, 512),
        request(WRITE_ZEROES, 4, 0, 512),
        request(WRITE, 5, 0, 5) + bytes(5),
        request(BLOCK_STATUS, 6, 0, 512),
        request(READ, 7, 0, MAX_REQUEST_BYTES + 512),
    )
    bench.answer_everything()
    bench.wait_until(lambda: bench.export.in_flight_bytes == 0)
    expected = {cookie: [(Chunk.NONE.value, b"")] for cookie in range(1, 5)}
    for cookie, number in ((5, errno.EINVAL), (6, errno.EINVAL), (7, errno.EOVERFLOW)):
        expected[cookie] = [(Chunk.ERROR.value, ERROR_CHUNK.pack(number, 0))]
    assert client.chunks() == expected


def extents_of(body: bytes) -> list[tuple[int, int]]:
    assert STATUS_CHUNK.unpack_from(body) == (ALLOCATION_CONTEXT_ID,)
    return list(EXTENT.iter_unpack(body[STATUS_CHUNK.size :]))


def test_block_status(snapshot: Bench, clients: list[BenchClient]) -> None:
    """The extents of the range, from its first byte on; one with REQ_ONE; none for a range that is not there."""
    clients.append(BenchClient(snapshot, allocation=True))
    clients[0].send(
        request(BLOCK_STATUS, 1, BLOCK, 299 * BLOCK + 512),
        request(BLOCK_STATUS, 2, BLOCK, SIZE - BLOCK, REQ_ONE),
        request(BLOCK_STATUS, 3, 150 * BLOCK + 512, 512),
        request(BLOCK_STATUS, 4, 0, SIZE + 1),
        request(BLOCK_STATUS, 5, 0, 0),
        request(BLOCK_STATUS, 6, 0, BLOCK, DF),
    )
    chunks = clients[0].chunks()
    assert {kind for cookie in (1, 2, 3) for kind, _ in chunks[cookie]} == {Chunk.BLOCK_STATUS}
    assert extents_of(chunks[1][0][1]) == [(99 * BLOCK, 0), (100 * BLOCK, 3), (100 * BLOCK, 0), (512, 3)]
    assert extents_of(chunks[2][0][1]) == [(99 * BLOCK, 0)]
    assert extents_of(chunks[3][0][1]) == [(512, 3)]
    for cookie in (4, 5, 6):
        assert chunks[cookie] == [(Chunk.ERROR, ERROR_CHUNK.pack(errno.EINVAL, 0))]
    assert snapshot.export.in_flight_bytes == 0


def test_block_status_is_bounded(raw: Bench, clients: list[BenchClient]) -> None:
    """At most 1024 extents in a reply; the client asks again from where it ends."""
    for block in range(0, 2400, 2):
        raw.store.discard(block * BLOCK, BLOCK)
    clients.append(BenchClient(raw, allocation=True))
    clients[0].send(request(BLOCK_STATUS, 1, 0, SIZE))
    ((_, body),) = clients[0].chunks()[1]
    assert extents_of(body) == [(BLOCK, 3 if block % 2 == 0 else 0) for block in range(1024)]


def test_block_status_that_cannot_be_found(raw: Bench, clients: list[BenchClient]) -> None:
    """EIO, and no claim."""
    clients.append(BenchClient(raw, allocation=True))
    clients[0].send(request(BLOCK_STATUS, 1, 0, SIZE))
    assert clients[0].chunks()[1][0][0] == Chunk.BLOCK_STATUS
    # It has a size, and nothing else can be learned of it.
    blind, seeing = os.open(f"/proc/self/fd/{raw.store.fd}", os.O_PATH), raw.store.fd
    raw.store.fd = blind
    clients[0].send(request(BLOCK_STATUS, 2, 0, SIZE))
    raw.store.fd = seeing
    os.close(blind)
    assert clients[0].chunks()[2] == [(Chunk.ERROR, ERROR_CHUNK.pack(errno.EIO, 0))]


# Credit and room.


def test_silent_writers_hold_nothing(worker: Bench, clients: list[BenchClient]) -> None:
    """A client that announces a write and goes silent holds no room and next to no credit, and is cut after 30 s."""
    announced = MAX_REQUEST_BYTES
    for _ in range(20):
        clients.append(BenchClient(worker))
        clients[-1].send(request(WRITE, 1, 0, announced) + bytes(WRITE_PIECE_BYTES - 1))
    assert worker.export.in_flight_bytes == 20 * MIN_CHARGE_BYTES
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES
    witness = BenchClient(worker)
    witness.send(request(WRITE, 1, 0, CREDIT_BYTES) + bytes(CREDIT_BYTES))
    worker.answer_everything()
    assert witness.replies() == {1: (0, b"")}
    worker.clock.advance(STALL_MS - 1)
    # One that goes on is not cut.
    clients[0].send(b"x")
    worker.clock.advance(1)
    worker.turn()
    assert len(worker.export.connections) == 2
    assert clients[1].receive() is None
    assert worker.export.in_flight_bytes == MIN_CHARGE_BYTES + WRITE_PIECE_BYTES
    witness.send(request(READ, 2, 0, 512))
    worker.answer_everything()
    assert witness.replies({2: 512})[2][0] == 0
    assert worker.export.next_deadline_ms() == 2 * STALL_MS - 1
    witness.socket.close()


def test_credit_of_a_writer(worker: Bench, clients: list[BenchClient]) -> None:
    """4 MiB of its payload are in flight, the rest stays in the socket until the daemon has answered."""
    clients.append(BenchClient(worker))
    stream = request(WRITE, 1, 0, 16 << 20) + CONTENT[: 16 << 20]
    sent = clients[0].offer(stream)
    pieces = CREDIT_BYTES // WRITE_PIECE_BYTES
    assert len(worker.taken) in (pieces - 1, pieces)
    assert worker.export.in_flight_bytes <= CREDIT_BYTES
    while sent < len(stream):
        worker.answer(worker.taken[0])
        assert worker.export.in_flight_bytes <= CREDIT_BYTES
        sent += clients[0].offer(stream[sent : sent + (1 << 20)])
    worker.answer_everything()
    assert clients[0].replies() == {1: (0, b"")}
    assert worker.image[: 16 << 20] == CONTENT[: 16 << 20]


def test_writer_that_waits_for_us_is_not_cut(worker: Bench, clients: list[BenchClient]) -> None:
    """DMU-184: while a worker is stuck or replaced, a client inside a write is not the one that makes no progress."""
    clients.append(BenchClient(worker))
    length = CREDIT_BYTES + WRITE_PIECE_BYTES
    sent = clients[0].offer(request(WRITE, 1, 0, length) + CONTENT[:length])
    for _ in range(3):
        worker.clock.advance(STALL_MS)
        worker.turn()
    assert len(worker.export.connections) == 1
    stream = request(WRITE, 1, 0, length) + CONTENT[:length]
    push(worker, clients[0], stream[sent:])
    worker.answer_everything()
    assert clients[0].replies() == {1: (0, b"")}
    assert worker.image[:length] == CONTENT[:length]


def test_slow_readers_do_not_pin_the_room(worker: Bench, clients: list[BenchClient]) -> None:
    """What a client does not take leaves the arena when others need the room."""
    piece, count = 1 << 20, 16
    for _ in range(3):
        clients.append(BenchClient(worker))
        clients[-1].send(*(request(READ, i, i * piece, piece) for i in range(count)))
        worker.answer_everything()
    assert worker.export.in_flight_bytes > 8 << 20
    witness = BenchClient(worker)
    for i in range(20):
        witness.send(request(READ, i, i * piece, piece))
        worker.answer_everything()
        assert witness.replies({i: piece}) == {i: (0, bytes(worker.image[i * piece : (i + 1) * piece]))}
    # And what they take at last is whole.
    for client in clients:
        received = bytearray()
        while len(received) < count * (piece + REPLY.size):
            got = client.receive()
            assert got
            received += got
            worker.answer_everything()
        for i in range(count):
            at = i * (piece + REPLY.size)
            assert REPLY.unpack_from(received, at)[1:] == (0, i)
            assert received[at + REPLY.size : at + REPLY.size + piece] == worker.image[i * piece : (i + 1) * piece]
    assert worker.export.in_flight_bytes == 0
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES
    witness.socket.close()


@pytest.mark.timeout(60)
def test_credit_without_room(worker: Bench, clients: list[BenchClient], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has come to its credit and finds no room waits for that, and holds up nobody meanwhile."""
    large, whole = 4 << 20, MAX_BIO_BYTES
    # What a connection has for itself would only move the borders.
    monkeypatch.setattr("snapd.device.connection.OWN_CREDIT_BYTES", 0)
    clients += [BenchClient(worker) for _ in range(7)]
    first, *readers, batch, second, waiting = clients
    # In front of the ring, so that what others give back does not come to use.
    first.send(request(READ, 1, 0, BLOCK))
    for reader in readers:
        reader.send(request(READ, 1, 0, large))
    batch.send(*(request(READ, i, i * whole, whole) for i in range(3)))
    credited = BLOCK + 3 * large + 3 * whole
    assert worker.export.in_flight_bytes == credited
    second.send(request(READ, 1, 0, 2 * whole))
    waiting.send(request(READ, 1, whole, whole))
    assert worker.export.in_flight_bytes == credited
    # Credit comes back piece by piece, but no room.
    for i in range(3):
        message = next(m for m in worker.taken if m.bio.sector == i * whole // 512 and m.bio.place > 3 * whole)
        worker.answer(message)
        assert batch.replies({i: whole}) == {i: (0, OLD[i * whole : (i + 1) * whole])}
    assert worker.export.in_flight_bytes <= EXPORT_CREDIT_BYTES
    assert worker.data_path.is_short_of_room
    lengths = {first: BLOCK, second: 2 * whole, waiting: whole} | dict.fromkeys(readers, large)
    received = dict.fromkeys(lengths, 0)
    worker.answer_everything()
    while worker.export.in_flight_bytes:
        for client in lengths:
            got = client.receive()
            assert got is not None
            received[client] += len(got)
        worker.answer_everything()
    for client in lengths:
        received[client] += len(client.receive() or b"")
    assert received == {client: REPLY.size + length for client, length in lengths.items()}
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES


def test_room_of_the_host_does_not_wait_for_a_worker(snapshot: Bench, clients: list[BenchClient]) -> None:
    """DMU-146: with a worker that is stuck on all it can have, whoever reads what is passed down goes on."""
    piece, count = 1 << 20, 16
    for _ in range(2):
        clients.append(BenchClient(snapshot))
        clients[-1].send(*(request(READ, i, 300 * BLOCK + i * piece, piece) for i in range(4)))
    assert snapshot.data_path.is_short_of_room
    # Who takes nothing holds the host's part of the room, too.
    clients.append(BenchClient(snapshot))
    clients[-1].send(*(request(READ, i, 3000 * BLOCK, piece) for i in range(count)))
    witness = BenchClient(snapshot)
    for i, (offset, length) in enumerate(
        [(0, BLOCK), (0, 100 * BLOCK), (3000 * BLOCK, 3 * piece), (1, 99 * BLOCK)] * 4
    ):
        witness.send(request(READ, i, offset, length))
        assert witness.replies({i: length}) == {i: (0, new(offset, length))}
    witness.socket.close()


def test_nobody_passes_who_waits_for_room(worker: Bench, clients: list[BenchClient]) -> None:
    """A small request for which there would be room comes behind a large one for which there is none."""
    piece = 1 << 20
    clients += [BenchClient(worker) for _ in range(4)]
    for client in clients[:2]:
        client.send(*(request(READ, i, i * piece, piece) for i in range(4)))
    large, small = clients[2:]
    before = len(worker.taken)
    large.send(request(READ, 1, 8 * piece, piece))
    small.send(request(READ, 1, 9 * piece, 512))
    assert worker.daemon_room > 512
    assert len(worker.taken) == before
    worker.answer_everything()
    for client in clients[:2]:
        assert list(client.replies(dict.fromkeys(range(4), piece))) == [0, 1, 2, 3]
    assert large.replies({1: piece})[1][0] == 0
    assert small.replies({1: 512})[1][0] == 0
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES


def test_refused_for_credit_costs_no_room(worker: Bench, clients: list[BenchClient]) -> None:
    """A request that is tried again and again does not use up the arena with what it never had."""
    clients.append(BenchClient(worker))
    count = CREDIT_BYTES // BLOCK
    clients[0].send(*(request(READ, i, i * BLOCK, BLOCK) for i in range(count + 50)))
    room = worker.daemon_room
    last = worker.taken[-1]
    # Writes that end one after the other give credit back, but too little.
    for _ in range(100):
        clients[0].bench.export.flush()
    assert worker.daemon_room == room
    assert worker.taken[-1] is last
    while worker.taken:
        worker.answer_everything()
        clients[0].receive()
    assert worker.export.in_flight_bytes == 0
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES


# The end.


def test_client_that_leaves_inside_a_write(worker: Bench, clients: list[BenchClient]) -> None:
    """Its pieces end unheard and give everything back; a write that never was is not counted."""
    clients.append(BenchClient(worker))
    clients[0].send(request(WRITE, 1, 0, 8 << 20) + CONTENT[: 3 * WRITE_PIECE_BYTES + 100])
    assert len(worker.taken) == 3
    clients[0].socket.close()
    worker.turn()
    assert not worker.export.connections
    worker.answer_everything()
    assert worker.export.in_flight_bytes == 0
    assert worker.daemon_room == len(worker.memory) - LOCAL_BYTES
    assert worker.traffic.writes == 0


def test_drain_finishes_what_is_in_flight(worker: Bench, clients: list[BenchClient]) -> None:
    """Nothing new is begun, whether it comes later or waits for credit; every request that was begun has its reply."""
    clients += [BenchClient(worker) for _ in range(4)]
    reader, writer, waiting, idle = clients
    reader.send(request(READ, 1, 0, 2 * MAX_BIO_BYTES), request(FLUSH, 2))
    writer.send(request(WRITE, 1, 0, 512) + CONTENT[:512])
    waiting.send(request(READ, 1, 0, CREDIT_BYTES), request(READ, 2, 0, BLOCK))
    assert not worker.export.is_idle
    worker.export.drain()
    reader.socket.send(request(READ, 3, 0, BLOCK))
    idle.socket.send(request(READ, 1, 0, BLOCK))
    worker.turn()
    assert not worker.export.is_idle
    worker.answer_everything()
    assert worker.export.is_idle
    assert list(reader.replies({1: 2 * MAX_BIO_BYTES})) == [2, 1]
    assert list(writer.replies()) == [1]
    assert list(waiting.replies({1: CREDIT_BYTES})) == [1]
    assert idle.receive() == b""
    worker.export.close()
    for client in clients:
        assert client.receive() is None


def test_drain_with_clients_that_wait_for_credit(raw: Bench, clients: list[BenchClient]) -> None:
    """Credit that comes back then is nobody's: what waits for it is not begun."""
    piece, count = 1 << 20, 16
    for _ in range(5):
        clients.append(BenchClient(raw))
        clients[-1].send(*(request(READ, i, i * piece, piece) for i in range(count)))
    assert raw.export.in_flight_bytes > EXPORT_CREDIT_BYTES - piece
    reads = raw.data_path.reads_passed_down
    raw.export.drain()
    received = 0
    while not raw.export.is_idle:
        for client in clients:
            received += len(client.receive() or b"")
    assert raw.data_path.reads_passed_down == reads
    received += sum(len(client.receive() or b"") for client in clients)
    assert received == reads * (piece + REPLY.size)
    assert reads < 5 * count


def test_drain_does_not_wait_for_clients(worker: Bench, clients: list[BenchClient]) -> None:
    """Half a write, half a request or half a handshake holds up nobody; what came of the write may be there or not."""
    clients += [BenchClient(worker), BenchClient(worker), BenchClient(worker, negotiate=False)]
    clients[0].send(request(WRITE, 1, 0, 1 << 20) + CONTENT[: WRITE_PIECE_BYTES + 77])
    clients[1].send(request(READ, 1, 0, BLOCK)[:20])
    assert len(worker.taken) == 1
    worker.export.drain()
    assert not worker.export.is_idle
    worker.answer_everything()
    assert worker.export.is_idle
    # What comes now is not looked at.
    clients[0].socket.send(CONTENT[WRITE_PIECE_BYTES + 77 : 3 * WRITE_PIECE_BYTES])
    worker.turn()
    assert worker.export.is_idle
    assert worker.taken == []
    assert worker.traffic.writes == 0


def test_drained_export_accepts_nobody(raw: Bench, clients: list[BenchClient]) -> None:
    """Who comes now waits in the listener's backlog for whoever serves next."""
    raw.export.drain()
    late = BenchClient(raw, negotiate=False)
    clients.append(late)
    assert late.receive() == b""
    assert not raw.export.connections


def test_disconnect_leaves_what_is_in_flight(worker: Bench, clients: list[BenchClient]) -> None:
    """A client that says goodbye has had all it waits for; nothing behind it is looked at."""
    clients.append(BenchClient(worker))
    clients[0].send(request(WRITE, 1, 0, 512) + CONTENT[:512], request(DISC, 2), struct.pack(">I", 77))
    assert clients[0].receive() is None
    worker.answer_everything()
    assert worker.image[:512] == CONTENT[:512]
    assert worker.export.in_flight_bytes == 0

"""The data path: each piece of a request to whoever serves it, whole, once, and in pieces a daemon can bear."""

import errno
import random
import tempfile
import uuid
from collections.abc import Iterator

import pytest
from exportrig import BLOCK, OLD, SIZE, Bench, new
from zeromap import zero_map

from snapd.block.bio import MAX_BIO_BYTES, SECTOR_BYTES, BioOp
from snapd.device.batch import Batch
from snapd.device.config import Route
from snapd.device.routes import Run, SnapshotRoutes, WholeRoute
from snapd.dmuser.message import Flag
from snapd.dmuser.target import QUEUE_MESSAGES
from snapd.merge.sharedmap import SharedMap

TAG = 7


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield directory


@pytest.fixture
def snapshot(directory: str) -> Iterator[Bench]:
    bench = Bench(directory)
    yield bench
    bench.close()


@pytest.fixture
def worker(directory: str) -> Iterator[Bench]:
    bench = Bench(directory, Route.WORKER)
    yield bench
    bench.close()


@pytest.fixture
def raw(directory: str) -> Iterator[Bench]:
    bench = Bench(directory, Route.RAW)
    yield bench
    bench.close()


class Piece(Batch):
    """One request, and whether it is over."""

    def __init__(self, bench: Bench, length: int = 0) -> None:
        super().__init__(bench.data_path.arena.allocate(length) if length else None, self._ended)
        self.ready = 0
        self._bench = bench

    def _ended(self, _batch: Batch) -> None:
        self.ready += 1

    @property
    def place(self) -> int:
        assert self.region is not None
        return self.region.start

    def content(self) -> bytes:
        assert self.region is not None
        return bytes(self._bench.memory[self.region.start : self.region.end])

    def put(self, content: bytes) -> None:
        self._bench.memory[self.place : self.place + len(content)] = content

    def done(self) -> int:
        """Its errno; it must be over, once."""
        assert self.ready == 1
        return self.errors.get(TAG, 0)


def read(bench: Bench, offset: int, length: int) -> Piece:
    piece = Piece(bench, length)
    bench.data_path.read(piece, TAG, piece.place, offset, length)
    piece.seal()
    bench.turn()
    return piece


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_a_snapshot(directory: str, seed: int) -> None:
    """DMU-146, UNDO-26: cut at every change of sides and nowhere else, for any range, while a merge goes on."""
    choice = random.Random(seed)
    blocks, size = 64, choice.choice([512, 4096])
    changed = {block for block in range(blocks) if choice.random() < 0.5}
    with open(f"{directory}/map", "w+b") as file:
        shared = SharedMap.create(file.fileno(), zero_map(changed, blocks, block_size=size), uuid.UUID(int=2), 1)
    routes = SnapshotRoutes(shared, size)
    for _ in range(100):
        if choice.random() < 0.1:
            start = choice.randrange(blocks)
            count = choice.randint(1, blocks - start)
            shared.mark_merged(start, count)
            changed -= set(range(start, start + count))
        offset = choice.randrange(blocks * size)
        length = choice.randint(1, blocks * size - offset)
        expected: list[Run] = []
        for block in range(offset // size, -(-(offset + length) // size)):
            start, stop = max(block * size, offset), min((block + 1) * size, offset + length)
            if expected and expected[-1].is_local == (block not in changed):
                expected[-1] = expected[-1]._replace(stop=stop)
            else:
                expected.append(Run(start, stop, block not in changed))
        assert list(routes.runs(offset, length)) == expected
        assert routes.is_local(offset, length) == all(run.is_local for run in expected)


@pytest.mark.parametrize("is_local", [False, True])
def test_one_side_for_everything(is_local: bool) -> None:
    routes = WholeRoute(is_local=is_local)
    assert routes.is_local(1, 2) is is_local
    assert list(routes.runs(10, 90)) == [Run(10, 100, is_local)]


def test_mixed_read_is_split_at_the_borders(snapshot: Bench) -> None:
    """DMU-146: the host reads its own parts while the daemon has exactly the rest."""
    offset, length = 99 * BLOCK + 512, 202 * BLOCK
    piece = read(snapshot, offset, length)
    assert [(m.bio.sector * SECTOR_BYTES, m.bio.length) for m in snapshot.taken] == [
        (100 * BLOCK, 100 * BLOCK),
        (300 * BLOCK, BLOCK + 512),
    ]
    assert piece.ready == 0
    snapshot.answer_everything()
    assert piece.done() == 0
    assert piece.content() == new(offset, length)
    assert snapshot.data_path.reads_passed_down == 2
    assert snapshot.data_path.reads_to_worker == 2


def test_bios_are_cut(snapshot: Bench) -> None:
    """DMU-182: pieces of at most 1 MiB, whole sectors, in order and without a gap."""
    offset, length = 300 * BLOCK + 512, 3 * MAX_BIO_BYTES + 1536
    piece = read(snapshot, offset, length)
    at = offset
    for message in snapshot.taken:
        assert message.bio.sector * SECTOR_BYTES == at
        assert message.bio.place == piece.place + at - offset
        at += message.bio.length
    assert at == offset + length
    assert [m.bio.length for m in snapshot.taken] == [MAX_BIO_BYTES] * 3 + [1536]
    # DMU-46: in any order.
    while snapshot.taken:
        snapshot.answer(snapshot.taken[-1])
    assert piece.done() == 0
    assert piece.content() == new(offset, length)


def test_cold_read_is_waited_for(snapshot: Bench) -> None:
    """What is not in memory is fetched and read when everything else has been served."""
    snapshot.store.is_cold = True
    piece = read(snapshot, BLOCK, 3 * BLOCK)
    assert piece.done() == 0
    assert piece.content() == new(BLOCK, 3 * BLOCK)
    assert snapshot.store.calls == [("read", BLOCK, 3 * BLOCK)]
    assert snapshot.data_path.reads_passed_down == 1


@pytest.mark.parametrize("is_cold", [False, True])
def test_withdrawal_during_a_base_read(snapshot: Bench, is_cold: bool) -> None:
    """UNDO-26: what was read from the base while a rollback began is not believed; the daemon is asked."""
    snapshot.store.is_cold = is_cold
    snapshot.shared.mark_merged(0, SIZE // BLOCK)
    snapshot.store.withdraw = snapshot.shared
    piece = read(snapshot, 99 * BLOCK, 3 * BLOCK)
    assert piece.ready == 0
    assert [(m.bio.sector * SECTOR_BYTES, m.bio.length) for m in snapshot.taken] == [(99 * BLOCK, 3 * BLOCK)]
    snapshot.answer_everything()
    assert piece.done() == 0
    assert piece.content() == new(99 * BLOCK, 3 * BLOCK)
    assert snapshot.data_path.reads_passed_down == 0


def test_withdrawal_elsewhere_is_no_matter(snapshot: Bench) -> None:
    """UNDO-26: a range without an op stays the base's whatever happens."""
    snapshot.store.withdraw = snapshot.shared
    piece = read(snapshot, 0, 5 * BLOCK)
    assert piece.done() == 0
    assert piece.content() == OLD[: 5 * BLOCK]


def test_failed_base_read_fails_its_request_alone(snapshot: Bench) -> None:
    other = read(snapshot, 120 * BLOCK, BLOCK)
    snapshot.store.fails = errno.EIO
    piece = read(snapshot, 99 * BLOCK, 2 * BLOCK)
    snapshot.answer_everything()
    assert piece.done() == errno.EIO
    assert other.done() == 0
    assert other.content() == new(120 * BLOCK, BLOCK)


def test_base_that_ends_early(raw: Bench) -> None:
    """Behind the end of the store there is nothing to serve, and nothing is what is served."""
    raw.store.truncate(10 * BLOCK)
    piece = read(raw, 9 * BLOCK, 2 * BLOCK)
    assert piece.done() == errno.EIO


def test_flush_is_an_empty_write(worker: Bench) -> None:
    """DMU-16, DMU-175: as device mapper sends it."""
    piece = Piece(worker)
    worker.data_path.flush(piece, TAG)
    piece.seal()
    worker.turn()
    (message,) = worker.taken
    bio = message.bio
    assert (bio.op, bio.length, bio.sector) == (BioOp.WRITE, 0, 0)
    assert bio.flags == Flag.PREFLUSH | Flag.SYNC
    assert piece.ready == 0
    worker.answer(message)
    assert piece.done() == 0


def test_flush_of_what_cannot_be_written(snapshot: Bench) -> None:
    """Nothing to make durable: done at once, whatever the daemon and the base are busy with."""
    piece = Piece(snapshot)
    snapshot.data_path.flush(piece, TAG)
    piece.seal()
    assert piece.done() == 0
    snapshot.turn()
    assert snapshot.taken == []
    assert snapshot.store.calls == []


@pytest.mark.parametrize("fua", [False, True])
def test_write_to_the_daemon(worker: Bench, fua: bool) -> None:
    """DMU-24: FUA goes with the write, whose payload already lies in the arena."""
    piece = Piece(worker, 1024)
    piece.put(b"w" * 1024)
    worker.data_path.write(piece, TAG, piece.place, 4096, 1024, fua=fua)
    piece.seal()
    worker.turn()
    (message,) = worker.taken
    bio = message.bio
    assert (bio.op, bio.sector, bio.length, bio.place) == (BioOp.WRITE, 8, 1024, piece.place)
    assert bio.data is None
    assert bio.flags == (Flag.FUA if fua else 0)
    worker.answer(message)
    assert piece.done() == 0
    assert worker.image[4096:5120] == b"w" * 1024


@pytest.mark.parametrize("fua", [False, True])
def test_write_to_the_store(raw: Bench, fua: bool) -> None:
    """DMU-24: with FUA it is done when it has been flushed, not before."""
    piece = Piece(raw, 1024)
    piece.put(b"w" * 1024)
    raw.data_path.write(piece, TAG, piece.place, 4096, 1024, fua=fua)
    piece.seal()
    assert piece.ready == (0 if fua else 1)
    raw.wait_until(lambda: piece.ready > 0)
    assert piece.done() == 0
    assert raw.store.calls == [("write", 4096, 1024)] + [("flush", 0, 0)] * fua
    assert raw.store.content(4096, 1024) == b"w" * 1024


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_errors_of_the_store(raw: Bench, number: int) -> None:
    """Each operation says what it failed with."""
    raw.store.fails = number
    path = raw.data_path
    pieces = [Piece(raw, 512) for _ in range(5)]
    path.write(pieces[0], TAG, pieces[0].place, 0, 512, fua=False)
    path.write(pieces[1], TAG, pieces[1].place, 0, 512, fua=True)
    path.flush(pieces[2], TAG)
    path.discard(pieces[3], TAG, 0, 512, fua=False)
    path.write_zeroes(pieces[4], TAG, 0, 512, may_unmap=True, fua=False)
    for piece in pieces:
        piece.seal()
    raw.wait_until(lambda: all(piece.ready for piece in pieces))
    assert [piece.done() for piece in pieces] == [number] * 5


@pytest.mark.parametrize("can_unmap", [False, True])
def test_flush_discard_and_zeroes_of_the_store(raw: Bench, can_unmap: bool) -> None:
    """In order, aside; zeroes give space up where they may and can; with FUA they are flushed before they are done."""
    raw.store.can_unmap = can_unmap
    path = raw.data_path
    pieces = [Piece(raw) for _ in range(4)]
    path.flush(pieces[0], TAG)
    path.discard(pieces[1], TAG, 0, BLOCK, fua=False)
    path.write_zeroes(pieces[2], TAG, BLOCK, BLOCK, may_unmap=True, fua=False)
    path.write_zeroes(pieces[3], TAG, 2 * BLOCK, BLOCK, may_unmap=False, fua=True)
    for piece in pieces:
        piece.seal()
    raw.wait_until(lambda: all(piece.ready for piece in pieces))
    assert [piece.done() for piece in pieces] == [0] * 4
    assert raw.store.calls == [
        ("flush", 0, 0),
        ("discard", 0, BLOCK),
        ("unmap", 0, BLOCK),
        ("unmap", BLOCK, BLOCK),
        *([] if can_unmap else [("zero", BLOCK, BLOCK), ("write", BLOCK, BLOCK)]),
        ("zero", 2 * BLOCK, BLOCK),
        ("write", 2 * BLOCK, BLOCK),
        ("flush", 0, 0),
    ]
    assert raw.store.content(BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    assert raw.store.content(3 * BLOCK, BLOCK) == OLD[3 * BLOCK : 4 * BLOCK]


@pytest.mark.parametrize("may_unmap", [False, True])
@pytest.mark.parametrize("fua", [False, True])
def test_zeroes_are_cut(worker: Bench, may_unmap: bool, fua: bool) -> None:
    """DMU-184: a message that took longer than a request may would cost the worker its life; so at most 32 MiB each."""
    step = 32 << 20
    offset, length = BLOCK, step + 3 * BLOCK
    piece = Piece(worker)
    worker.data_path.write_zeroes(piece, TAG, offset, length, may_unmap=may_unmap, fua=fua)
    piece.seal()
    worker.turn()
    assert [(m.bio.sector * SECTOR_BYTES, m.bio.length) for m in worker.taken] == [
        (offset, step),
        (offset + step, 3 * BLOCK),
    ]
    flags = (0 if may_unmap else Flag.NOUNMAP) | (Flag.FUA if fua else 0)
    assert {(m.bio.op, m.bio.flags) for m in worker.taken} == {(BioOp.WRITE_ZEROES, flags)}
    worker.answer(worker.taken[0])
    assert piece.ready == 0
    worker.answer(worker.taken[0], 1)
    assert piece.done() == errno.EIO


def test_discard_is_one_message(worker: Bench) -> None:
    piece = Piece(worker)
    worker.data_path.discard(piece, TAG, 0, SIZE, fua=False)
    piece.seal()
    worker.turn()
    (message,) = worker.taken
    assert (message.bio.op, message.bio.sector, message.bio.length) == (BioOp.DISCARD, 0, SIZE)
    worker.answer(message)
    assert piece.done() == 0


def test_full_queue_is_backpressure(worker: Bench) -> None:
    """DMU-143: what finds no room in the target's queue waits in the data path, in order, and nothing fails."""
    worker.daemon.close()
    pieces = [Piece(worker, 512) for _ in range(3 * QUEUE_MESSAGES)]
    for i, piece in enumerate(pieces):
        worker.data_path.read(piece, TAG, piece.place, i * 512, 512)
        piece.seal()
    worker.data_path.submit_waiting()
    assert worker.target.queued == QUEUE_MESSAGES
    assert worker.data_path.waiting == 2 * QUEUE_MESSAGES
    assert not worker.data_path.can_submit
    worker.daemon = worker.target.open()
    worker.turn()
    assert [message.bio.sector for message in worker.taken] == [*range(len(pieces))]
    worker.answer_everything()
    assert {piece.done() for piece in pieces} == {0}
    assert b"".join(piece.content() for piece in pieces) == OLD[: len(pieces) * 512]


def test_target_that_takes_nothing_more(worker: Bench) -> None:
    """DMU-106: after `destroy` every request ends, with the errno it was refused with."""
    worker.target.destroy()
    piece = read(worker, 0, BLOCK)
    assert piece.done() == errno.ENODEV


def test_daemon_without_the_arena(directory: str) -> None:
    """DMU-154: for somebody else's daemon a bio has memory, no place; the bytes come to the same place."""
    bench = Bench(directory, Route.EXTERNAL, shares_memory=False)
    try:
        piece = read(bench, BLOCK, 2 * BLOCK)
        (message,) = bench.taken
        assert message.bio.place == -1
        bench.answer(message)
        assert piece.done() == 0
        assert piece.content() == OLD[BLOCK : 3 * BLOCK]
        written = Piece(bench, BLOCK)
        written.put(b"x" * BLOCK)
        bench.data_path.write(written, TAG, written.place, 0, BLOCK, fua=False)
        bench.data_path.flush(written, TAG)
        written.seal()
        bench.turn()
        bench.answer_everything()
        assert written.done() == 0
        assert bench.image[:BLOCK] == b"x" * BLOCK
    finally:
        bench.close()

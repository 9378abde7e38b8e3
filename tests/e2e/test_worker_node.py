"""The real worker process on nodes that behave as the real driver's (see `dmusernode`)."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from dmunodes import NodeError, Nodes, dm_user_nodes
from workerimages import WorkerImages
from workerprocess import WorkerProcess, worker_process

from snapd.block.bio import BioOp
from snapd.cow.format import BLOCK_SIZE
from snapd.dmuser.message import HEADER, Answer, Flag, Request

SYNC, META, PRIO, IDLE = int(Flag.SYNC), int(Flag.META), int(Flag.PRIO), int(Flag.IDLE)
FUA, PREFLUSH, RAHEAD = int(Flag.FUA), int(Flag.PREFLUSH), int(Flag.RAHEAD)
OK = 0
BLOCKS = 5000


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with dm_user_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> WorkerImages:
    return WorkerImages(tmp_path_factory.mktemp("images"), 1, blocks=BLOCKS, digests=True)


@pytest.fixture
def name(request: pytest.FixtureRequest, nodes: Nodes, images: WorkerImages) -> Iterator[str]:
    """A fresh node, the size of the images; removed at the end, if the test has not."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    nodes.create(name, len(images.new))
    yield name
    if os.path.exists(nodes.path(name)):
        nodes.await_count(name, "opens", 0)
        nodes.remove(name)


@pytest.fixture
def worker(nodes: Nodes, images: WorkerImages, name: str) -> Iterator[WorkerProcess]:
    """A worker that waits for a request."""
    with worker_process("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow) as worker:
        nodes.await_count(name, "readers", 1)
        yield worker


class RawNode:
    """The node as any process sees it: guards that the double is what the rows say."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR)

    def answer(self, seq: int, code: int, payload: bytes = b"") -> int:
        return os.write(self.fd, HEADER.pack(seq, code, 0, 0, 0) + payload)


@pytest.fixture
def raw(nodes: Nodes, name: str) -> Iterator[RawNode]:
    raw = RawNode(nodes.path(name))
    yield raw
    os.close(raw.fd)


class TestTheDouble:
    """What the worker is tested against."""

    def test_one_read_is_header_or_payload(self, nodes: Nodes, name: str, raw: RawNode) -> None:
        """DMU-164, DMU-51."""
        number = nodes.submit(name, BioOp.WRITE, data=b"x" * 1024, sector=3, flags=SYNC)
        assert os.read(raw.fd, 1) == b"\0"
        assert os.readv(raw.fd, [bytearray(10), bytearray(1000)]) == 39
        assert os.read(raw.fd, 4096) == b"x" * 1024
        assert raw.answer(0, Answer.SUCCESS) == 40
        assert nodes.wait(name, number) == (OK, b"")

    def test_one_write_is_one_answer(self, nodes: Nodes, name: str, raw: RawNode) -> None:
        """DMU-166: the second answer of one call has to be sent again."""
        numbers = [nodes.submit(name, BioOp.READ, length=512) for _ in range(2)]
        assert os.read(raw.fd, 4096) + os.read(raw.fd, 4096) == b"".join(
            Request(seq, BioOp.READ, 0, 0, 512).pack() for seq in range(2)
        )
        answers = b"".join(HEADER.pack(seq, Answer.SUCCESS, 0, 0, 0) + bytes([seq]) * 512 for seq in range(2))
        assert os.write(raw.fd, answers) == 552
        assert os.write(raw.fd, answers[552:]) == 552
        assert [nodes.wait(name, number) for number in numbers] == [(OK, bytes(512)), (OK, b"\1" * 512)]

    @pytest.mark.parametrize("how", ["unknown", "twice", "half read"])
    def test_poison(self, nodes: Nodes, name: str, how: str) -> None:
        """DMU-168: that write is taken, every later one refused; reads go on, and the close fails everything."""
        raw = RawNode(nodes.path(name))
        numbers = [nodes.submit(name, BioOp.WRITE, data=b"x" * 512) for _ in range(3)]
        os.read(raw.fd, 40)
        if how == "twice":
            os.read(raw.fd, 512)
            assert raw.answer(0, Answer.SUCCESS) == 40
        assert raw.answer(9 if how == "unknown" else 0, Answer.SUCCESS) == 40
        nodes.await_count(name, "poisoned", 1)
        with pytest.raises(OSError, match="Invalid argument"):
            raw.answer(0, Answer.SUCCESS)
        while os.read(raw.fd, 4096) != HEADER.pack(2, BioOp.WRITE, 0, 0, 512):
            pass
        os.close(raw.fd)
        ended = [nodes.wait(name, number)[0] for number in numbers]
        assert ended == [OK if how == "twice" else errno.EIO, errno.EIO, errno.EIO]

    def test_no_position(self, raw: RawNode) -> None:
        """DMU-165, DMU-126."""
        with pytest.raises(OSError, match="Illegal seek"):
            os.lseek(raw.fd, 0, os.SEEK_SET)

    def test_remove(self, nodes: Nodes, name: str, raw: RawNode) -> None:
        """DMU-174: refused with a request under way; afterwards every read says so, for good."""
        number = nodes.submit(name, BioOp.READ, length=512)
        with pytest.raises(NodeError) as refused:
            nodes.remove(name)
        assert refused.value.number == errno.EBUSY
        os.read(raw.fd, 4096)
        raw.answer(0, Answer.ERROR)
        assert nodes.wait(name, number) == (errno.EIO, b"")
        nodes.remove(name)
        for _ in range(2):
            with pytest.raises(OSError, match="Block device required"):
                os.read(raw.fd, 4096)

    def test_never_attached(self, nodes: Nodes) -> None:
        """DMU-169, DMU-171: EIO after the timeout; at once when a daemon was there and is gone."""
        nodes.create("unattached", 4096, timeout_ms=10)
        assert nodes.read("unattached", 0, 512) == (errno.EIO, b"")
        nodes.create("left", 4096, timeout_ms=3_600_000)
        os.close(os.open(nodes.path("left"), os.O_RDWR))
        nodes.await_count("left", "opens", 0)
        assert nodes.read("left", 0, 512) == (errno.EIO, b"")


@pytest.mark.parametrize(
    ("sector", "length"),
    [(0, 4096), (3, 512), (5, 1536), (1, 1 << 20), (8, 1 << 20), (0, (1 << 20) + 512), (7, 16 << 20)],
)
def test_reads(nodes: Nodes, images: WorkerImages, name: str, worker: WorkerProcess, sector: int, length: int) -> None:
    """DMU-178, DMU-182, DMU-167: any whole sectors, of any size, verified before the header is sent."""
    assert worker.pid
    start = sector * 512
    assert nodes.read(name, sector, length) == (OK, images.new[start : start + length])


def test_many_at_once(nodes: Nodes, images: WorkerImages, name: str, worker: WorkerProcess) -> None:
    """DMU-179, DMU-166: a thousand requests wait; each gets its own bytes."""
    assert worker.pid
    random = Random(1)
    starts = [random.randrange(BLOCKS) * 8 for _ in range(1000)]
    numbers = [nodes.submit(name, BioOp.READ, sector=start, length=4096, flags=RAHEAD) for start in starts]
    for start, number in zip(starts, numbers, strict=True):
        assert nodes.wait(name, number) == (OK, images.new[start * 512 : start * 512 + 4096])


def test_traffic_of_a_file_system_on_a_snapshot(nodes: Nodes, name: str, worker: WorkerProcess) -> None:
    """DMU-175, DMU-177, DMU-168: flushes succeed wherever they are; writes fail, read to their end first."""
    assert worker.pid
    flushes = [(0, PREFLUSH | SYNC), (777, SYNC | META | IDLE | FUA | PREFLUSH), (1 << 50, PREFLUSH)]
    for sector, flags in flushes:
        assert nodes.wait(name, nodes.submit(name, BioOp.WRITE, sector=sector, flags=flags)) == (OK, b"")
    for flags in (0, SYNC | IDLE, META | PRIO, SYNC | META | IDLE | FUA):
        number = nodes.submit(name, BioOp.WRITE, sector=8, flags=flags, data=bytes(300_032))
        assert nodes.wait(name, number) == (errno.EIO, b"")
    for op in (BioOp.DISCARD, BioOp.WRITE_ZEROES, BioOp.SECURE_ERASE, 17):
        assert nodes.wait(name, nodes.submit(name, op, sector=8, length=4096)) == (errno.EIO, b"")
    assert nodes.read(name, 0, 512)[0] == OK


def test_pass_through(nodes: Nodes, name: str, tmp_path: Path) -> None:
    """DMU-175, DMU-176, DMU-177, DMU-178: a file system's traffic on a store, writes of 16 MiB too."""
    random = Random(2)
    content = bytearray(random.randbytes(BLOCKS * BLOCK_SIZE))
    store = tmp_path / "store.img"
    store.write_bytes(content)
    with worker_process("--channel", nodes.path(name), "--base", store) as worker:
        numbers = []
        for sector, length, flags in [
            *((3, 512, SYNC | IDLE), (0, 1024, META | PRIO | FUA), (9, 16 << 20, 0), (40_000 - 8, 4096, SYNC)),
            *((100, 1 << 20, SYNC | META | IDLE | FUA), (5, 1536, PREFLUSH | FUA)),
        ]:
            data = random.randbytes(length)
            content[sector * 512 : sector * 512 + length] = data
            numbers.append(nodes.submit(name, BioOp.WRITE, sector=sector, flags=flags, data=data))
            numbers.append(nodes.submit(name, BioOp.WRITE, sector=sector, flags=PREFLUSH | SYNC))
        numbers.append(nodes.submit(name, BioOp.WRITE_ZEROES, sector=50, length=1 << 20))
        content[50 * 512 : 50 * 512 + (1 << 20)] = bytes(1 << 20)
        assert [nodes.wait(name, number)[0] for number in numbers] == [OK] * len(numbers)
        outside = nodes.submit(name, BioOp.WRITE, sector=40_000, data=bytes(512))
        assert nodes.wait(name, outside) == (errno.EIO, b"")
        assert nodes.wait(name, nodes.submit(name, BioOp.DISCARD, sector=16, length=4096)) == (OK, b"")
        assert nodes.read(name, 24, 16 << 20) == (OK, bytes(content[24 * 512 : 24 * 512 + (16 << 20)]))
        worker.signal(signal.SIGTERM)
        assert worker.finish()[0] == 0
    left = store.read_bytes()
    assert left[:8192] + left[12288:] == content[:8192] + content[12288:]


def test_removed_under_a_waiting_worker(nodes: Nodes, name: str, worker: WorkerProcess) -> None:
    """DMU-174, DMU-158: ENOTBLK is a clean end."""
    nodes.remove(name)
    assert worker.finish() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("threads", [1, 2])
def test_drain_while_blocked_in_read(
    nodes: Nodes, images: WorkerImages, name: str, threads: int, number: signal.Signals
) -> None:
    """DMU-189: a signal ends reads that wait, on every open; what comes later is not taken."""
    arguments = ("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow, "--threads", threads)
    with worker_process(*arguments) as worker:
        nodes.await_count(name, "readers", threads)
        worker.signal(number)
        assert worker.finish() == (0, "")
    nodes.await_count(name, "opens", 0)
    assert nodes.read(name, 0, 512)[0] == errno.EIO


def test_drain_under_load(nodes: Nodes, images: WorkerImages, name: str, worker: WorkerProcess) -> None:
    """DMU-189, DMU-170: what was received is answered whole; only what nobody has read fails."""
    numbers = [nodes.submit(name, BioOp.READ, sector=8 * i, length=1 << 20) for i in range(200)]
    assert nodes.wait(name, numbers[0])[0] == OK
    worker.signal(signal.SIGTERM)
    assert worker.finish() == (0, "")
    ended = [nodes.wait(name, number) for number in numbers]
    results = [result for result, _ in ended]
    # In order, so: some served, then none.
    assert results == sorted(results)
    for i, (result, content) in enumerate(ended):
        assert result == errno.EIO or content == images.new[4096 * i : 4096 * i + (1 << 20)]


def test_two_threads_have_two_opens(nodes: Nodes, images: WorkerImages, name: str) -> None:
    """DMU-173: one reader thread a descriptor, and every request on one of them."""
    arguments = ("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow, "--threads", 2)
    with worker_process(*arguments) as worker:
        nodes.await_count(name, "opens", 2)
        nodes.await_count(name, "readers", 2)
        numbers = [nodes.submit(name, BioOp.READ, sector=8 * i, length=65536) for i in range(300)]
        for i, number in enumerate(numbers):
            assert nodes.wait(name, number) == (OK, images.new[4096 * i : 4096 * i + 65536])
        nodes.await_count(name, "readers", 2)
        nodes.remove(name)
        assert worker.finish() == (0, "")


def test_killed_in_the_middle(nodes: Nodes, images: WorkerImages, name: str) -> None:
    """DMU-170, DMU-171: after SIGKILL everything fails; the next worker attaches and serves."""
    arguments = ("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow)
    with worker_process(*arguments) as worker:
        numbers = [nodes.submit(name, BioOp.READ, length=16 << 20) for _ in range(20)]
        assert nodes.wait(name, numbers[0])[0] == OK
        worker.kill()
        assert {nodes.wait(name, number)[0] for number in numbers[-10:]} == {errno.EIO}
    nodes.await_count(name, "opens", 0)
    with worker_process(*arguments) as worker:
        nodes.await_count(name, "readers", 1)
        assert nodes.read(name, 9, 1 << 20) == (OK, images.new[9 * 512 : 9 * 512 + (1 << 20)])
        nodes.remove(name)
        assert worker.finish() == (0, "")


@pytest.mark.parametrize("length", [4096, 16 << 20])
def test_damage_fails_its_own_request(nodes: Nodes, name: str, tmp_path: Path, length: int) -> None:
    """DMU-167, DMU-182, DMU-65: a damaged unit is found before a header is sent, in a large read too."""
    images = WorkerImages(tmp_path, 1, blocks=BLOCKS)
    damaged = images.damage(images.packed_op(4))
    with worker_process("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow) as worker:
        start = damaged.start * 8 if length == 4096 else max(0, damaged.start * 8 - 20_000)
        length = min(length, len(images.new) - start * 512)
        assert nodes.read(name, start, length) == (errno.EIO, b"")
        behind = damaged.stop * 8
        assert nodes.read(name, behind, 4096) == (OK, images.new[behind * 512 : behind * 512 + 4096])
        nodes.remove(name)
        status, said = worker.finish()
    assert status == 0
    assert "does not decompress" in said


def test_damage_between_the_two_passes(nodes: Nodes, name: str, tmp_path: Path) -> None:
    """DMU-182, DMU-167: after the header nothing can be taken back, so the channel is closed, and the worker ends."""
    images = WorkerImages(tmp_path, 1, blocks=BLOCKS)
    with worker_process("--channel", nodes.path(name), "--base", images.base, "--cow", images.cow) as worker:
        nodes.hold(name, 1 << 20)
        number = nodes.submit(name, BioOp.READ, length=16 << 20)
        nodes.await_count(name, "held", 1)
        first, piece_blocks = 2 << 20, (1 << 20) // BLOCK_SIZE
        images.damage(images.packed_op(4, behind=first // BLOCK_SIZE, inside=piece_blocks))
        nodes.hold(name, -1)
        assert nodes.wait(name, number) == (errno.EIO, b"")
        status, said = worker.finish()
    assert status == 1
    assert "after its header was sent" in said

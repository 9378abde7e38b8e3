"""The merger process on real files: killed anywhere, stopped politely, orphaned; both images stay readable."""

import contextlib
import errno
import os
import select
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import Readable, read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import WriterOptions, create_writer
from snapd.merge.oldview import OldView
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, ReadBack, State
from snapd.merge.undodir import UndoDirectory
from snapd.merge.views import open_views, restore_shared_map
from snapd.proc import control
from snapd.proc.child import Child

SNAPSHOT = uuid.UUID("0b0e2a52-3a3e-4a4c-8a53-1d8a6f7f6f01")
BLOCK = 4096
BLOCKS = (80 << 20) // BLOCK
UNIT = 16
SEED = int(os.environ.get("SNAPD_CRASH_SEED", "1"))
PATIENCE_MS = 60_000


class Images:
    """Two images, 80 MiB, and the COW between them: a span boundary lies inside. Built once, never written."""

    def __init__(self, directory: Path) -> None:
        random = Random(SEED)
        units = [random.randbytes(512) * (UNIT * BLOCK // 512) for _ in range(64)]
        count = BLOCKS // UNIT
        old = [random.choice(units) for _ in range(count)]
        new = [random.choice(units) if i % 8 else old[i] for i in range(count)]
        self.old, self.new = b"".join(old), b"".join(new)
        self.cow = directory / "cow"
        options = WriterOptions(compression=CompressOption.parse("zstd"), op_count_max=BLOCKS, unit=UNIT * BLOCK)
        fd = os.open(self.cow, os.O_RDWR | os.O_CREAT)
        writer = create_writer(FileStore(fd), options)
        for i, unit in enumerate(new):
            if i % 8:
                writer.raw(i * UNIT, unit)
        writer.finalize()
        os.close(fd)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


class Snapshot:
    """What a service holds of one snapshot, and the merger it starts."""

    def __init__(self, directory: Path, images: Images) -> None:
        self.images = images
        (directory / "base").write_bytes(images.old)
        (directory / "undo").mkdir()
        self.fence = directory / "fence"
        self.fds = [
            os.open(images.cow, os.O_RDWR),
            os.open(directory / "base", os.O_RDWR),
            os.open(directory / "map", os.O_RDWR | os.O_CREAT),
            os.open(directory / "shared", os.O_RDWR | os.O_CREAT),
            os.open(directory / "undo", os.O_RDONLY),
        ]
        self.cow, self.base = FileStore(self.fds[0]), FileStore(self.fds[1])
        CowFile.parse(self.cow).extent_map(len(images.old)).save(self.fds[2])
        self.extent_map = ExtentMap.load(self.fds[2])
        self.shared = SharedMap.create(self.fds[3], self.extent_map, SNAPSHOT, 1)
        self.files = UndoDirectory(self.fds[4])
        # One long-lived reader beside all the mergers, as a worker is.
        self.old_view = OldView(self.base, self.fds[4], self.shared, self.extent_map)

    @contextlib.contextmanager
    def merger(self) -> Iterator[tuple[Child, socket.socket]]:
        """A started merger and our end of its control connection."""
        ours, theirs = control.pair()
        fence = os.open(self.fence, os.O_RDWR | os.O_CREAT)
        try:
            child = Child.spawn("snapd.merge", ["--snapshot", str(SNAPSHOT)], [theirs.fileno(), *self.fds, fence])
        finally:
            theirs.close()
            os.close(fence)
        try:
            yield child, ours
        finally:
            ours.close()
            if child.pidfd >= 0:
                child.kill()
                child.wait()

    def state(self) -> State | None:
        return self.files.read_state()

    def check(self) -> None:
        """Both views in full, through fresh readers and through the one that was there all along."""
        views = open_views(self.state(), self.extent_map, self.cow, self.base, self.files)
        assert same(views.old, self.images.old)
        assert same(self.old_view, self.images.old)
        assert same(views.new, self.images.new)

    def close(self) -> None:
        self.files.close()
        for fd in self.fds:
            os.close(fd)


def same(view: Readable, wanted: bytes) -> bool:
    step = 4 << 20
    return all(read_bytes(view, at, step) == wanted[at : at + step] for at in range(0, len(wanted), step))


@pytest.fixture
def snapshot(tmp_path: Path, images: Images) -> Iterator[Snapshot]:
    made = Snapshot(tmp_path, images)
    yield made
    made.close()


def event(connection: socket.socket) -> control.Message | None:
    """The next event; None when the merger is gone."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    assert poll.poll(PATIENCE_MS), "the merger says nothing"
    received = control.receive(connection)
    return None if received is None else received[0]


def last_event(connection: socket.socket) -> control.Message:
    """The one behind all progress events, which are looked at on the way."""
    done = {"merge": 0, "read_back": 0}
    while True:
        message = event(connection)
        assert message is not None, "the merger left without a word"
        if message["event"] != "progress":
            return message
        assert done[message["phase"]] <= message["done_bytes"] <= message["total_bytes"]
        done[message["phase"]] = message["done_bytes"]


def test_it_merges_reads_back_and_says_so(snapshot: Snapshot) -> None:
    """UNDO-8, UNDO-9: `merged` comes when MERGED and the read-back are durable; the process is niced and leaves 0."""
    with snapshot.merger() as (child, connection):
        first = event(connection)
        assert first is not None
        assert first["event"] == "progress"
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        assert last_event(connection) == {"event": "merged"}
        state = snapshot.state()
        assert state is not None
        assert (state.phase, state.read_back) == (Phase.MERGED, ReadBack.OK)
        assert child.wait(PATIENCE_MS) == 0
    assert snapshot.shared.new_view_on_base(0, BLOCKS)
    assert same(snapshot.base, snapshot.images.new)
    snapshot.check()


def test_it_is_killed_at_random_and_started_again_until_done(snapshot: Snapshot) -> None:
    """UNDO-12, UNDO-24: SIGKILL at any moment, then look at both images, then the next merger goes on."""
    random = Random(SEED)
    for _ in range(8):
        with snapshot.merger() as (child, connection):
            # The first events, so that the kill falls into the work and not always into the start.
            for _ in range(random.randint(0, 2)):
                message = event(connection)
                if message is None or message["event"] != "progress":
                    break
            with contextlib.suppress(SnapdError):
                child.wait(random.randint(0, 150))
            if child.pidfd >= 0:
                child.kill()
                child.wait(PATIENCE_MS)
        if snapshot.state() is not None:
            snapshot.check()
    with snapshot.merger() as (child, connection):
        assert last_event(connection) == {"event": "merged"}
        assert child.wait(PATIENCE_MS) == 0
    assert same(snapshot.base, snapshot.images.new), f"seed {SEED}"
    snapshot.check()
    # A map made anew, as after a reboot, says the same as the one that was there all along.
    again = os.memfd_create("again")
    shared = SharedMap.create(again, snapshot.extent_map, SNAPSHOT, 1)
    os.close(again)
    restore_shared_map(shared, snapshot.extent_map, snapshot.files)
    assert shared.undo_op_count == snapshot.shared.undo_op_count
    assert shared.new_view_on_base(0, BLOCKS)


@pytest.mark.parametrize("how", ["verb", "close"])
def test_it_stops_at_the_next_span(snapshot: Snapshot, how: str) -> None:
    """Asked to, or when its daemon is gone: it ends a span, leaves 0, and the next one goes on behind it."""
    with snapshot.merger() as (child, connection):
        first = event(connection)
        assert first is not None
        assert first["event"] == "progress"
        if how == "verb":
            control.send(connection, {"verb": "stop"})
            assert last_event(connection) == {"event": "stopped"}
        else:
            connection.close()
        assert child.wait(PATIENCE_MS) == 0
    state = snapshot.state()
    assert state is not None
    assert state.phase is Phase.MERGING
    assert 0 < state.next_block < BLOCKS
    snapshot.check()
    with snapshot.merger() as (child, connection):
        first = event(connection)
        assert first is not None
        assert first["done_bytes"] > 0, "it goes on, it does not begin again"
        assert last_event(connection) == {"event": "merged"}
        assert child.wait(PATIENCE_MS) == 0
    assert same(snapshot.base, snapshot.images.new)


def test_two_mergers_never_work_at_once(snapshot: Snapshot) -> None:
    """DMU-185: the second waits at the fence until the first is gone, and then finds its work done."""
    with snapshot.merger() as (first, first_connection):
        assert event(first_connection) is not None
        with snapshot.merger() as (second, second_connection):
            assert last_event(first_connection) == {"event": "merged"}
            assert first.wait(PATIENCE_MS) == 0
            assert last_event(second_connection) == {"event": "merged"}
            assert second.wait(PATIENCE_MS) == 0
    assert same(snapshot.base, snapshot.images.new)


def test_it_says_why_it_failed(snapshot: Snapshot) -> None:
    """UNDO-29: a damaged state file is one clear event and exit status 1; the base is as it was."""
    snapshot.files.state.write(b"damage", 0)
    with snapshot.merger() as (child, connection):
        message = last_event(connection)
        assert message["event"] == "failed"
        assert message["errno"] == errno.EBADMSG
        assert "merge state" in message["message"]
        assert child.wait(PATIENCE_MS) == 1
    assert same(snapshot.base, snapshot.images.old)

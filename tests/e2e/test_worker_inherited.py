"""The worker as a service starts it: descriptors by name, a fence, and payload in an arena or on a node."""

import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from uuid import UUID

import pytest
from dmunodes import dm_user_nodes
from workerimages import WorkerImages

from snapd.block.bio import BioOp
from snapd.cow.format import BLOCK_SIZE
from snapd.dmuser.arena import ARENA_BYTES, PLACE_SHIFT, create_arena, map_arena
from snapd.dmuser.message import HEADER_BYTES, Answer, Flag, Request
from snapd.merge.sharedmap import SharedMap
from snapd.proc.child import Child

BLOCKS = 1024
_ANSWER = struct.Struct("<QQ24x")


class Service:
    """Descriptors as a service keeps them, and the workers that it starts with them."""

    def __init__(self, directory: Path) -> None:
        self.images = WorkerImages(directory, 1, blocks=BLOCKS)
        self.fence = str(directory / "fence")
        undo = directory / "undo"
        undo.mkdir()
        extent_map = self.images.extent_map()
        self.fds = {
            "arena": create_arena(),
            "base": os.open(self.images.base, os.O_RDWR),
            "cow": os.open(self.images.cow, os.O_RDWR),
            "extent_map": os.memfd_create("extent map"),
            "shared_map": os.memfd_create("shared map"),
            "undo_directory": os.open(undo, os.O_RDONLY | os.O_DIRECTORY),
        }
        extent_map.save(self.fds["extent_map"])
        SharedMap.create(self.fds["shared_map"], extent_map, UUID(int=1), 1)
        self.arena = map_arena(self.fds["arena"])
        self.children: list[Child] = []
        self.sockets: list[socket.socket] = []

    def start(self, *names: str, node: str | None = None) -> Child:
        """A worker with these descriptors, its channel the end of a new socket or a node."""
        fds = [self.fds[name] for name in names]
        if node is not None:
            arguments = ["--inherited", ",".join([*names, "fence"]), "--channel", node]
            child = Child.spawn_fenced("snapd.worker", arguments, fds, self.fence)
        else:
            ours, theirs = socket.socketpair()
            ours.settimeout(60)
            self.sockets.append(ours)
            arguments = ["--inherited", ",".join(["channel", *names, "fence"])]
            with theirs:
                child = Child.spawn_fenced("snapd.worker", arguments, [theirs.fileno(), *fds], self.fence)
        self.children.append(child)
        return child

    def ask(self, *requests: Request) -> list[tuple[int, int]]:
        """Send requests on the newest socket; the answers."""
        self.sockets[-1].sendall(b"".join(request.pack() for request in requests))
        raw = b""
        while len(raw) < len(requests) * HEADER_BYTES:
            more = self.sockets[-1].recv(1 << 20)
            assert more, "the worker is gone"
            raw += more
        return [_ANSWER.unpack_from(raw, at) for at in range(0, len(raw), HEADER_BYTES)]

    def close(self) -> None:
        for child in self.children:
            if child.pidfd >= 0:
                child.kill()
                child.wait(60_000)
        for connection in self.sockets:
            connection.close()
        self.arena.release()
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


IMAGE = ("arena", "base", "cow", "extent_map", "shared_map", "undo_directory")


def test_a_snapshot_in_the_arena(service: Service) -> None:
    """DMU-8, DMU-9: every block of every kind, many at once, payload only in the arena."""
    child = service.start(*IMAGE)
    new = service.images.new
    for first in range(0, BLOCKS, 256):
        requests = [Request(i, BioOp.READ, i * 8192 << PLACE_SHIFT, (first + i) * 8, BLOCK_SIZE) for i in range(256)]
        assert service.ask(*requests) == [(i, Answer.SUCCESS) for i in range(256)]
        for i in range(256):
            at = (first + i) * BLOCK_SIZE
            assert service.arena[i * 8192 : i * 8192 + BLOCK_SIZE] == new[at : at + BLOCK_SIZE]
    assert service.ask(Request(1, BioOp.WRITE, 0, 0, 512)) == [(1, Answer.ERROR)]
    service.sockets[-1].close()
    assert child.wait(60_000) == 0


def test_the_next_worker_goes_on(service: Service) -> None:
    """DMU-185: after SIGKILL a successor behind the same fence serves the same arena."""
    for _ in range(3):
        child = service.start("arena", "base")
        data = Random(1).randbytes(4096)
        service.arena[:4096] = data
        write = Request(1, BioOp.WRITE, int(Flag.FUA), 8, 4096)
        read = Request(2, BioOp.READ, (ARENA_BYTES - 4096) << PLACE_SHIFT, 8, 4096)
        assert service.ask(write, read) == [(1, Answer.SUCCESS), (2, Answer.SUCCESS)]
        assert service.arena[ARENA_BYTES - 4096 :] == data
        service.arena[ARENA_BYTES - 4096 :] = bytes(4096)
        child.kill()
        assert child.wait(60_000) == 128 + signal.SIGKILL


def test_a_worker_waits_for_its_predecessor(service: Service) -> None:
    """DMU-185: it answers nothing while the other lives; SIGTERM lets that one end in order."""
    first = service.start("arena", "base")
    assert service.ask(Request(1, BioOp.READ, 0, 0, 512)) == [(1, Answer.SUCCESS)]
    second = service.start("arena", "base")
    service.sockets[-1].sendall(Request(2, BioOp.READ, 0, 0, 512).pack())
    # Until the kernel lists it as waiting for the lock.
    while f"-> FLOCK  ADVISORY  WRITE {second.pid} " not in Path("/proc/locks").read_text():
        pass
    service.sockets[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        service.sockets[-1].recv(1)
    service.sockets[-1].settimeout(60)
    first.signal(signal.SIGTERM)
    assert first.wait(60_000) == 0
    assert _ANSWER.unpack(service.sockets[-1].recv(HEADER_BYTES)) == (2, Answer.SUCCESS)
    second.signal(signal.SIGTERM)
    assert second.wait(60_000) == 0


def test_planned_hand_over_on_a_node(service: Service) -> None:
    """DMU-189, DMU-78, DMU-171: the successor has the node open when the old one drains, so no request fails."""
    image = IMAGE[1:]
    with dm_user_nodes() as nodes:
        path = nodes.create("node", len(service.images.new))
        workers = [service.start(*image, node=path)]
        for turn in range(3):
            nodes.await_count("node", "readers", 1)
            workers.append(service.start(*image, node=path))
            nodes.await_count("node", "opens", 2)
            numbers = [nodes.submit("node", BioOp.READ, sector=8 * i, length=200 << 10) for i in range(100)]
            workers[turn].signal(signal.SIGTERM)
            for i, number in enumerate(numbers):
                start = 8 * i * 512
                assert nodes.wait("node", number) == (0, service.images.new[start : start + (200 << 10)])
            assert workers[turn].wait(60_000) == 0
        nodes.await_count("node", "readers", 1)
        nodes.remove("node")
        assert workers[-1].wait(60_000) == 0


def test_a_worker_that_cannot_start(service: Service) -> None:
    """A damaged extent map: exit 1, and nothing was answered."""
    os.pwrite(service.fds["extent_map"], b"\xff", 100)
    child = service.start(*IMAGE)
    assert child.wait(60_000) == 1
    assert service.sockets[-1].recv(1) == b""

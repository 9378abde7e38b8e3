"""An export over real sockets, with the clock, the store and the daemon's answers in the test's hand.

The daemon is the test: it takes the target's messages and answers into the arena, by their places.
"""

import os
import random
import socket
import struct
import time
import uuid
from collections.abc import Callable

from zeromap import zero_map

from snapd.block.bio import BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import Buffer, WritableBuffer
from snapd.device.allocation import Allocation
from snapd.device.config import Route
from snapd.device.datapath import DataPath
from snapd.device.export import Export
from snapd.device.handshake import Handshake
from snapd.device.loop import Loop
from snapd.device.nbd import (
    ALLOCATION_CONTEXT,
    CHUNK_DONE,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    STRING_LENGTH,
    STRUCTURED_MAGIC,
    STRUCTURED_REPLY,
    Option,
)
from snapd.device.routes import Routes, SnapshotRoutes, WholeRoute
from snapd.device.slowio import SlowIo
from snapd.device.traffic import Traffic
from snapd.dmuser.arena import create_arena, map_arena
from snapd.dmuser.inflight import Channel, Message
from snapd.dmuser.message import Answer
from snapd.dmuser.target import Target
from snapd.merge.sharedmap import SharedMap
from snapd.proc.log import Log

BLOCK = 4096
BLOCKS = 10_240
SIZE = BLOCKS * BLOCK
RANDOM_BYTES = 3000 * BLOCK
OLD = random.Random(4).randbytes(RANDOM_BYTES)
DAEMONS_BLOCKS = ((100, 200), (300, 2900))
"""What is the daemon's on a snapshot route; it answers with the base's bytes, every bit turned."""
WAIT_S = 30

_TURN = bytes(255 - i for i in range(256))


def turned(data: bytes) -> bytes:
    return data.translate(_TURN)


def _new_image() -> bytes:
    image = bytearray(OLD)
    for start, end in DAEMONS_BLOCKS:
        image[start * BLOCK : end * BLOCK] = turned(OLD[start * BLOCK : end * BLOCK])
    return bytes(image) + bytes(SIZE - RANDOM_BYTES)


NEW = _new_image()
"""What a snapshot reads as."""


def new(offset: int, length: int) -> bytes:
    return NEW[offset : offset + length]


class FaultyStore(FileStore):
    """A file whose operations can be made to fail, to find nothing in memory, or to meet a rollback; all counted."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.fails: int = 0
        self.is_cold = False
        self.can_unmap = True
        self.withdraw: SharedMap | None = None
        self.calls: list[tuple[str, int, int]] = []

    def read_cached(self, buffer: memoryview, offset: int) -> bool:
        if self.is_cold or self.fails:
            return False
        found = super().read_cached(buffer, offset)
        self._after_read()
        return found

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        self._count("read", offset, len(buffer))
        super().read_into(buffer, offset)
        self._after_read()

    def write(self, data: Buffer, offset: int) -> None:
        self._count("write", offset, len(data))
        super().write(data, offset)

    def flush(self) -> None:
        self._count("flush", 0, 0)

    def discard(self, offset: int, length: int) -> None:
        self._count("discard", offset, length)
        super().discard(offset, length)

    def unmap(self, offset: int, length: int) -> bool:
        self._count("unmap", offset, length)
        return self.can_unmap and super().unmap(offset, length)

    def zero(self, offset: int, length: int) -> None:
        self._count("zero", offset, length)
        super().zero(offset, length)

    def content(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def _count(self, name: str, offset: int, length: int) -> None:
        self.calls.append((name, offset, length))
        if self.fails:
            raise SnapdError(self.fails, "medium error")

    def _after_read(self) -> None:
        if self.withdraw is not None:
            self.withdraw.withdraw()


class Bench:
    """An export of `SIZE` bytes on one of the routes, and its daemon, which keeps what it takes in `taken`.

    Writes that the daemon answers change `image`, which is what it reads from on the routes that are all its own.
    """

    def __init__(self, directory: str, route: Route = Route.SNAPSHOT, *, shares_memory: bool = True) -> None:
        self.path = os.path.join(directory, "nbd")
        self.route = route
        self.clock = ManualClock()
        self.loop = Loop()
        self.target = Target(self.clock)
        self.taken: list[Message] = []
        self.image = bytearray(NEW if route is Route.SNAPSHOT else OLD + bytes(SIZE - RANDOM_BYTES))
        self._closed = False
        self._file = open(os.path.join(directory, "base"), "w+b")  # noqa: SIM115
        self._file.write(OLD)
        self._file.flush()
        self._file.truncate(SIZE)
        self.store = FaultyStore(self._file.fileno())
        changed = {block for start, end in DAEMONS_BLOCKS for block in range(start, end)}
        extent_map = zero_map(changed, BLOCKS, block_size=BLOCK)
        with open(os.path.join(directory, "shared"), "w+b") as file:
            self.shared = SharedMap.create(file.fileno(), extent_map, uuid.UUID(int=1), 1)
        routes: Routes = WholeRoute(is_local=route is Route.RAW)
        if route is Route.SNAPSHOT:
            routes = SnapshotRoutes(self.shared, BLOCK)
        arena_fd = create_arena()
        self.data_path = DataPath(
            size_bytes=SIZE,
            read_only=route is Route.SNAPSHOT,
            routes=routes,
            memory=map_arena(arena_fd),
            shares_memory=shares_memory,
            target=None if route is Route.RAW else self.target,
            store=None if route is Route.EXTERNAL else self.store,
            slow=SlowIo(self.loop),
        )
        os.close(arena_fd)
        self.memory = self.data_path.memory
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(100)
        self.traffic = Traffic()
        self.export = Export(
            self.loop,
            [self._listener],
            path=self.data_path,
            allocation=Allocation(self.store, extent_map if route is Route.SNAPSHOT else None),
            clock=self.clock,
            traffic=self.traffic,
            log=Log("test", self.clock),
        )
        self.daemon: Channel = self.target.open()

    @property
    def daemon_room(self) -> int:
        """What one region of the daemon's part of the arena could have."""
        return self.data_path.arena.room()

    def turn(self) -> None:
        """The host's rounds, until nothing more happens; the daemon takes its messages and keeps them."""
        for _ in range(6):
            self.loop.run_once(0)
            self.target.expire()
            self.export.expire()
            self._settle()

    def _settle(self) -> None:
        path = self.data_path
        while True:
            path.submit_waiting()
            while (message := self.daemon.take()) is not None:
                self.daemon.handed_over()
                self.taken.append(message)
            if path.can_submit:
                continue
            path.read_local()
            parsed = self.export.flush()
            path.read_cold()
            if not parsed and not path.can_submit and not path.can_read_local and not self.export.has_replies:
                return

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Go round until something is so that another thread has a part in."""
        end = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < end
            self.loop.run_once(20)
            self._settle()

    def answer(self, message: Message, code: int = Answer.SUCCESS) -> None:
        """Do what the message says, unless `code` says that it failed, and answer it."""
        self.taken.remove(message)
        bio = message.bio
        if code == Answer.SUCCESS:
            self._do(message)
        if bio.place >= 0 or bio.op is not BioOp.READ:
            self.daemon.answer_all([(message.seq, code)])
        elif self.daemon.answer(message.seq, code) is not None:
            self.daemon.answered()
        self.turn()

    def answer_everything(self) -> None:
        """Also what comes meanwhile."""
        while self.taken:
            self.answer(self.taken[0])

    def _do(self, message: Message) -> None:
        bio = message.bio
        payload = bio.data if bio.place < 0 else self.memory[bio.place : bio.place + bio.length]
        start, stop = bio.sector * 512, bio.sector * 512 + bio.length
        if bio.op is BioOp.READ:
            assert payload is not None
            payload[:] = self.image[start:stop]
        elif bio.op is BioOp.WRITE and bio.length:
            assert payload is not None
            self.image[start:stop] = payload
        elif bio.op is not BioOp.WRITE:
            self.image[start:stop] = bytes(bio.length)

    def close_export(self) -> None:
        if not self._closed:
            self._closed = True
            self.export.close()

    def close(self) -> None:
        self.close_export()
        self._listener.close()
        self.daemon.close()
        self._file.close()


Chunks = list[tuple[int, bytes]]
"""Kind and body of the chunks of one structured reply."""


class BenchClient:
    """A raw NBD client of a bench, which it keeps going."""

    def __init__(
        self, bench: Bench, *, negotiate: bool = True, structured: bool = False, allocation: bool = False
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(bench.path)
        self.bench = bench
        bench.turn()
        if negotiate:
            options = [(Option.STRUCTURED_REPLY, b"")] if structured or allocation else []
            if allocation:
                query = STRING_LENGTH.pack(len(ALLOCATION_CONTEXT)) + ALLOCATION_CONTEXT
                options.append((Option.SET_META_CONTEXT, STRING_LENGTH.pack(0) + STRING_LENGTH.pack(1) + query))
            options.append((Option.GO, bytes(6)))
            said = b"".join(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data for number, data in options)
            self.socket.sendall(struct.pack(">I", 3) + said)
            bench.turn()
            assert self.socket.recv(4096).startswith(Handshake.greeting)
        self.socket.setblocking(False)

    def send(self, *requests: bytes) -> None:
        """Send as fast as the export takes it in; what it does not take stays unsent, and that is an error."""
        assert self.offer(*requests) == sum(map(len, requests))

    def offer(self, *requests: bytes) -> int:
        """Send as much as the export takes; returns how many bytes."""
        data = memoryview(b"".join(requests))
        sent = 0
        refused = 0
        while sent < len(data) and refused < 3:
            try:
                sent += self.socket.send(data[sent:])
                refused = 0
            except BlockingIOError:
                refused += 1
            self.bench.turn()
        self.bench.turn()
        return sent

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

    def replies(self, lengths: dict[int, int] | None = None) -> dict[int, tuple[int, bytes]]:
        """All simple replies there are, by cookie: (error, payload); `lengths` are those of the reads."""
        raw = self.receive()
        assert raw is not None
        found: dict[int, tuple[int, bytes]] = {}
        at = 0
        while at < len(raw):
            magic, number, cookie = REPLY.unpack_from(raw, at)
            assert magic == REPLY_MAGIC
            assert cookie not in found
            at += REPLY.size
            length = 0 if number or lengths is None else lengths.get(cookie, 0)
            found[cookie] = number, raw[at : at + length]
            assert len(found[cookie][1]) == length
            at += length
        return found

    def chunks(self) -> dict[int, Chunks]:
        """All structured replies there are, by cookie; each must be complete."""
        raw = self.receive()
        assert raw is not None
        found: dict[int, Chunks] = {}
        done: set[int] = set()
        at = 0
        while at < len(raw):
            magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(raw, at)
            assert magic == STRUCTURED_MAGIC
            assert cookie not in done
            at += STRUCTURED_REPLY.size
            found.setdefault(cookie, []).append((kind, raw[at : at + length]))
            assert at + length <= len(raw)
            at += length
            if flags & CHUNK_DONE:
                done.add(cookie)
        assert done == found.keys()
        return found


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)

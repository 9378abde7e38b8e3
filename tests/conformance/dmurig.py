"""Bios that record their completion, a target with its clock in hand, and where each of its messages is."""

import contextlib
import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import pytest

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.dmuser.inflight import Channel, Message
from snapd.dmuser.message import HEADER, Answer, Flag, Request
from snapd.dmuser.node import Node, NodeFile
from snapd.dmuser.target import Target

OK = 0
EIO = errno.EIO
PREFLUSH = int(Flag.PREFLUSH)
PATIENCE_S = 20
"""A thread that has not come so far after this will never."""

T = TypeVar("T")


class Submitted:
    """A bio and every completion it got."""

    def __init__(self, op: BioOp = BioOp.READ, sector: int = 0, length: int = SECTOR_BYTES, flags: int = 0) -> None:
        self.results: list[int] = []
        self.memory = bytearray(length if op <= BioOp.WRITE else 0)
        self.bio = Bio(
            op, sector, length, memoryview(self.memory), lambda _bio, number: self.results.append(number), flags
        )

    @property
    def result(self) -> int | None:
        """The one completion; None when there is none yet. A second one is an error (DMU-41)."""
        assert len(self.results) <= 1, f"completed {len(self.results)} times"
        return self.results[0] if self.results else None


class Rig:
    """A target, its clock, and shorthands for what a submitter and a daemon do."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.target = Target(self.clock, **options)

    def submit(self, op: BioOp = BioOp.READ, **fields: int) -> Submitted:
        submitted = Submitted(op, **fields)
        self.target.submit(submitted.bio)
        assert submitted.result is None
        return submitted

    def wait_in_line(self, op: BioOp = BioOp.READ, **fields: int) -> Submitted:
        submitted = Submitted(op, **fields)
        self.target.submit_or_wait(submitted.bio)
        return submitted

    def advance(self, ms: int) -> None:
        """Let time pass; the timers run as the caller's loop would run them."""
        self.clock.advance(ms)
        self.target.expire()


class Schedule:
    """Threads stepped through the named points of a node."""

    def __init__(self) -> None:
        self._reached: dict[str, threading.Semaphore] = {}
        self._gates: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def __call__(self, point: str) -> None:
        self._at(point).release()
        if (gate := self._gates.get(point)) is not None:
            assert gate.wait(PATIENCE_S)

    def hold(self, point: str) -> None:
        """Whoever reaches the point stays there until `release`."""
        self._gates[point] = threading.Event()

    def release(self, point: str) -> None:
        self._gates.pop(point).set()

    def reached(self, point: str) -> None:
        """Return when a thread has reached the point, once for every time that one does."""
        assert self._at(point).acquire(timeout=PATIENCE_S), f"nobody came to {point!r}"

    def _at(self, point: str) -> threading.Semaphore:
        with self._lock:
            return self._reached.setdefault(point, threading.Semaphore(0))


class NodeRig:
    """A node with its clock and its schedule."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.schedule = Schedule()
        self.target = Target(self.clock, deferred=True, **options)
        self.node = Node(self.target, self.schedule)

    def submit(self, op: BioOp = BioOp.READ, **fields: int) -> Submitted:
        submitted = Submitted(op, **fields)
        self.node.submit(submitted.bio)
        return submitted

    def advance(self, ms: int) -> None:
        self.clock.advance(ms)
        self.node.expire()


class Call(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[..., T], *arguments: Any) -> None:
        self._results: list[T] = []
        self._errors: list[SnapdError] = []

        def run() -> None:
            try:
                self._results.append(function(*arguments))
            except SnapdError as error:
                self._errors.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What it returned."""
        self._join()
        assert not self._errors, self._errors
        return self._results[0]

    def errno(self) -> int:
        """The number it failed with."""
        self._join()
        assert not self._results, self._results
        return self._errors[0].errno

    def _join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the call never returned"


@contextlib.contextmanager
def raises(number: int) -> Iterator[None]:
    """The body ends with an error of this number."""
    with pytest.raises(SnapdError) as error:
        yield
    assert error.value.errno == number


def read_one(channel: Channel) -> Message:
    """What a daemon does that reads one whole message."""
    message = channel.take()
    assert message is not None
    channel.handed_over()
    return message


def serve(channel: Channel) -> Message:
    """Read one message and answer it with success."""
    message = read_one(channel)
    if channel.answer(message.seq, 0) is not None:
        channel.answered()
    return message


def read_request(file: NodeFile, step: int = 1 << 30) -> tuple[Request, bytes]:
    """One whole message from a node, read `step` bytes at a time."""
    header = b""
    while len(header) < HEADER.size:
        header += file.read(min(step, HEADER.size - len(header)))
    request = Request._make(HEADER.unpack(header))
    payload = b""
    while request.op == BioOp.WRITE and len(payload) < request.length:
        payload += file.read(min(step, request.length - len(payload)))
    return request, payload


def write_all(file: NodeFile, data: bytes, step: int = 1 << 30) -> None:
    """All of it, however short the writes are."""
    at = 0
    while at < len(data):
        at += file.write(data[at : at + step])


def answer_header(seq: int, code: int = Answer.SUCCESS) -> bytes:
    """The 40 bytes of an answer."""
    return HEADER.pack(seq, code, 0, 0, 0)


def assert_one_place(target: Target, submitted: Iterable[Submitted]) -> None:
    """DMU-4: each bio is in line, or in one place as a message, or completed once; and nothing else is anywhere."""
    places: Counter[int] = Counter()
    groups = {id(channel.group): channel.group for channel in target._channels}
    for message in target._queue:
        places[id(message.bio)] += 1
    for bio in target._waiting:
        places[id(bio)] += 1
    for channel in target._channels:
        for message in channel._reading:
            places[id(message.bio)] += 1
        if channel._answering is not None:
            places[id(channel._answering.bio)] += 1
    for group in groups.values():
        for message in group.awaiting.values():
            places[id(message.bio)] += 1
    for one in submitted:
        found = places.pop(id(one.bio), 0) + len(one.results)
        assert found == 1, f"{one.bio.op.name} at sector {one.bio.sector} is in {found} places"
    assert not places, f"{len(places)} bios nobody submitted"
    payload = sum(message.bio.length for message in target._queue if message.bio.op == BioOp.WRITE)
    assert target._queued_payload_bytes == payload

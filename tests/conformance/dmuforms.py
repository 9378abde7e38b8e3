"""One target in three forms, driven alike: called directly, through a node's files, over sockets."""

import contextlib
import select
import socket
from random import Random
from typing import Any

from dmurig import Submitted, answer_header, read_request, write_all

from snapd.block.bio import BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.inflight import Channel
from snapd.dmuser.message import HEADER, HEADER_BYTES, Answer, Request
from snapd.dmuser.node import Node, NodeFile
from snapd.dmuser.target import Target

Seen = tuple[Request, bytes]


class Form:
    """What all three have in common. A channel is named by the number of its open."""

    def __init__(self, random: Random, **options: Any) -> None:
        self.random = random
        self.clock = ManualClock()
        self.submitted: list[Submitted] = []
        self.target = Target(self.clock, deferred=isinstance(self, NodeForm), **options)

    def submit(self, submitted: Submitted) -> None:
        self.target.submit_or_wait(submitted.bio)

    def expire(self) -> None:
        self.target.expire()

    def destroy(self) -> None:
        self.target.destroy()

    def open(self, name: int, group: str) -> None:
        raise NotImplementedError

    def read_all(self, name: int) -> list[Seen]:
        """Everything that is queued, as the daemon on this channel gets it."""
        raise NotImplementedError

    def answer(self, name: int, seq: int, code: int, data: bytes) -> None:
        """A whole answer; an invalid number closes the channel, as whoever runs the daemon would."""
        raise NotImplementedError

    def close(self, name: int) -> None:
        raise NotImplementedError


class DirectForm(Form):
    """The state machine itself."""

    def __init__(self, random: Random, **options: Any) -> None:
        super().__init__(random, **options)
        self.channels: dict[int, Channel] = {}

    def open(self, name: int, group: str) -> None:
        self.channels[name] = self.target.open(group)

    def read_all(self, name: int) -> list[Seen]:
        seen = []
        while (message := self.channels[name].take()) is not None:
            self.channels[name].handed_over()
            data = message.bio.data if message.bio.op == BioOp.WRITE else None
            seen.append((Request._make(HEADER.unpack(message.header())), bytes(data or b"")))
        return seen

    def answer(self, name: int, seq: int, code: int, data: bytes) -> None:
        try:
            message = self.channels[name].answer(seq, code)
        except SnapdError:
            self.close(name)
            return
        if message is not None:
            assert message.bio.data is not None
            message.bio.data[:] = data
            self.channels[name].answered()

    def close(self, name: int) -> None:
        self.channels.pop(name).close()


class NodeForm(Form):
    """Files on a node, read and written in pieces of any size."""

    def __init__(self, random: Random, **options: Any) -> None:
        super().__init__(random, **options)
        self.node = Node(self.target)
        self.files: dict[int, NodeFile] = {}

    def submit(self, submitted: Submitted) -> None:
        self.node.submit(submitted.bio)

    def expire(self) -> None:
        self.node.expire()

    def destroy(self) -> None:
        self.node.destroy()

    def open(self, name: int, group: str) -> None:
        self.files[name] = self.node.open(group=group, nonblocking=True)

    def read_all(self, name: int) -> list[Seen]:
        seen = []
        with contextlib.suppress(SnapdError):
            while True:
                seen.append(read_request(self.files[name], self.random.choice([39, 40, 997, 4096])))
        return seen

    def answer(self, name: int, seq: int, code: int, data: bytes) -> None:
        valid = self.files[name]._channel.awaits(seq)
        with contextlib.suppress(SnapdError):
            write_all(self.files[name], answer_header(seq, code) + data, self.random.choice([39, 41, 997, 4096]))
        if not valid:
            self.close(name)

    def close(self, name: int) -> None:
        self.files.pop(name).close()


class SocketForm(Form):
    """Stream sockets; the daemons' ends are raw."""

    def __init__(self, random: Random, **options: Any) -> None:
        super().__init__(random, **options)
        self.channels: dict[int, SocketChannel] = {}
        self.daemons: dict[int, socket.socket] = {}

    def open(self, name: int, group: str) -> None:
        ours, self.daemons[name] = socket.socketpair()
        try:
            self.channels[name] = SocketChannel(self.target, ours, group)
        except SnapdError:
            ours.close()
            self.daemons.pop(name).close()
            raise
        self.daemons[name].setblocking(False)

    def read_all(self, name: int) -> list[Seen]:
        stream = bytearray()
        while True:
            self.channels[name].send()
            try:
                more = self.daemons[name].recv(1 << 20)
            except BlockingIOError:
                break
            stream += more
            if not more:
                break
        return parse(bytes(stream))

    def answer(self, name: int, seq: int, code: int, data: bytes) -> None:
        self.daemons[name].sendall(answer_header(seq, code) + data)
        try:
            while select.select([self.channels[name]], [], [], 0)[0]:
                assert self.channels[name].receive()
        except SnapdError:
            self.close(name)

    def close(self, name: int) -> None:
        self.daemons.pop(name).close()
        self.channels.pop(name).close()


def parse(stream: bytes) -> list[Seen]:
    """The whole messages that a run of bytes from a target is."""
    seen, at = [], 0
    while at < len(stream):
        request = Request._make(HEADER.unpack_from(stream, at))
        at += HEADER_BYTES
        size = request.length if request.op == BioOp.WRITE else 0
        seen.append((request, stream[at : at + size]))
        at += size
    return seen


def data_of(request: Request, code: int) -> bytes:
    """What an answer of this code carries for the request."""
    if code != Answer.SUCCESS or request.op != BioOp.READ:
        return b""
    return Random(request.seq).randbytes(request.length)

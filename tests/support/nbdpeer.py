"""An NBD client that checks every byte it gets, and can speak the protocol as wrongly as a test likes."""

import os
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from snapd.device.handshake import Handshake
from snapd.device.nbd import (
    ALLOCATION_CONTEXT,
    ALLOCATION_CONTEXT_ID,
    CHUNK_DONE,
    CLIENT_FLAGS,
    DATA_CHUNK,
    ERROR_CHUNK,
    EXTENT,
    GREETING,
    HOLE_CHUNK,
    INFO_EXPORT,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    STATUS_CHUNK,
    STRING_LENGTH,
    STRUCTURED_MAGIC,
    STRUCTURED_REPLY,
    Chunk,
    Command,
    Option,
    OptionReply,
)

FLAGS = CLIENT_FLAGS.pack(3)
Address = str | tuple[str, int]


def option(number: int, data: bytes = b"", *, magic: bytes = OPTION_MAGIC, length: int | None = None) -> bytes:
    """An option, which may lie about its length."""
    return OPTION.pack(magic, number, len(data) if length is None else length) + data


def info(name: bytes = b"") -> bytes:
    """The data of an INFO or GO without requests for information."""
    return STRING_LENGTH.pack(len(name)) + name + bytes(2)


def contexts(*queries: bytes, name: bytes = b"") -> bytes:
    """The data of a LIST_META_CONTEXT or SET_META_CONTEXT."""
    texts = b"".join(STRING_LENGTH.pack(len(query)) + query for query in queries)
    return STRING_LENGTH.pack(len(name)) + name + STRING_LENGTH.pack(len(queries)) + texts


def request(
    command: int, cookie: int, offset: int = 0, length: int = 0, *, flags: int = 0, magic: int = REQUEST_MAGIC
) -> bytes:
    """A request's header."""
    return REQUEST.pack(magic, flags, command, cookie, offset, length)


NEGOTIATION = (
    FLAGS
    + option(Option.STRUCTURED_REPLY)
    + option(Option.SET_META_CONTEXT, contexts(ALLOCATION_CONTEXT))
    + option(Option.LIST)
    + option(Option.INFO, info())
    + option(Option.GO, info())
)
"""What a modern client says, in one go."""
NEGOTIATED = (Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.LIST, Option.INFO, Option.GO)


@dataclass
class Reply:
    """A whole reply; `data` is a READ's payload, `extents` what BLOCK_STATUS said, `chunks` how many there were."""

    command: int
    offset: int
    length: int
    error: int = 0
    data: bytearray = field(default_factory=bytearray)
    extents: list[tuple[int, int]] = field(default_factory=list)
    chunks: int = 0
    filled: list[tuple[int, int]] = field(default_factory=list)


class Peer:
    """A connection, at first not negotiated; a context manager. Every wait ends after `timeout_s`."""

    def __init__(self, address: Address, timeout_s: float = 60) -> None:
        self.structured = False
        self.size_bytes = self.flags = 0
        self.under_way: dict[int, Reply] = {}
        self._cookie = 0
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        # Without a timeout as yet: with one, a connect to a full backlog would fail at once.
        self.socket.connect(address)
        self.socket.settimeout(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> bool:
        """Send all of it; False when the server has hung up."""
        try:
            self.socket.sendall(b"".join(parts))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def send_what_fits(self, data: bytes) -> int:
        """Send until the socket takes no more; returns how many bytes it took."""
        sent = 0
        timeout = self.socket.gettimeout()
        self.socket.setblocking(False)
        try:
            while sent < len(data):
                sent += self.socket.send(data[sent : sent + (1 << 20)])
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(timeout)
        return sent

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError when the server hangs up before."""
        received = bytearray(length)
        at = 0
        while at < length:
            try:
                got = self.socket.recv_into(memoryview(received)[at:])
            except ConnectionResetError:
                got = 0
            if not got:
                raise EOFError(f"the server hung up after {at} of {length} bytes")
            at += got
        return bytes(received)

    def rest(self) -> bytes:
        """All there is until the server hangs up, which it must."""
        received = bytearray()
        try:
            while got := self.socket.recv(1 << 16):
                received += got
        except ConnectionResetError:
            pass
        return bytes(received)

    def greet(self) -> None:
        """Take the greeting and send the client flags."""
        assert self.receive(GREETING.size) == Handshake.greeting
        self.send(FLAGS)

    def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; returns its replies, (kind, data), of which the last is ACK or an error."""
        self.send(option(number, data))
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[tuple[int, bytes]]:
        """The replies to one option."""
        replies: list[tuple[int, bytes]] = []
        while not replies or not (replies[-1][0] == OptionReply.ACK or replies[-1][0] >> 31):
            magic, echoed, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
            assert (magic, echoed) == (OPTION_REPLY_MAGIC, number)
            replies.append((kind, self.receive(length)))
        return replies

    def negotiate(self, *, structured: bool = False, allocation: bool = False) -> Self:
        """Greet and go into the transmission phase."""
        self.greet()
        self.structured = structured or allocation
        if self.structured:
            assert self.ask(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        if allocation:
            told, _ = self.ask(Option.SET_META_CONTEXT, contexts(ALLOCATION_CONTEXT))
            assert told[1] == STRING_LENGTH.pack(ALLOCATION_CONTEXT_ID) + ALLOCATION_CONTEXT
        self.take_export(self.ask(Option.GO, info()))
        return self

    def take_export(self, replies: list[tuple[int, bytes]]) -> None:
        """Learn size and flags from the replies to INFO or GO."""
        assert replies[-1] == (OptionReply.ACK, b"")
        (export,) = (data for kind, data in replies if kind == OptionReply.INFO and data[:2] == bytes(2))
        _, self.size_bytes, self.flags = INFO_EXPORT.unpack(export)

    def ready(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> bytes:
        """A request with a cookie of its own, for `send`; from now on its reply is expected."""
        # Far apart, so that a cookie which loses a part is noticed.
        self._cookie += 0x1_0000_0001_0001
        cookie = self._cookie & (1 << 64) - 1
        self.under_way[cookie] = Reply(command, offset, length)
        return request(command, cookie, offset, length, flags=flags) + payload

    def reply(self) -> Reply:
        """The next reply that is complete; fails for one that nobody asked for, or that does not add up."""
        while True:
            (magic,) = struct.unpack(">I", self.receive(4))
            if magic == REPLY_MAGIC:
                _, error, cookie = REPLY.unpack(magic.to_bytes(4, "big") + self.receive(REPLY.size - 4))
                reply = self.under_way.pop(cookie)
                # Once structured replies are agreed on these two must have them, even to be refused.
                assert not self.structured or reply.command not in (Command.READ, Command.BLOCK_STATUS)
                reply.error = error
                if reply.command == Command.READ and not error:
                    reply.data = bytearray(self.receive(reply.length))
                return reply
            assert magic == STRUCTURED_MAGIC, f"reply magic {magic:#x}"
            assert self.structured, "a structured reply that was not negotiated"
            raw = magic.to_bytes(4, "big") + self.receive(STRUCTURED_REPLY.size - 4)
            _, flags, kind, cookie, length = STRUCTURED_REPLY.unpack(raw)
            assert length <= (32 << 20) + 64
            reply = self.under_way[cookie]
            reply.chunks += 1
            self._take_chunk(reply, kind, self.receive(length))
            assert not flags & ~CHUNK_DONE
            if flags & CHUNK_DONE:
                del self.under_way[cookie]
                self._check(reply)
                return reply
            assert kind != Chunk.NONE

    def replies(self) -> list[Reply]:
        """Every reply that is outstanding, in the order of their ends."""
        return [self.reply() for _ in range(len(self.under_way))]

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Reply:
        """One request, and its reply; nothing else is outstanding."""
        assert not self.under_way
        assert self.send(self.ready(command, offset, length, flags=flags, payload=payload))
        return self.reply()

    def read(self, offset: int, length: int) -> bytes:
        """The payload of one READ, which must succeed."""
        reply = self.call(Command.READ, offset, length)
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))
        return bytes(reply.data)

    def extents(self, offset: int, length: int, *, flags: int = 0) -> list[tuple[int, int]]:
        """The extents of one BLOCK_STATUS, which must succeed."""
        reply = self.call(Command.BLOCK_STATUS, offset, length, flags=flags)
        assert not reply.error
        return reply.extents

    def _take_chunk(self, reply: Reply, kind: int, body: bytes) -> None:
        if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
            reply.error, message_length = ERROR_CHUNK.unpack_from(body)
            offset_length = DATA_CHUNK.size if kind == Chunk.ERROR_OFFSET else 0
            assert reply.error
            assert len(body) == ERROR_CHUNK.size + message_length + offset_length
        elif kind == Chunk.OFFSET_DATA:
            (offset,) = DATA_CHUNK.unpack_from(body)
            assert len(body) > DATA_CHUNK.size
            self._fill(reply, offset, body[DATA_CHUNK.size :])
        elif kind == Chunk.OFFSET_HOLE:
            offset, length = HOLE_CHUNK.unpack(body)
            assert length
            self._fill(reply, offset, bytes(length))
        elif kind == Chunk.BLOCK_STATUS:
            assert reply.command == Command.BLOCK_STATUS
            assert not reply.extents
            assert STATUS_CHUNK.unpack_from(body) == (ALLOCATION_CONTEXT_ID,)
            reply.extents = list(EXTENT.iter_unpack(body[STATUS_CHUNK.size :]))
            assert reply.extents
            assert all(length for length, _ in reply.extents)
            # The last extent may be longer than what was asked for, and only that.
            assert sum(length for length, _ in reply.extents[:-1]) < reply.length
        else:
            assert (kind, body) == (Chunk.NONE, b"")

    def _fill(self, reply: Reply, offset: int, data: bytes) -> None:
        assert reply.command == Command.READ
        at = offset - reply.offset
        assert 0 <= at < at + len(data) <= reply.length
        reply.data = reply.data or bytearray(reply.length)
        reply.data[at : at + len(data)] = data
        reply.filled.append((at, at + len(data)))

    def _check(self, reply: Reply) -> None:
        end = 0
        for start, stop in sorted(reply.filled):
            assert start >= end, "two chunks for the same bytes"
            assert reply.error or start == end, "bytes without a chunk"
            end = stop
        if not reply.error:
            assert end == (reply.length if reply.command == Command.READ else 0)
            assert bool(reply.extents) == (reply.command == Command.BLOCK_STATUS)

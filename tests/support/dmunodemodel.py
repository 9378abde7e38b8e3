"""What the kernel does for a dm-user node, as a model: written from the observed rows DMU-161 to DMU-181 alone.

It shares nothing with `snapd.dmuser.target`, so that a worker is not tested against its own authors' understanding.
"""

import errno
import os
import struct
import time
from collections import deque

HEADER = struct.Struct("<5Q")
READ, WRITE = 0, 1


class Refused(Exception):
    """An errno number instead of a result."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Message:
    """One request. `handed_bytes` is how much of it the daemon has read, `result` its errno number at its end."""

    def __init__(self, seq: int, kind: int, flags: int, sector: int, length: int, data: bytes) -> None:
        self.kind = kind
        self.deadline: float | None = None
        self.result: int | None = None
        self.stream = HEADER.pack(seq, kind, flags, sector, length) + data
        self.handed_bytes = 0
        self.wanted_bytes = length if kind == READ else 0
        self.content = bytearray()

    def piece(self, size: int) -> bytes:
        """The next bytes for the daemon: of the header or of the payload, never of both (DMU-164)."""
        border = HEADER.size if self.handed_bytes < HEADER.size else len(self.stream)
        found = self.stream[self.handed_bytes : min(border, self.handed_bytes + size)]
        self.handed_bytes += len(found)
        return found

    @property
    def is_handed_over(self) -> bool:
        return self.handed_bytes == len(self.stream)


class Channel:
    """One open of a node."""

    def __init__(self, node: "Node") -> None:
        self.node = node
        self.reading: Message | None = None
        self.awaiting: dict[int, Message] = {}
        self.answering: Message | None = None
        self.header = b""
        self.is_poisoned = False
        self.blocked: deque[tuple[int, int]] = deque()
        self.held_writes: deque[tuple[int, bytes]] = deque()

    @property
    def is_held(self) -> bool:
        """Whether the next write has to wait."""
        hold = self.node.hold_bytes
        return hold >= 0 and self.answering is not None and len(self.answering.content) >= hold

    def read(self, size: int) -> bytes | None:
        """What a read(2) of so many bytes returns; None when it has to wait."""
        if self.reading is None:
            if self.node.is_destroyed:
                raise Refused(errno.ENOTBLK)
            if not self.node.queue:
                return None
            self.reading = self.node.queue.popleft()
        message = self.reading
        found = message.piece(size)
        if message.is_handed_over:
            self.reading = None
            self.awaiting[HEADER.unpack_from(message.stream)[0]] = message
        return found

    def write(self, data: bytes) -> int:
        """How many bytes a write(2) takes: at most to the end of one answer (DMU-166)."""
        if self.is_poisoned:
            raise Refused(errno.EINVAL)
        taken = 0
        if self.answering is None:
            taken = min(HEADER.size - len(self.header), len(data))
            self.header += data[:taken]
            if len(self.header) < HEADER.size:
                return taken
            seq, code, *_ = HEADER.unpack(self.header)
            self.header = b""
            message = self.awaiting.pop(seq, None)
            if message is None:
                # This write is a success still (DMU-168).
                self.is_poisoned = True
                return taken
            if code or not message.wanted_bytes:
                message.result = errno.EIO if code else 0
                return taken
            self.answering = message
        message = self.answering
        rest = data[taken : taken + message.wanted_bytes - len(message.content)]
        message.content += rest
        if len(message.content) == message.wanted_bytes:
            message.result = 0
            self.answering = None
        return taken + len(rest)

    def held(self) -> list[Message]:
        """What the daemon has begun to read and not answered to the end."""
        others = [message for message in (self.reading, self.answering) if message is not None]
        return [*others, *self.awaiting.values()]


class Node:
    """A target with its node."""

    def __init__(self, size_bytes: int, timeout_ms: int) -> None:
        self.size_bytes = size_bytes
        self.timeout_ms = timeout_ms
        self.is_destroyed = False
        self.is_terminated = False
        self.hold_bytes = -1
        self.channels: list[Channel] = []
        self.queue: deque[Message] = deque()
        self.messages: list[Message] = []

    def open(self) -> Channel:
        channel = Channel(self)
        self.channels.append(channel)
        return channel

    def close(self, channel: Channel) -> None:
        """What the channel had fails; after the last one, so does everything else, for good (DMU-170, DMU-171)."""
        self.channels.remove(channel)
        for message in channel.held():
            message.result = errno.EIO
        if not self.channels:
            self.is_terminated = True
            self.fail_queued()

    def submit(self, kind: int, flags: int, sector: int, length: int, data: bytes) -> int:
        message = Message(len(self.messages), kind, flags, sector, length, data)
        self.messages.append(message)
        if self.channels:
            self.queue.append(message)
        elif self.is_terminated:
            message.result = errno.EIO
        else:
            message.deadline = time.monotonic() + self.timeout_ms / 1000
            self.queue.append(message)
        return len(self.messages) - 1

    def expire(self) -> None:
        """Fail what has waited too long for a first daemon; once there is one, nothing expires (DMU-169)."""
        now = time.monotonic()
        if not self.channels and any(m.deadline is not None and m.deadline <= now for m in self.queue):
            self.queue.popleft().result = errno.EIO

    def destroy(self) -> None:
        if self.queue or any(channel.held() for channel in self.channels):
            raise Refused(errno.EBUSY)
        self.is_destroyed = True

    def fail_queued(self) -> None:
        while self.queue:
            self.queue.popleft().result = errno.EIO

    def count(self, what: str) -> int:
        """A figure of the order `await`."""
        if what == "opens":
            return len(self.channels)
        if what == "readers":
            return sum(len(channel.blocked) for channel in self.channels)
        if what == "queued":
            return len(self.queue)
        if what == "unanswered":
            return sum(len(channel.held()) for channel in self.channels)
        if what == "poisoned":
            return sum(channel.is_poisoned for channel in self.channels)
        if what == "held":
            return sum(len(channel.held_writes) for channel in self.channels)
        raise Refused(errno.EINVAL)

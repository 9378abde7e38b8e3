"""Replies of an NBD connection: how one is laid out, and the batch of READ replies that leaves in one piece.

A READ's reply header stands in the arena right in front of its payload, and the next reply right behind it, so that a
batch without a failure is one send. The reply of a request that failed is made anew, without payload.
"""

import errno
from collections.abc import Callable, Iterator

from snapd.device.batch import Batch
from snapd.device.nbd import (
    CHUNK_DONE,
    DATA_CHUNK,
    ERROR_CHUNK,
    REPLY,
    REPLY_MAGIC,
    STRUCTURED_MAGIC,
    STRUCTURED_REPLY,
    Chunk,
    NbdError,
)
from snapd.dmuser.arena import Region

_ERROR_NUMBERS = frozenset(NbdError)
_COOKIE_AT = 8
"""Where the cookie stands in both kinds of reply."""


class ReplyForm:
    """The kind of replies that a client has negotiated; `read_header_bytes` stand in front of READ data."""

    def __init__(self, *, structured: bool) -> None:
        self.structured = structured
        self.read_header_bytes = STRUCTURED_REPLY.size + DATA_CHUNK.size if structured else REPLY.size

    def write_read_header(self, memory: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        """The header of a READ that will succeed, `read_header_bytes` long."""
        if self.structured:
            STRUCTURED_REPLY.pack_into(
                memory, at, STRUCTURED_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA, cookie, DATA_CHUNK.size + length
            )
            DATA_CHUNK.pack_into(memory, at + STRUCTURED_REPLY.size, offset)
        else:
            REPLY.pack_into(memory, at, REPLY_MAGIC, 0, cookie)

    def plain(self, cookie: int, number: int) -> bytes:
        """A reply without data: success (0), or an errno number as the protocol knows it."""
        if number and number not in _ERROR_NUMBERS:
            number = errno.EIO
        if not self.structured:
            return REPLY.pack(REPLY_MAGIC, number, cookie)
        if not number:
            return STRUCTURED_REPLY.pack(STRUCTURED_MAGIC, CHUNK_DONE, Chunk.NONE, cookie, 0)
        return STRUCTURED_REPLY.pack(
            STRUCTURED_MAGIC, CHUNK_DONE, Chunk.ERROR, cookie, ERROR_CHUNK.size
        ) + ERROR_CHUNK.pack(number, 0)

    def chunk(self, cookie: int, kind: Chunk, payload: bytes) -> bytes:
        """A structured reply of one chunk."""
        return STRUCTURED_REPLY.pack(STRUCTURED_MAGIC, CHUNK_DONE, kind, cookie, len(payload)) + payload


class ReplyBatch(Batch):
    """READ replies of one connection in one region; the tag of a request is its place in `replies`, which says where
    each begins.

    `cursor` is where the next reply goes, `limit` the end of the region while it grows.
    """

    __slots__ = ("charge_bytes", "cursor", "limit", "replies", "started_us")

    def __init__(self, region: Region, on_ready: Callable[[Batch], None], started_us: int) -> None:
        super().__init__(region, on_ready)
        self.cursor = region.start
        self.limit = region.end
        self.replies: list[int] = []
        self.charge_bytes = 0
        self.started_us = started_us

    def pieces(self, memory: memoryview, form: ReplyForm) -> Iterator[memoryview | bytes]:
        """What to send, in order; the requests that failed have lost their payload."""
        assert self.region is not None
        start = self.region.start
        for tag in sorted(self.errors):
            at = self.replies[tag]
            end = self.replies[tag + 1] if tag + 1 < len(self.replies) else self.region.end
            if start < at:
                yield memory[start:at]
            cookie = int.from_bytes(memory[at + _COOKIE_AT : at + _COOKIE_AT + 8], "big")
            yield form.plain(cookie, self.errors[tag])
            start = end
        if start < self.region.end:
            yield memory[start : self.region.end]

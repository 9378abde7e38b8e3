"""The arena form of the channel: headers through the socket, payload in memory that both ends have.

The hot path of a device on a host without dm-user. As many requests as there are are received at once, worked off in
order and answered together. An answer is the request's own header: READ and SUCCESS are both 0 (DMU-9), and of the
rest only the type counts (DMU-8), so nothing is copied.

Invariant: a SUCCESS is sent when the payload is in its place, decoded and verified; a request that cannot be served
is answered ERROR or UNSUPPORTED, alone, and the service goes on.
"""

import errno
import struct

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.arena import FLAGS_MASK, PLACE_SHIFT
from snapd.dmuser.client import ChannelEnd, ChannelError
from snapd.dmuser.message import HEADER, HEADER_BYTES, SUSPECTS, Answer, Request
from snapd.proc.log import Log
from snapd.worker.backend import Backend, answer_to, describe

_RECEIVE_BYTES = 256 << 10
_PAYLOAD_AT_ONCE = 128 << 10
"""Answers are sent when their payload has come to so much, so that the target works while we go on."""
_LEAST_PAYLOAD = _PAYLOAD_AT_ONCE // SUSPECTS
"""What the smallest request counts for: if it ends us, no more than `SUSPECTS` lie between it and the last answer."""
_TYPE = struct.Struct("<Q")
_TYPE_OFFSET = 8
_READ = int(BioOp.READ)
_WITH_PAYLOAD = (_READ, int(BioOp.WRITE))


class ArenaService:
    """Serves `backend` on the channel `end`, payload in `arena`; for one thread."""

    def __init__(self, end: ChannelEnd, arena: memoryview, backend: Backend, log: Log) -> None:
        self._end = end
        self._arena = arena
        self._backend = backend
        self._log = log
        self._raw = bytearray(_RECEIVE_BYTES)
        self._headers = memoryview(self._raw)

    def run(self) -> None:
        """Return at the clean end of the channel, or when it was stopped; `ChannelError` when it breaks."""
        held = 0
        try:
            while got := self._end.read(self._raw, held, may_end=not held):
                filled = held + got
                held = filled % HEADER_BYTES
                end = filled - held
                self._serve(end)
                if held:
                    self._headers[:held] = self._headers[end:filled]
            if held:
                raise ChannelError(errno.EPROTO, "the channel ended inside a request")
        except ChannelError:
            # A socket may be cut in the middle of a header then; nobody waits for what came of it.
            if not self._end.stopping:
                raise

    def stop(self) -> None:
        """From another thread: let `run` answer what has been received, and return; see `ChannelEnd.stop`."""
        self._end.stop()

    def close(self) -> None:
        """Close the channel."""
        self._end.close()

    def _serve(self, end: int) -> None:
        """Work off the headers before byte `end`, each of which becomes its own answer."""
        headers, arena, read_into = self._headers, self._arena, self._backend.read_into
        arena_bytes = len(arena)
        at = sent = payload = 0
        for seq, op, flags, sector, length in HEADER.iter_unpack(headers[:end]):
            place = flags >> PLACE_SHIFT
            stop = place + length
            try:
                if stop > arena_bytes and op in _WITH_PAYLOAD:
                    raise SnapdError(errno.EINVAL, f"bytes {place} to {stop} of an arena of {arena_bytes}")
                if op == _READ:
                    read_into(arena[place:stop], sector * SECTOR_BYTES)
                else:
                    request = Request(seq, op, flags & FLAGS_MASK, sector, length)
                    self._backend.change(request, (arena[place:stop],))
                    _TYPE.pack_into(headers, at + _TYPE_OFFSET, Answer.SUCCESS)
            except SnapdError as error:
                self._log.line(describe(Request(seq, op, flags & FLAGS_MASK, sector, length), error))
                _TYPE.pack_into(headers, at + _TYPE_OFFSET, answer_to(error))
            at += HEADER_BYTES
            payload += length if length > _LEAST_PAYLOAD else _LEAST_PAYLOAD
            if payload >= _PAYLOAD_AT_ONCE:
                self._end.send(headers[sent:at])
                sent, payload = at, 0
        if at > sent:
            self._end.send(headers[sent:at])

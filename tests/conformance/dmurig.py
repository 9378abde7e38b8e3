"""Bios that record their completion, and a target with its clock in hand."""

import errno

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.block.clock import ManualClock
from snapd.dmuser.message import Flag
from snapd.dmuser.target import Channel, Message, Target

OK = 0
EIO = errno.EIO
PREFLUSH = int(Flag.PREFLUSH)


class Submitted:
    """A bio and every completion it got."""

    def __init__(self, op: BioOp = BioOp.READ, sector: int = 0, length: int = SECTOR_BYTES, flags: int = 0) -> None:
        self.results: list[int] = []
        self.memory = bytearray(length if op <= BioOp.WRITE else 0)
        self.bio = Bio(op, sector, length, memoryview(self.memory), self.results.append, flags)

    @property
    def result(self) -> int | None:
        """The one completion; None when there is none yet. A second one is an error (DMU-41)."""
        assert len(self.results) <= 1, f"completed {len(self.results)} times"
        return self.results[0] if self.results else None


class Rig:
    """A target, its clock, and shorthands for what a submitter and a daemon do."""

    def __init__(
        self, *, attach_timeout_ms: int = 4000, restart_grace_ms: int = 0, request_timeout_ms: int = 0
    ) -> None:
        self.clock = ManualClock()
        self.target = Target(
            self.clock,
            attach_timeout_ms=attach_timeout_ms,
            restart_grace_ms=restart_grace_ms,
            request_timeout_ms=request_timeout_ms,
        )

    def submit(self, op: BioOp = BioOp.READ, **fields: int) -> Submitted:
        submitted = Submitted(op, **fields)
        self.target.submit(submitted.bio)
        assert submitted.result is None
        return submitted

    def advance(self, ms: int) -> None:
        """Let time pass; the timers run as the caller's loop would run them."""
        self.clock.advance(ms)
        self.target.expire()


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

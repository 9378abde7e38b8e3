"""The dm-user target: the kernel's part as a pure state machine, without sockets, threads or a clock of its own.

A bio becomes a message. A message is in exactly one place at any instant: queued, being read, awaiting its answer,
being answered, or finished (DMU-4); it finishes exactly once (DMU-41). Completions are collected while the state
changes and called when it has (DMU-117, DMU-140), so a completion may submit again.

What happens to a message while no daemon is attached (DMU-91 to DMU-111, DMU-148):

| daemon | queued, or new | read but not answered |
| --- | --- | --- |
| never attached | waits `attach_timeout_ms` from its submission, then EIO | - |
| attached | waits without limit | `stuck_channel` after `request_timeout_ms` |
| gone, within `restart_grace_ms` | waits for the rest of the grace, then EIO | replayed with the same number, or EIO |
| gone, after the grace | EIO at the next `expire` | - |
| given up, destroyed | EIO at once; no new ones after `destroy` | may be answered until its channel closes |

"Gone" is only who has read a message: a probe that opens and closes changes nothing (DMU-119). The caller drives
the timers: it calls `expire` at `next_deadline_ms`.
"""

import errno
import heapq
from collections import deque
from operator import attrgetter

from snapd.block.bio import Bio, BioOp
from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.dmuser.message import ACCEPTED_FLAGS, ACCEPTED_OPS, Answer, Request

QUEUE_MESSAGES = 128
QUEUE_PAYLOAD_BYTES = 8 << 20
ATTACH_TIMEOUT_MS = 4000
MAX_REPLAYS = 4
"""So often is one message given to another daemon; a message that ends every daemon must end itself."""
REPLAYED_OPS = frozenset({BioOp.READ, BioOp.WRITE, BioOp.FLUSH, BioOp.DISCARD, BioOp.WRITE_ZEROES})
"""Ops that may run twice (DMU-148)."""

_ERRNO_OF_ANSWER = {int(Answer.SUCCESS): 0, int(Answer.UNSUPPORTED): errno.EOPNOTSUPP}
_by_number = attrgetter("seq")


class Message:
    """A bio on its way to the daemon and back.

    `deadline_ms` is when it fails if still queued, None for never; `handed_ms` when the daemon got it.
    """

    __slots__ = ("bio", "deadline_ms", "handed_ms", "replays", "seq")

    def __init__(self, seq: int, bio: Bio, deadline_ms: int | None) -> None:
        self.seq = seq
        self.bio = bio
        self.deadline_ms = deadline_ms
        self.handed_ms = 0
        self.replays = 0

    def header(self) -> bytes:
        """The request as it goes over the wire."""
        bio = self.bio
        return Request(self.seq, bio.op, bio.flags, bio.sector, bio.length).pack()


class Target:
    """One mapped target: a bounded queue, its channels, and the timers between them.

    Times are milliseconds. `restart_grace_ms` 0 is the kernel's behaviour: the last close fails everything;
    `request_timeout_ms` 0 means that a daemon may think for ever (DMU-96).
    """

    def __init__(
        self,
        clock: Clock,
        *,
        attach_timeout_ms: int = ATTACH_TIMEOUT_MS,
        restart_grace_ms: int = 0,
        request_timeout_ms: int = 0,
    ) -> None:
        # Changeable at run time, like the kernel's parameter: what is queued keeps its deadline (DMU-108).
        self.attach_timeout_ms = attach_timeout_ms
        self._clock = clock
        self._grace_ms = restart_grace_ms
        self._request_timeout_ms = request_timeout_ms
        self._queue: deque[Message] = deque()
        self._queued_payload_bytes = 0
        self._next_seq = 0
        self._channels: list[Channel] = []
        self._terminated = False
        self._grace_end_ms = 0
        self.destroyed = False
        self._finished: deque[tuple[Bio, int]] = deque()
        self._settling = False

    @property
    def state(self) -> str:
        """`never`, `attached`, `terminated` or `destroyed` (section 6)."""
        if self.destroyed:
            return "destroyed"
        if self._channels:
            return "attached"
        return "terminated" if self._terminated else "never"

    @property
    def queued(self) -> int:
        """Messages nobody has read yet."""
        return len(self._queue)

    def has_room(self, payload_bytes: int = 0) -> bool:
        """Whether a bio with so much WRITE payload may be submitted now (DMU-143, DMU-183)."""
        if len(self._queue) >= QUEUE_MESSAGES:
            return False
        queued = self._queued_payload_bytes
        return not payload_bytes or not queued or queued + payload_bytes <= QUEUE_PAYLOAD_BYTES

    def submit(self, bio: Bio) -> None:
        """Accept a bio; it is completed later, never inside this call.

        Errors, after which the bio is the caller's again and took no number (DMU-13, DMU-14): EOPNOTSUPP for an
        operation or a flag that is not in the protocol, EINVAL for data of another length than the bio's, EAGAIN
        when there is no room, ENODEV after `destroy`.
        """
        if bio.op not in ACCEPTED_OPS or bio.flags & ~ACCEPTED_FLAGS:
            raise SnapdError(errno.EOPNOTSUPP, f"{bio.op.name} with flags {bio.flags:#x} has no dm-user message")
        if bio.op <= BioOp.WRITE and (0 if bio.data is None else len(bio.data)) != bio.length:
            raise SnapdError(errno.EINVAL, f"{bio.op.name} of {bio.length} bytes with memory of another length")
        if self.destroyed:
            raise SnapdError(errno.ENODEV, "the target is destroyed")
        if not self.has_room(_payload_bytes(bio)):
            raise SnapdError(errno.EAGAIN, f"{len(self._queue)} messages are queued: full")
        self._queue.append(Message(self._next_seq, bio, self._deadline_of_new()))
        self._queued_payload_bytes += _payload_bytes(bio)
        self._next_seq += 1

    def open(self) -> "Channel":
        """A new channel: from now on nothing queued fails for want of a daemon. ENODEV after `destroy` (DMU-34)."""
        if self.destroyed:
            raise SnapdError(errno.ENODEV, "the target is destroyed")
        if self._grace_ms:
            self._terminated = False
        channel = Channel(self)
        self._channels.append(channel)
        return channel

    def expire(self) -> None:
        """Let the timers that are due do their work."""
        now = self._clock.now_ms()
        if self._channels:
            for message in self._queue:
                if message.deadline_ms is not None and message.deadline_ms <= now:
                    # Spent: it must not make a later close overlook the message (DMU-94, DMU-113).
                    message.deadline_ms = None
            return
        if any(message.deadline_ms is not None and message.deadline_ms <= now for message in self._queue):
            waiting, self._queue = self._queue, deque()
            for message in waiting:
                if message.deadline_ms is not None and message.deadline_ms <= now:
                    self._unqueued(message)
                    self._finish(message, errno.EIO)
                else:
                    self._queue.append(message)
        self._settle()

    def next_deadline_ms(self) -> int | None:
        """When `expire` or `stuck_channel` will have something to say; None for never."""
        deadlines = [message.deadline_ms for message in self._queue if message.deadline_ms is not None]
        deadlines += [d for channel in self._channels if (d := self._answer_deadline_ms(channel)) is not None]
        return min(deadlines, default=None)

    def stuck_channel(self) -> "Channel | None":
        """A channel that has kept a request for `request_timeout_ms`: its daemon must be killed (DMU-184)."""
        now = self._clock.now_ms()
        for channel in self._channels:
            deadline = self._answer_deadline_ms(channel)
            if deadline is not None and deadline <= now:
                return channel
        return None

    def give_up(self) -> None:
        """No daemon will come any more: fail what is queued now, and what comes later at its `expire`."""
        self._grace_ms = 0
        self._terminated = True
        self._grace_end_ms = self._clock.now_ms()
        self._fail_queue()
        self._settle()

    def destroy(self) -> None:
        """Remove the target: the queue fails now, open channels may still answer what they read (DMU-106, DMU-107)."""
        self.destroyed = True
        self._fail_queue()
        self._settle()

    def _deadline_of_new(self) -> int | None:
        if self._channels:
            return None
        now = self._clock.now_ms()
        return max(now, self._grace_end_ms) if self._terminated else now + self.attach_timeout_ms

    def _answer_deadline_ms(self, channel: "Channel") -> int | None:
        if not self._request_timeout_ms or (oldest := channel.oldest()) is None:
            return None
        return oldest.handed_ms + self._request_timeout_ms

    def _take(self) -> Message | None:
        if self.destroyed or not self._queue:
            return None
        message = self._queue.popleft()
        self._unqueued(message)
        message.deadline_ms = None
        message.handed_ms = self._clock.now_ms()
        return message

    def _leave(self, channel: "Channel", held: list[Message]) -> None:
        """A channel is gone; `held` is what it had read and not answered."""
        self._channels.remove(channel)
        again = []
        for message in sorted(held, key=_by_number):
            if self._may_replay(message):
                message.replays += 1
                self._queued_payload_bytes += _payload_bytes(message.bio)
                again.append(message)
            else:
                self._finish(message, errno.EIO)
        if again:
            self._queue = deque(heapq.merge(again, self._queue, key=_by_number))
        if not self.destroyed:
            self._terminated = self._terminated or channel.has_read
            if not self._channels:
                self._last_close()
        self._settle()

    def _may_replay(self, message: Message) -> bool:
        return (
            self._grace_ms > 0
            and not self.destroyed
            and message.bio.op in REPLAYED_OPS
            and message.replays < MAX_REPLAYS
        )

    def _last_close(self) -> None:
        now = self._clock.now_ms()
        if self._terminated:
            self._grace_end_ms = now + self._grace_ms
            for message in self._queue:
                # Also those whose first timer is running or spent (DMU-100 to DMU-102).
                message.deadline_ms = self._grace_end_ms
            return
        for message in self._queue:
            if message.deadline_ms is None:
                message.deadline_ms = now + self.attach_timeout_ms

    def _unqueued(self, message: Message) -> None:
        self._queued_payload_bytes -= _payload_bytes(message.bio)

    def _fail_queue(self) -> None:
        while self._queue:
            message = self._queue.popleft()
            self._unqueued(message)
            self._finish(message, errno.EIO)

    def _finish(self, message: Message, number: int) -> None:
        self._finished.append((message.bio, number))

    def _settle(self) -> None:
        if self._settling:
            # A completion called us; the loop below it goes on with what was added.
            return
        self._settling = True
        try:
            while self._finished:
                bio, number = self._finished.popleft()
                bio.on_complete(number)
        finally:
            self._settling = False


class Channel:
    """One open of the target's control node (DMU-2): what its daemon has read and not yet answered.

    Invariant: only messages that were handed over whole can be answered, on this channel alone, once (DMU-39,
    DMU-40, DMU-139).
    """

    def __init__(self, target: Target) -> None:
        self.is_open = True
        self.has_read = False
        self._target = target
        self._reading: deque[Message] = deque()
        self._awaiting: dict[int, Message] = {}
        self._answering: Message | None = None

    @property
    def ended(self) -> bool:
        """The target is destroyed: no further request will come (DMU-57)."""
        return self._target.destroyed

    def oldest(self) -> Message | None:
        """The message that has been with the daemon for the longest time."""
        if self._answering is not None:
            return self._answering
        return next(iter(self._awaiting.values()), None) or (self._reading[0] if self._reading else None)

    def take(self) -> Message | None:
        """The oldest queued message, to be handed over now; None when there is none (DMU-43)."""
        if not self.is_open:
            return None
        message = self._target._take()
        if message is not None:
            self.has_read = True
            self._reading.append(message)
        return message

    def handed_over(self) -> None:
        """The last byte of the message taken first has gone to the daemon (DMU-39)."""
        message = self._reading.popleft()
        self._awaiting[message.seq] = message

    def answer(self, seq: int, code: int) -> Message | None:
        """An answer's header has come; returns the message when READ data follows, which ends with `answered`.

        Errors: EINVAL for a number this channel does not wait for; the channel is poisoned by it, that is closed
        (DMU-69, DMU-71).
        """
        message = self._awaiting.pop(seq, None)
        if message is None:
            self.close()
            raise SnapdError(errno.EINVAL, f"answer to request {seq}, which this channel is not waiting for (DMU-69)")
        if code == Answer.SUCCESS and message.bio.op is BioOp.READ and message.bio.length:
            self._answering = message
            return message
        self._target._finish(message, _ERRNO_OF_ANSWER.get(code, errno.EIO))
        self._target._settle()
        return None

    def answered(self) -> None:
        """All data of the answer begun last is in the bio's memory."""
        message, self._answering = self._answering, None
        assert message is not None
        self._target._finish(message, 0)
        self._target._settle()

    def close(self) -> None:
        """The daemon is gone; what it had not answered is replayed or fails (DMU-75, DMU-76, DMU-148)."""
        if not self.is_open:
            return
        self.is_open = False
        held = [*self._reading, *self._awaiting.values()]
        if self._answering is not None:
            held.append(self._answering)
        self._reading.clear()
        self._awaiting.clear()
        self._answering = None
        self._target._leave(self, held)


def _payload_bytes(bio: Bio) -> int:
    return bio.length if bio.op is BioOp.WRITE else 0

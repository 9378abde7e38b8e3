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
from collections.abc import Sequence
from operator import attrgetter

from snapd.block.bio import Bio, BioOp
from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.dmuser.admission import ANDROID_ADMISSION, Admission
from snapd.dmuser.filter import Filter, Rule
from snapd.dmuser.inflight import Channel, Group, Message
from snapd.dmuser.message import SUSPECTS, Answer, Flag

QUEUE_MESSAGES = 128
QUEUE_PAYLOAD_BYTES = 8 << 20
WAITING_BIOS = 1024
"""So many bios may stand in line for room in the queue."""
ATTACH_TIMEOUT_MS = 4000
MAX_REPLAYS = 512
"""So often is one message given to another daemon; a message that ends every daemon must end itself."""
REPLAYS_AFTER_ANSWERS = 128
"""So much counts a replay after a daemon that had answered others: one that had not may never have looked at it."""
REPLAYED_OPS = frozenset({BioOp.READ, BioOp.WRITE, BioOp.FLUSH, BioOp.DISCARD, BioOp.WRITE_ZEROES})
"""Ops that may run twice (DMU-148)."""

_WRITE = BioOp.WRITE
_by_number = attrgetter("seq")


class Target:
    """One mapped target: a bounded queue, its channels, and the timers between them.

    Times are milliseconds. `restart_grace_ms` 0 is the kernel's behaviour: the last close fails everything;
    `request_timeout_ms` 0 means that a daemon may think for ever (DMU-96). `unsupported_errno` is what the submitter
    sees of an answer UNSUPPORTED (DMU-66). A `deferred` target calls no completion by itself, its owner does
    with what is in `finished`.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        attach_timeout_ms: int = ATTACH_TIMEOUT_MS,
        restart_grace_ms: int = 0,
        request_timeout_ms: int = 0,
        admission: Admission = ANDROID_ADMISSION,
        rules: Sequence[Rule] = (),
        unsupported_errno: int = errno.EOPNOTSUPP,
        deferred: bool = False,
    ) -> None:
        # Changeable at run time, like the kernel's parameter: what is queued keeps its deadline (DMU-108).
        self.attach_timeout_ms = attach_timeout_ms
        self.admission = admission
        self.deferred = deferred
        self.destroyed = False
        self._clock = clock
        self._grace_ms = restart_grace_ms
        self._request_timeout_ms = request_timeout_ms
        self._op_bits = admission.op_bits
        self._other_flags = admission.other_flags
        self._filter = Filter(rules) if rules else None
        self._unsupported_errno = unsupported_errno
        self._queue: deque[Message] = deque()
        self._queued_payload_bytes = 0
        self._has_timers = False
        self._waiting: deque[Bio] = deque()
        self._next_seq = 0
        self._channels: list[Channel] = []
        self._groups: dict[str, Group] = {}
        self._terminated = False
        self._grace_end_ms = 0
        self.finished: deque[tuple[Bio, int]] = deque()
        """Completions collected and not called yet."""
        self._settling = False

    @property
    def state(self) -> str:
        """`never`, `attached`, `terminated` or `destroyed` (DMU-86 to DMU-90)."""
        if self.destroyed:
            return "destroyed"
        if self._channels:
            return "attached"
        return "terminated" if self._terminated else "never"

    @property
    def queued(self) -> int:
        """Messages nobody has read yet."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Messages that daemons have begun to read and not answered."""
        groups = {channel.group for channel in self._channels}
        return sum(len(group.awaiting) for group in groups) + sum(channel.half_done for channel in self._channels)

    @property
    def channels(self) -> int:
        """How many are open."""
        return len(self._channels)

    def has_room(self, payload_bytes: int = 0) -> bool:
        """Whether a bio with so much WRITE payload may be submitted now (DMU-143, DMU-183)."""
        if len(self._queue) >= QUEUE_MESSAGES or self._waiting:
            return False
        queued = self._queued_payload_bytes
        return not payload_bytes or not queued or queued + payload_bytes <= QUEUE_PAYLOAD_BYTES

    def has_room_for(self, bio: Bio) -> bool:
        """Whether this bio may be submitted now."""
        return self.has_room(bio.length if bio.op == _WRITE else 0)

    def submit(self, bio: Bio) -> None:
        """Accept a bio; it is completed later, never inside this call unless a rule's handler does.

        Errors, after which the bio is the caller's again and took no number (DMU-13, DMU-14): EOPNOTSUPP for an
        operation or a flag that is not taken, EINVAL for data of another length than the bio's, EAGAIN when there is
        no room, ENODEV after `destroy`, and what a rule refuses with.
        """
        if not self._is_for_daemon(bio):
            return
        if not self.has_room_for(bio):
            raise SnapdError(errno.EAGAIN, f"{len(self._queue)} messages are queued: full")
        self._enqueue(bio)

    def submit_all(self, bios: deque[Bio]) -> None:
        """Accept from the front of `bios` as many as there is room for; one that is refused ends with its error.

        What `submit` does, for a caller that has many of them and little time.
        """
        append, op_bits, other_flags = self._queue.append, self._op_bits, self._other_flags
        is_plain = self._filter is None and not self.destroyed
        deadline_ms = None if self._channels else self._deadline_of_new()
        while bios and self.has_room_for(bios[0]):
            bio = bios.popleft()
            if not is_plain or bio.place < 0 or bio.flags & other_flags or not op_bits >> bio.op & 1:
                try:
                    if not self._is_for_daemon(bio):
                        continue
                except SnapdError as error:
                    self.finished.append((bio, error.errno or errno.EIO))
                    continue
            append(Message(self._next_seq, bio, deadline_ms))
            self._next_seq += 1
            if bio.op == _WRITE:
                self._queued_payload_bytes += bio.length
            self._has_timers = self._has_timers or deadline_ms is not None
        self.settle()

    def submit_or_wait(self, bio: Bio) -> None:
        """Like `submit`, but when there is no room the bio stands in line, served in order of arrival (DMU-143).

        EAGAIN for a bio with NOWAIT that would have to wait, and when `WAITING_BIOS` wait already.
        """
        if not self._is_for_daemon(bio):
            return
        if self.has_room_for(bio):
            self._enqueue(bio)
        elif bio.flags & Flag.NOWAIT:
            raise SnapdError(errno.EAGAIN, "the queue is full, and the bio may not wait")
        elif len(self._waiting) >= WAITING_BIOS:
            raise SnapdError(errno.EAGAIN, f"{len(self._waiting)} bios wait for the queue: full")
        else:
            self._waiting.append(bio)

    def open(self, group: str = "") -> Channel:
        """A new channel: from now on nothing queued fails for want of a daemon. ENXIO after `destroy` (DMU-34).

        Channels that name the same `group` may answer for each other (DMU-147).
        """
        if self.destroyed:
            raise SnapdError(errno.ENXIO, "the target is destroyed")
        if self._grace_ms:
            self._terminated = False
        joined = self._groups.setdefault(group, Group(group)) if group else Group(group)
        joined.channels += 1
        channel = Channel(self, joined)
        self._channels.append(channel)
        return channel

    def expire(self) -> None:
        """Let the timers that are due do their work."""
        if self._has_timers:
            self._run_timers(self._clock.now_ms())
        self.settle()

    def next_deadline_ms(self) -> int | None:
        """When `expire` or `stuck_channel` will have something to say; None for never."""
        deadlines: list[int] = []
        if self._request_timeout_ms:
            deadlines += [d for channel in self._channels if (d := self._answer_deadline_ms(channel)) is not None]
        if self._has_timers:
            deadlines += [message.deadline_ms for message in self._queue if message.deadline_ms is not None]
        return min(deadlines, default=None)

    def stuck_channel(self) -> Channel | None:
        """A channel that has kept a request for `request_timeout_ms`: its daemon must be killed (DMU-184)."""
        if not self._request_timeout_ms:
            return None
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
        self.settle()

    def destroy(self) -> None:
        """Remove the target: the queue fails now, open channels may still answer what they read (DMU-106, DMU-107)."""
        self.destroyed = True
        self._fail_queue()
        self.settle()

    def settle(self) -> None:
        """Call the completions that have been collected; does nothing for a `deferred` target."""
        if self._settling or self.deferred:
            # A completion called us; the loop below it goes on with what was added.
            return
        self._settling = True
        finished = self.finished
        try:
            while finished:
                bio, number = finished.popleft()
                bio.on_complete(bio, number)
        finally:
            self._settling = False

    # What follows is for the target's channels.

    def hand_out(self, limit: int) -> list[Message]:
        """Up to `limit` of the oldest queued messages, whose timers end here; none after `destroy` (DMU-57)."""
        if self.destroyed or not self._queue:
            return []
        now = self._clock.now_ms()
        queue = self._queue
        if limit >= len(queue):
            messages = list(queue)
            queue.clear()
            self._queued_payload_bytes = 0
            self._has_timers = False
        else:
            messages = [queue.popleft() for _ in range(limit)]
            for message in messages:
                self._unqueued(message)
        for message in messages:
            message.deadline_ms = None
            message.handed_ms = now
        if self._waiting:
            self._admit_waiting()
        return messages

    def queue_again(self, messages: list[Message]) -> None:
        """Put messages back to where their numbers belong; `messages` are in the order of theirs."""
        if messages:
            self._queue = deque(heapq.merge(messages, self._queue, key=_by_number))
            self._queued_payload_bytes += sum(m.bio.length for m in messages if m.bio.op == _WRITE)

    def errno_of(self, code: int) -> int:
        """What the submitter sees of an answer's code (DMU-64 to DMU-67)."""
        if code == Answer.SUCCESS:
            return 0
        return self._unsupported_errno if code == Answer.UNSUPPORTED else errno.EIO

    def leave(self, channel: Channel, held: list[Message]) -> None:
        """A channel is gone; `held` is what it had read and nobody can answer any more."""
        self._channels.remove(channel)
        if not channel.group.channels:
            self._groups.pop(channel.group.name, None)
        again = []
        for place, message in enumerate(sorted(held, key=_by_number)):
            if self._may_replay(message, channel.group):
                if place < SUSPECTS:
                    message.replays += REPLAYS_AFTER_ANSWERS if channel.has_answered else 1
                again.append(message)
            else:
                self.finished.append((message.bio, errno.EIO))
        self.queue_again(again)
        if not self.destroyed:
            self._terminated = self._terminated or channel.has_read
            if not self._channels:
                self._last_close()
        self.settle()

    def _is_for_daemon(self, bio: Bio) -> bool:
        """Whether the bio becomes a message; raises when it is refused, False when a rule has taken it over."""
        if not self._op_bits >> bio.op & 1 or bio.flags & self._other_flags:
            self.admission.admit(bio)
        if bio.place < 0 and bio.op <= _WRITE and (0 if bio.data is None else len(bio.data)) != bio.length:
            raise SnapdError(errno.EINVAL, f"{bio.op.name} of {bio.length} bytes with memory of another length")
        if self.destroyed:
            raise SnapdError(errno.ENODEV, "the target is destroyed")
        return self._filter is None or not self._filter.divert(bio)

    def _enqueue(self, bio: Bio) -> None:
        deadline_ms = None
        if not self._channels:
            deadline_ms = self._deadline_of_new()
            self._has_timers = True
        self._queue.append(Message(self._next_seq, bio, deadline_ms))
        self._next_seq += 1
        if bio.op == _WRITE:
            self._queued_payload_bytes += bio.length

    def _admit_waiting(self) -> None:
        """Queue as many of the bios in line as there is room for, the first one first."""
        waiting, self._waiting = self._waiting, deque()
        while waiting and self.has_room_for(waiting[0]):
            self._enqueue(waiting.popleft())
        self._waiting = waiting

    def _deadline_of_new(self) -> int:
        now = self._clock.now_ms()
        return max(now, self._grace_end_ms) if self._terminated else now + self.attach_timeout_ms

    def _answer_deadline_ms(self, channel: Channel) -> int | None:
        handed_ms = channel.oldest_handed_ms()
        return None if handed_ms is None else handed_ms + self._request_timeout_ms

    def _run_timers(self, now_ms: int) -> None:
        unexpired: deque[Message] = deque()
        for message in self._queue:
            if message.deadline_ms is None or message.deadline_ms > now_ms:
                unexpired.append(message)
            elif self._channels:
                # Spent: it must not make a later close overlook the message (DMU-94, DMU-113).
                message.deadline_ms = None
                unexpired.append(message)
            else:
                self._unqueued(message)
                self.finished.append((message.bio, errno.EIO))
        self._queue = unexpired
        self._admit_waiting()
        self._has_timers = any(message.deadline_ms is not None for message in self._queue)

    def _may_replay(self, message: Message, group: Group) -> bool:
        if self.destroyed or message.replays >= MAX_REPLAYS:
            return False
        # While the group lives, what a member leaves was never read whole, so it has not run even once.
        return bool(group.channels) or (self._grace_ms > 0 and message.bio.op in REPLAYED_OPS)

    def _last_close(self) -> None:
        now = self._clock.now_ms()
        if self._terminated:
            self._grace_end_ms = now + self._grace_ms
            for message in self._queue:
                # Also those whose first timer is running or spent (DMU-100 to DMU-102).
                message.deadline_ms = self._grace_end_ms
        else:
            for message in self._queue:
                if message.deadline_ms is None:
                    message.deadline_ms = now + self.attach_timeout_ms
        self._has_timers = bool(self._queue)

    def _unqueued(self, message: Message) -> None:
        if message.bio.op == _WRITE:
            self._queued_payload_bytes -= message.bio.length

    def _fail_queue(self) -> None:
        """The queue, and the line before it, leave the target at once; completions see neither (DMU-115)."""
        self.finished.extend((message.bio, errno.EIO) for message in self._queue)
        self.finished.extend((bio, errno.EIO) for bio in self._waiting)
        self._queue.clear()
        self._waiting.clear()
        self._queued_payload_bytes = 0

"""In flight: what daemons have begun to read and not yet answered, by channel and by group.

Invariant: only messages that were handed over whole can be answered, once, on the channel that read them or on another
of its group (DMU-39, DMU-40, DMU-139, DMU-147). A channel that offers no group is one of its own, which is the
kernel's rule.
"""

import errno
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from snapd.block.bio import Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.message import Answer, Request

if TYPE_CHECKING:
    from snapd.dmuser.target import Target


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


class Group:
    """Channels that answer for each other: one set of messages awaiting their answers (DMU-147)."""

    __slots__ = ("awaiting", "channels", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.awaiting: dict[int, Message] = {}
        self.channels = 0


class Channel:
    """One open of the target's control node (DMU-2); made by `Target.open`."""

    def __init__(self, target: "Target", group: Group) -> None:
        self.is_open = True
        self.has_read = False
        self.has_answered = False
        self.group = group
        self._target = target
        self._reading: deque[Message] = deque()
        self._awaiting = group.awaiting
        self._answering: Message | None = None

    @property
    def ended(self) -> bool:
        """The target is destroyed: no further request will come (DMU-57)."""
        return self._target.destroyed

    @property
    def half_done(self) -> int:
        """Messages that are being read or answered here."""
        return len(self._reading) + (self._answering is not None)

    def oldest_handed_ms(self) -> int | None:
        """When the daemon got what it has kept for the longest time; None when it keeps nothing."""
        if not self._reading and self._answering is None:
            return next(iter(self._awaiting.values())).handed_ms if self._awaiting else None
        begun = [*islice(self._awaiting.values(), 1)]
        if self._reading:
            begun.append(self._reading[0])
        if self._answering is not None:
            begun.append(self._answering)
        return min((message.handed_ms for message in begun), default=None)

    def awaits(self, seq: int) -> bool:
        """Whether an answer to this number would be a valid one (DMU-61)."""
        return seq in self._awaiting

    def take(self) -> Message | None:
        """The oldest queued message, to be handed over now; None when there is none (DMU-43)."""
        messages = self.take_all(1)
        return messages[0] if messages else None

    def take_all(self, limit: int) -> list[Message]:
        """Up to `limit` of the oldest queued messages, to be handed over now."""
        messages = self._target.hand_out(limit) if self.is_open else []
        self._reading.extend(messages)
        return messages

    def take_back(self) -> None:
        """Nothing of what was taken has gone to the daemon, not one byte: it is queued again."""
        messages = [*self._reading]
        self._reading.clear()
        self._target.queue_again(messages)

    def handed_over(self, count: int = 1) -> None:
        """The last byte of the `count` messages taken first has gone to the daemon (DMU-39)."""
        reading, awaiting = self._reading, self._awaiting
        # Not before: what a socket refuses to take, nobody has read (DMU-119).
        self.has_read = self.has_read or count > 0
        for _ in range(count):
            message = reading.popleft()
            awaiting[message.seq] = message

    def answer(self, seq: int, code: int) -> Message | None:
        """An answer's header has come; returns the message when READ data follows, which ends with `answered`.

        Errors: EINVAL for a number this channel does not wait for; the channel is poisoned by it, that is closed
        (DMU-69, DMU-71).
        """
        message = self._awaiting.pop(seq, None)
        if message is None:
            raise self._poison(seq)
        self.has_answered = True
        if code == Answer.SUCCESS and message.bio.op == BioOp.READ and message.bio.length:
            self._answering = message
            return message
        self._target.finished.append((message.bio, self._target.errno_of(code)))
        self._target.settle()
        return None

    def answer_all(self, answers: Iterable[tuple[int, int]]) -> None:
        """Answers (seq, code) to requests whose payload does not travel with them, completed once all are taken in.

        Errors: as `answer`; what came before the bad one is completed.
        """
        target = self._target
        pop, finish = self._awaiting.pop, target.finished.append
        try:
            for seq, code in answers:
                message = pop(seq, None)
                if message is None:
                    raise self._poison(seq)
                self.has_answered = True
                finish((message.bio, target.errno_of(code) if code else 0))
        finally:
            target.settle()

    def answered(self) -> None:
        """All data of the answer begun last is in the bio's memory."""
        message, self._answering = self._answering, None
        assert message is not None
        self._target.finished.append((message.bio, 0))
        self._target.settle()

    def close(self) -> None:
        """The daemon is gone; what it had not answered is replayed, left to its group, or fails (DMU-75, DMU-76)."""
        if not self.is_open:
            return
        self.is_open = False
        self.group.channels -= 1
        held = [*self._reading]
        self._reading.clear()
        answering, self._answering = self._answering, None
        if answering is not None and self.group.channels:
            # Some member has read it, so any other may still answer it.
            self._awaiting[answering.seq] = answering
        elif answering is not None:
            held.append(answering)
        if not self.group.channels:
            held += self._awaiting.values()
            self._awaiting.clear()
        self._target.leave(self, held)

    def _poison(self, seq: int) -> SnapdError:
        self.close()
        return SnapdError(errno.EINVAL, f"answer to request {seq}, which this channel is not waiting for (DMU-69)")

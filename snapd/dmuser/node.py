"""The control node in memory: a target that threads share, and files opened on it, read and written like the kernel's.

The reference for the socket form (DMU-157): here every read and write has the kernel's own borders (DMU-50, DMU-62,
DMU-69).

One lock guards the target and the cursors of its files, and is held for neither copies nor completions: who copies has
the file's reader or writer token, and completions are collected under the lock and called after it (DMU-117, DMU-140).
Nobody sleeps with a token, and who has slept looks at everything again (DMU-112). A close waits for the tokens, so
memory goes back to its submitter only when nobody copies from or to it any more.
"""

import contextlib
import errno
import select
import threading
from collections.abc import Callable, Iterator, Sequence

from snapd.block.bio import Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, WritableBuffer
from snapd.dmuser.inflight import Channel, Message
from snapd.dmuser.message import HEADER, HEADER_BYTES
from snapd.dmuser.target import Target

Trace = Callable[[str], None]
"""Called at the named points `sleep` (under the lock, about to give it up), `copy out` and `copy in` (without it)."""


def _untraced(_point: str) -> None:
    pass


class Node:
    """A `deferred` target under a lock. Submitters, daemons and timers may each be threads of their own."""

    def __init__(self, target: Target, trace: Trace = _untraced) -> None:
        assert target.deferred
        self.trace = trace
        self.lock = threading.Condition(threading.Lock())
        self._target = target

    @contextlib.contextmanager
    def change(self) -> Iterator[Target]:
        """The target, under the lock; afterwards who sleeps looks again, and what has finished is completed."""
        finished: list[tuple[Bio, int]] = []
        try:
            with self.lock:
                try:
                    yield self._target
                finally:
                    finished += self._target.finished
                    self._target.finished.clear()
                    self.lock.notify_all()
        finally:
            for bio, number in finished:
                bio.on_complete(bio, number)

    def submit(self, bio: Bio) -> None:
        """Accept a bio, or have it stand in line; errors as `Target.submit_or_wait`."""
        with self.change() as target:
            target.submit_or_wait(bio)

    def expire(self) -> None:
        """Let the timers that are due do their work."""
        with self.change() as target:
            target.expire()

    def destroy(self) -> None:
        """Remove the target: sleeping reads end with ENOTBLK (DMU-33)."""
        with self.change() as target:
            target.destroy()

    def open(self, *, group: str = "", nonblocking: bool = False) -> "NodeFile":
        """A file on the node, which is a channel; ENXIO when the target is destroyed (DMU-141)."""
        with self.change() as target:
            return NodeFile(self, target, target.open(group), nonblocking)


class NodeFile:
    """One open of the node. Reads exclude reads, writes exclude writes (DMU-134); EBADF after `close`."""

    def __init__(self, node: Node, target: Target, channel: Channel, nonblocking: bool) -> None:
        self._node = node
        self._target = target
        self._channel = channel
        self._nonblocking = nonblocking
        self._is_closed = False
        self._is_poisoned = False
        # Each is somebody's turn to copy.
        self._reader_token = False
        self._writer_token = False
        self._interrupts = 0
        self._unread: list[memoryview] = []
        self._scratch = bytearray()
        self._answering: Message | None = None
        self._unwritten = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes of one message, either of its header or of its data (DMU-50).

        Waits only when there is no message to continue and none queued (DMU-53): then EAGAIN on a non-blocking file.
        Errors: ENOTBLK where a message would begin on a destroyed target (DMU-57), EINVAL when poisoned (DMU-71).
        """
        buffer = bytearray(size)
        return bytes(buffer[: self.readv([buffer])])

    def readv(self, buffers: Sequence[WritableBuffer]) -> int:
        """As `read`, into several buffers in turn; returns the bytes."""
        space = sum(len(buffer) for buffer in buffers)
        with self._node.lock:
            self._wait_to_read(begin=bool(space))
            if not space:
                return 0
            piece = self._unread[0][:space]
            self._reader_token = True
        self._node.trace("copy out")
        at = 0
        for buffer in buffers:
            part = piece[at : at + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            at += len(part)
        with self._node.change():
            self._reader_token = False
            self._unread[0] = self._unread[0][at:]
            if not self._unread[0]:
                del self._unread[0]
            if not self._unread:
                self._channel.handed_over()
        return at

    def write(self, data: Buffer) -> int:
        """Part of an answer; returns the bytes taken, which end where an answer ends (DMU-62).

        Never waits for anything but another write (DMU-74). EINVAL for good once a number was invalid: the write that
        completes such a header still succeeds (DMU-69). No bytes at all change nothing (DMU-70).
        """
        return self.writev([data])

    def writev(self, buffers: Sequence[Buffer]) -> int:
        """As `write`, from several buffers in turn."""
        data = memoryview(b"".join(buffers))
        with self._node.lock:
            while self._writer_token and not self._is_closed:
                self._node.lock.wait()
            self._check_open()
            if self._is_poisoned:
                raise SnapdError(errno.EINVAL, "an answer with an invalid number came before (DMU-69)")
            self._writer_token = True
        if self._answering is not None:
            return self._take_data(data)
        taken = min(HEADER_BYTES - len(self._scratch), len(data))
        self._scratch += data[:taken]
        with self._node.change():
            if len(self._scratch) == HEADER_BYTES:
                self._begin_answer()
            # Without data to follow it is given back before the completions, which may write here.
            has_token = self._writer_token = self._answering is not None
        return taken + self._take_data(data[taken:]) if has_token else taken

    def poll(self) -> int:
        """POLLIN when a read would not wait, POLLOUT unless poisoned (DMU-128)."""
        with self._node.lock:
            self._check_open()
            ready = 0 if self._is_poisoned else select.POLLOUT
            return ready | (select.POLLIN if self._may_read() else 0)

    def close(self) -> None:
        """Fail or give back what was not answered, before it returns (DMU-76)."""
        with self._node.change():
            if self._is_closed:
                return
            self._is_closed = True
            self._node.lock.notify_all()
            while self._reader_token or self._writer_token:
                self._node.lock.wait()
            self._channel.close()

    def interrupt(self) -> None:
        """What a signal does to a thread that sleeps in a read: the read ends with EINTR and consumes nothing (DMU-55).

        Python's own signals do not reach a thread that waits for a lock, and an exception from a handler may hit the
        wait where the lock has no owner.
        """
        with self._node.lock:
            self._interrupts += 1
            self._node.lock.notify_all()

    def seek(self, _offset: int) -> int:
        """ESPIPE (DMU-126)."""
        raise SnapdError(errno.ESPIPE, "a control node has no positions")

    def splice(self, _count: int) -> int:
        """EOPNOTSUPP, into pipes and out of them (DMU-127)."""
        raise SnapdError(errno.EOPNOTSUPP, "a control node cannot splice")

    def fasync(self) -> None:
        """EOPNOTSUPP (DMU-129)."""
        raise SnapdError(errno.EOPNOTSUPP, "a control node sends no signals")

    def ioctl(self, _request: int) -> int:
        """ENOTTY (DMU-130)."""
        raise SnapdError(errno.ENOTTY, "a control node has no controls")

    def _check_open(self) -> None:
        if self._is_closed:
            raise SnapdError(errno.EBADF, "the file is closed")

    def _may_read(self) -> bool:
        """Whether a read has something to return or to fail with."""
        return bool(self._is_poisoned or self._unread or self._target.destroyed or self._target.queued)

    def _wait_to_read(self, *, begin: bool) -> None:
        """Return, under the lock, when the reader token is free and there is something to read; begin it if asked."""
        interrupts = self._interrupts
        while True:
            self._check_open()
            if not self._reader_token and self._may_read():
                break
            if self._interrupts != interrupts:
                raise SnapdError(errno.EINTR, "interrupted")
            if self._nonblocking:
                raise SnapdError(errno.EAGAIN, "nothing to read now")
            self._node.trace("sleep")
            self._node.lock.wait()
        if self._is_poisoned:
            raise SnapdError(errno.EINVAL, "the channel is poisoned, no message comes (DMU-71)")
        if self._unread:
            return
        if self._target.destroyed:
            raise SnapdError(errno.ENOTBLK, "the target is destroyed (DMU-57)")
        if begin:
            message = self._channel.take()
            assert message is not None
            self._unread = [memoryview(message.header())]
            if message.bio.op == BioOp.WRITE and message.bio.data:
                self._unread.append(message.bio.data)

    def _begin_answer(self) -> None:
        """A header is complete: under the lock, but who copies from a message that is given up goes first."""
        seq, code, *_ = HEADER.unpack(self._scratch)
        self._scratch.clear()
        if not self._channel.awaits(seq):
            self._is_poisoned = True
            while self._reader_token:
                self._node.lock.wait()
            self._unread.clear()
        with contextlib.suppress(SnapdError):
            self._answering = self._channel.answer(seq, code)
        if self._answering is not None:
            assert self._answering.bio.data is not None
            self._unwritten = self._answering.bio.data

    def _take_data(self, data: memoryview) -> int:
        """READ data, as much as is missing; with the writer token, which it gives back."""
        self._node.trace("copy in")
        taken = min(len(self._unwritten), len(data))
        self._unwritten[:taken] = data[:taken]
        with self._node.change():
            self._writer_token = False
            self._unwritten = self._unwritten[taken:]
            if not self._unwritten:
                self._answering = None
                self._channel.answered()
        return taken

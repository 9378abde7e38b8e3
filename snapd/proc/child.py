"""A child process of ours: started by exec, watched and killed through its pidfd.

Never forked: a forked interpreter inherits locks of threads it does not have, and hangs once grpc is loaded.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
from collections.abc import Sequence

from snapd.block.errors import SnapdError
from snapd.proc import fence

FIRST_FD = 3
"""Passed descriptors are numbered from here, in the order they were given."""


class Child:
    """A started process. `pidfd` becomes readable when it has exited."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # Safe from reuse: nobody else reaps our children.
        self.pidfd = os.pidfd_open(pid)

    @classmethod
    def spawn(cls, module: str, arguments: Sequence[str], fds: Sequence[int]) -> "Child":
        """Run `python -I -m module arguments` in its own session with `fds` as descriptors 3, 4, ...

        The caller keeps its own copies. Standard input is empty, output and error go where ours go.
        """
        # Out of the way first: a target number may be one of the sources.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 256) for fd in fds]
        try:
            actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
            ]
            actions += [(os.POSIX_SPAWN_DUP2, fd, FIRST_FD + i) for i, fd in enumerate(high)]
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-m", module, *arguments],
                os.environ,
                file_actions=actions,
                # Its own session: what a terminal sends to the parent must not reach a device in use.
                setsid=True,
                setsigmask=(),
            )
        except OSError as error:
            raise SnapdError.from_os(error, f"start {module}") from error
        finally:
            for fd in high:
                os.close(fd)
        return cls(pid)

    @classmethod
    def spawn_fenced(cls, module: str, arguments: Sequence[str], fds: Sequence[int], fence_path: str) -> "Child":
        """Like `spawn`, with the fence at `fence_path` as the last descriptor; its predecessor is gone or going."""
        try:
            fence_fd = os.open(fence_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SnapdError.from_os(error, f"open {fence_path}") from error
        try:
            child = cls.spawn(module, arguments, [*fds, fence_fd])
            fence.record(fence_fd, child.pid)
            return child
        finally:
            # No copy is kept: the lock must end with the child.
            os.close(fence_fd)

    def kill(self) -> None:
        """SIGKILL; harmless when it has exited."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; harmless when it has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_ms: int | None = None) -> int:
        """Wait for the exit, reap it and return the status as a shell would (128 + signal); ETIMEDOUT else."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(timeout_ms):
            raise SnapdError(errno.ETIMEDOUT, f"process {self.pid} has not exited after {timeout_ms} ms")
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.pidfd = -1
        assert result is not None
        return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status

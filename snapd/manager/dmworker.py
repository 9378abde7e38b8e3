"""A worker on a node of the kernel's dm-user: started, found again by another daemon, ended.

It has no control connection. That it has opened its node is seen in its table of descriptors, and a daemon that takes
over gets the locked stores from that table too: opening their paths again would find them locked.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Mapping

from snapd.block.errors import SnapdError
from snapd.manager.process import Watch, evict
from snapd.proc import fence
from snapd.proc.child import FIRST_FD, Child

_ATTACH_TIMEOUT_S = 10.0
_POLL_S = 0.02
_PAUSE_S = 0.2
_END_TIMEOUT_S = 5.0
_PIDFD_GETFD = 438

_ORDER = ("base", "cow", "extent_map", "shared_map", "undo_directory")


class DmWorker:
    """One worker process on one node."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @classmethod
    async def start(
        cls, node_path: str, stores: Mapping[str, int], fence_path: str, *, read_only: bool, is_new: bool
    ) -> "DmWorker":
        """Start a worker behind its fence; returns when it has opened the node.

        The node of a target that `is_new` may take a while to appear: only a worker may look for it, so one is sent
        again and again. ETIMEDOUT or EIO when none has opened it.
        """
        await asyncio.to_thread(evict, fence_path)
        names = [name for name in _ORDER if name in stores]
        arguments = ["--inherited", ",".join([*names, "fence"]), "--channel", node_path]
        if read_only and "cow" not in stores:
            arguments.append("--read-only")
        deadline = time.monotonic() + _ATTACH_TIMEOUT_S
        while True:
            child = Child.spawn_fenced("snapd.worker", arguments, [stores[name] for name in names], fence_path)
            worker = cls(Watch(child.pid, child.pidfd, child=True))
            try:
                if await asyncio.wait_for(worker._attached(node_path), deadline - time.monotonic()):
                    return worker
            except TimeoutError as error:
                await worker.kill()
                raise SnapdError(errno.ETIMEDOUT, f"the worker does not open {node_path}") from error
            except asyncio.CancelledError:
                await worker.kill()
                raise
            if not is_new or time.monotonic() > deadline - _PAUSE_S:
                raise SnapdError(errno.EIO, f"the worker ended before it had opened {node_path}")
            await asyncio.sleep(_PAUSE_S)

    @classmethod
    def find(cls, fence_path: str, node_path: str) -> "DmWorker | None":
        """The worker that a former daemon started, if it lives and has the node open."""
        try:
            fence_fd = os.open(fence_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = fence.holder(fence_fd)
        finally:
            os.close(fence_fd)
        if found is None:
            return None
        pid, pidfd = found
        if not _has_open(pid, node_path):
            os.close(pidfd)
            return None
        return cls(Watch(pid, pidfd, child=False))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._watch.pid

    def take_stores(self, names: list[str]) -> dict[str, int]:
        """Our own copies of the stores it was given, which carry the locks."""
        libc = ctypes.CDLL(None, use_errno=True)
        taken: dict[str, int] = {}
        pidfd = os.pidfd_open(self.pid)
        try:
            for number, name in enumerate([name for name in _ORDER if name in names], FIRST_FD):
                fd = libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
                if fd < 0:
                    for opened in taken.values():
                        os.close(opened)
                    raise SnapdError.from_os(
                        OSError(ctypes.get_errno(), ""), f"take over {name} of the worker {self.pid}"
                    )
                taken[name] = fd
        finally:
            os.close(pidfd)
        return taken

    async def exited(self) -> None:
        """Return when it has exited."""
        await self._watch.exited()

    async def drain(self) -> None:
        """Have it finish what it works on and end; killed when it takes too long."""
        self._watch.kill(signal.SIGTERM)
        await self.ended()

    async def ended(self) -> None:
        """Wait for it to end by itself, as it does when its target is gone (ENOTBLK); killed when it takes too long."""
        try:
            await asyncio.wait_for(self._watch.exited(), _END_TIMEOUT_S)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone, ETIMEDOUT when the kernel does not let go of it (DMU-180)."""
        self._watch.kill()
        try:
            await asyncio.wait_for(self._watch.exited(), _END_TIMEOUT_S)
        except TimeoutError as error:
            raise SnapdError(errno.ETIMEDOUT, f"the worker {self.pid} does not exit") from error

    def detach(self) -> None:
        """Leave it running."""
        self._watch.detach()

    async def _attached(self, node_path: str) -> bool:
        """Return when it has the node open, or has ended without."""
        ended = asyncio.ensure_future(self._watch.exited())
        try:
            while not ended.done():
                if _has_open(self.pid, node_path):
                    return True
                await asyncio.wait([ended], timeout=_POLL_S)
            return False
        finally:
            ended.cancel()


def _has_open(pid: int, path: str) -> bool:
    """Whether a process has the path open; asks the process table, never the file."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):
            if os.readlink(f"{directory}/{name}") == path:
                return True
    return False

"""Fencing: a successor acts only after its predecessor is gone.

Otherwise the late write of a process believed dead lands on a newer, acknowledged one (DMU-185). The fence is a lock
file. Whoever starts a process opens the file anew, hands it over and keeps no copy, so that the lock lives exactly
as long as the holder; whoever is started calls `hold` before it touches anything. A holder that does not
leave by itself is evicted by its recorded identity, which is checked against pid reuse. Whoever starts a process
records it too, for the one that was stopped before it came to `hold`.
"""

import contextlib
import fcntl
import json
import os
import select
import signal

_IDENTITY_BYTES = 128


def path_of(fd: int) -> str:
    """A path by which a lock file that is only held as a descriptor can be opened anew."""
    return f"/proc/self/fd/{fd}"


def record(fd: int, pid: int) -> None:
    """Name a process that was just started with this fence; its predecessor has been evicted or seen to exit."""
    identity = json.dumps({"pid": pid, "start_time": _start_time(pid)}).encode()
    os.pwrite(fd, identity.ljust(_IDENTITY_BYTES), 0)


def hold(fd: int) -> None:
    """Wait until the predecessor is gone, then hold the fence until this process ends."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    record(fd, os.getpid())


def holder(fd: int) -> tuple[int, int] | None:
    """Pid and a new pidfd of the process that the fence names; None when nobody ever held it, or the holder is gone."""
    try:
        identity = json.loads(os.pread(fd, _IDENTITY_BYTES, 0))
        pid, start_time = int(identity["pid"]), identity["start_time"]
        pidfd = os.pidfd_open(pid)
    except (ValueError, KeyError, TypeError, OSError):
        return None
    # The pidfd pins the process, so its start time cannot change after this check.
    if _start_time(pid) != start_time:
        os.close(pidfd)
        return None
    return pid, pidfd


def evict(fd: int, timeout_ms: int = 0) -> bool:
    """SIGKILL the holder, if there is one, and wait for its exit; False when it still lives after `timeout_ms`."""
    found = holder(fd)
    if found is None:
        return True
    _, pidfd = found
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_ms))
    finally:
        os.close(pidfd)


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which the process started; with the pid it names one process (proc(5), field 22)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return -1

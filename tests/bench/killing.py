"""The death of a worker as its device's clients see it."""

import os
import signal
import threading
import time
from typing import NamedTuple

from benchhost import BenchHost
from devicedata import Region

from snapd.block.errors import SnapdError

_IN_FLIGHT_BYTES = 2 << 20
_NEW_BYTES = 4096
_POLL_S = 0.001
_TIMEOUT_S = 30


class Death(NamedTuple):
    """Milliseconds from the kill until the reads in flight had ended, and what a read begun then took."""

    failed: bool
    in_flight_ms: float
    new_ms: float


def kill_worker(host: BenchHost, region: Region) -> Death:
    """SIGKILL the worker of `host` while it owes answers to reads of `region`."""
    pid = host.stats()["worker_pid"]
    # Stopped, so that the reads are in flight for sure when it dies.
    os.kill(pid, signal.SIGSTOP)
    ended: list[tuple[bool, float]] = []
    reader = threading.Thread(target=lambda: ended.append(_read(host, _IN_FLIGHT_BYTES, region)))
    reader.start()
    deadline = time.monotonic() + _TIMEOUT_S
    while not host.stats()["in_flight"]:
        if time.monotonic() > deadline:
            raise RuntimeError("no read reached the worker")
        time.sleep(_POLL_S)
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    reader.join()
    failed, end = ended[0]
    begin = time.perf_counter()
    new_failed, new_end = _read(host, _NEW_BYTES, region)
    if new_failed != failed:
        raise RuntimeError("what was in flight and what came later ended differently")
    return Death(failed, (end - killed) * 1000, (new_end - begin) * 1000)


def _read(host: BenchHost, size_bytes: int, region: Region) -> tuple[bool, float]:
    """Whether the read failed, and when it had ended."""
    try:
        host.read(bytearray(size_bytes), region.offset_bytes)
    except SnapdError:
        return True, time.perf_counter()
    return False, time.perf_counter()

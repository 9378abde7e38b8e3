"""What processes cost: CPU time and private memory, as the kernel counts them."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

_INTERVAL_S = 0.05
_SCHEDULER_CLOCK = 2


def cpu_ns(pid: int) -> int:
    """Nanoseconds that a process has run, threads that have ended included."""
    # What clock_getcpuclockid(3) makes of a process id.
    return time.clock_gettime_ns(~pid << 3 | _SCHEDULER_CLOCK)


def private_bytes(pid: int) -> int:
    """Memory that nobody else has mapped, whether it is written to or not."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))


@contextlib.contextmanager
def most_private(pids: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The most private bytes that each process had meanwhile; complete at the end of the block."""
    most = dict.fromkeys(pids, 0)
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_INTERVAL_S):
            for name, pid in pids.items():
                most[name] = max(most[name], private_bytes(pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield most
    finally:
        over.set()
        sampler.join()

"""A real worker process, started by hand."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator


class WorkerProcess:
    """`python -m snapd.worker` with these arguments."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "snapd.worker", *map(str, arguments)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; the exit status and what was said on standard error."""
        _, said = self._process.communicate(timeout=60)
        return self._process.returncode, said

    def kill(self) -> None:
        """SIGKILL, and nothing if it has ended."""
        self._process.kill()
        self._process.communicate(timeout=60)


@contextlib.contextmanager
def worker_process(*arguments: object) -> Iterator[WorkerProcess]:
    """A worker that is gone afterwards."""
    process = WorkerProcess(*arguments)
    try:
        yield process
    finally:
        process.kill()

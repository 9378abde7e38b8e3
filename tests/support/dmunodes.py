"""Nodes of the double in `dmusernode`, for tests: its process, and its orders as methods."""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("dmusernode.py")
_MNT_DETACH = 2


class NodeError(Exception):
    """An order was refused, with this errno number."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Nodes:
    """The double's orders, over one connection; every wait ends after 60 seconds at the latest."""

    def __init__(self, directory: Path, control: str) -> None:
        self.directory = directory
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(control)
        self._replies = self._socket.makefile("rb")

    def path(self, name: str) -> str:
        """The node of a name."""
        return str(self.directory / name)

    def create(self, name: str, size_bytes: int, *, timeout_ms: int = 4000) -> str:
        """A new target; returns the path of its node."""
        self._order(f"create {name} {size_bytes} {timeout_ms}")
        return self.path(name)

    def remove(self, name: str) -> None:
        """As `dmsetup remove`."""
        self._order(f"remove {name}")

    def submit(
        self, name: str, kind: int, *, flags: int = 0, sector: int = 0, length: int = 0, data: bytes = b""
    ) -> int:
        """Queue a request; returns its number, for `wait`."""
        (number,) = self._order(f"submit {name} {kind} {flags} {sector} {len(data) or length}", data)
        return number

    def wait(self, name: str, number: int) -> tuple[int, bytes]:
        """The errno number of a request that has ended, and what a READ gave."""
        result, length = self._order(f"wait {name} {number}")
        return result, self._replies.read(length)

    def read(self, name: str, sector: int, length: int) -> tuple[int, bytes]:
        """A READ, to its end."""
        return self.wait(name, self.submit(name, 0, sector=sector, length=length))

    def await_count(self, name: str, what: str, count: int) -> None:
        """Return when `what` (opens, readers, queued, unanswered, poisoned, held) is `count`."""
        self._order(f"await {name} {what} {count}")

    def hold(self, name: str, payload_bytes: int) -> None:
        """Stop the writes of an answer when so much of its payload has come; -1 lets them go on."""
        self._order(f"hold {name} {payload_bytes}")

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def _order(self, line: str, data: bytes = b"") -> list[int]:
        self._socket.sendall(line.encode() + b"\n" + data)
        verdict, *numbers = self._replies.readline().split()
        if verdict != b"ok":
            raise NodeError(int(numbers[0]))
        return [int(number) for number in numbers]


@contextlib.contextmanager
def dm_user_nodes() -> Iterator[Nodes]:
    """A directory of nodes; skips the test where nothing can be mounted."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting a directory of nodes takes root and /dev/fuse")
    with tempfile.TemporaryDirectory(prefix="snapd-", dir="/tmp") as directory:
        mount, control = Path(directory, "nodes"), str(Path(directory, "control"))
        mount.mkdir()
        command = [sys.executable, str(_SCRIPT), "--mount", str(mount), "--control", control]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as double:
            try:
                assert double.stdout is not None
                said = double.stdout.readline()
                if said == b"not permitted\n":
                    pytest.skip("mounting a directory of nodes is not permitted here")
                assert said == b"ready\n"
                nodes = Nodes(mount, control)
                try:
                    yield nodes
                finally:
                    nodes.close()
            finally:
                double.terminate()
                double.wait()
                # Nothing is left of it, also when the double died of something.
                ctypes.CDLL(None).umount2(str(mount).encode(), _MNT_DETACH)

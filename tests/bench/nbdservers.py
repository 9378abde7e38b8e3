"""Servers to measure: other people's, and what all servers have in common."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Server:
    """An NBD server at `uri`; `pids` are its processes by name."""

    name: str
    uri: str
    pids: Mapping[str, int]


@contextlib.contextmanager
def foreign_server(name: str, command: list[str], socket: Path) -> Iterator[Server]:
    """Another NBD server, which the command makes listen at `socket`."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with status {process.returncode}")
            time.sleep(0.01)
        yield Server(name, f"nbd+unix:///?socket={socket}", {name: process.pid})
    finally:
        process.terminate()
        process.wait()


def qemu_nbd(overlay: Path, directory: Path) -> contextlib.AbstractContextManager[Server]:
    """qemu-nbd on a qcow2 file."""
    socket = directory / "qemu.sock"
    command = ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-k", str(socket), str(overlay)]
    return foreign_server("qemu-nbd", command, socket)


def nbdkit(image: Path, directory: Path) -> contextlib.AbstractContextManager[Server]:
    """nbdkit on a raw image."""
    socket = directory / "nbdkit.sock"
    return foreign_server("nbdkit", ["nbdkit", "-f", "-r", "-U", str(socket), "file", str(image)], socket)

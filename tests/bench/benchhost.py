"""Device hosts to measure, over files of the kept data, started as the service starts them but without it."""

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Self
from uuid import UUID

from nbdservers import Server

from snapd.block.file import FileStore
from snapd.client.nbd import NbdClient
from snapd.cow.digests import load_digests
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.parse.reader import CowFile
from snapd.device.config import DeviceConfig, Policy, Route
from snapd.dmuser.arena import create_arena
from snapd.merge.sharedmap import SharedMap
from snapd.proc import control
from snapd.proc.child import Child

_TIMEOUT_S = 30
_SNAPSHOT = UUID(int=Random(1).getrandbits(128))


class BenchHost:
    """A device host for the new view of `cow` over `base`; a context manager that ends it.

    `directory`, which it makes, is for files of its own; its path is short, since it becomes part of a socket's.
    """

    def __init__(self, name: str, base: Path, cow: Path, directory: Path, policy: Policy = Policy.RESTART) -> None:
        self.name = name
        self._directory = directory
        with contextlib.ExitStack() as stack:
            (directory / "undo").mkdir(parents=True)
            base_fd, cow_fd = (_open(stack, path, os.O_RDONLY) for path in (base, cow))
            parsed = CowFile.parse(FileStore(cow_fd, str(cow)))
            extent_map = parsed.extent_map(base.stat().st_size, digests=load_digests(cow, parsed))
            self.op_count = extent_map.op_count
            self.size_bytes = extent_map.block_count * BLOCK_SIZE
            extent_map_fd, shared_map_fd, worker_fence_fd, host_fence_fd = (
                _open(stack, directory / file, os.O_RDWR | os.O_CREAT)
                for file in ("extent.map", "shared.map", "worker.fence", "host.fence")
            )
            extent_map.save(extent_map_fd)
            SharedMap.create(shared_map_fd, extent_map, _SNAPSHOT, 1)
            nbd = stack.enter_context(socket.socket(socket.AF_UNIX))
            nbd.bind(str(directory / "nbd.sock"))
            nbd.listen(64)
            listener = stack.enter_context(control.listen(str(directory / "control.sock")))
            arena_fd = create_arena()
            stack.callback(os.close, arena_fd)
            given = {
                "base": base_fd,
                "cow": cow_fd,
                "extent_map": extent_map_fd,
                "shared_map": shared_map_fd,
                "undo_directory": _open(stack, directory / "undo", os.O_RDONLY | os.O_DIRECTORY),
                "worker_fence": worker_fence_fd,
                "arena": arena_fd,
                "control_listener": listener.fileno(),
                "nbd_listener": nbd.fileno(),
            }
            ours, theirs = control.pair()
            self._control = stack.enter_context(ours)
            self._control.settimeout(_TIMEOUT_S)
            with theirs:
                self._process = Child.spawn("snapd.device", [], [theirs.fileno(), host_fence_fd])
            stack.callback(self._end)
            config = DeviceConfig("bench", Route.SNAPSHOT, self.size_bytes, True, str(_SNAPSHOT), policy)
            self._call({"verb": "start", "device": config.to_dict(), "descriptors": list(given)}, list(given.values()))
            # A worker that has answered is there to be counted too.
            changed = next((extent.start for extent in extent_map.changed_extents(0, extent_map.block_count)), 0)
            self.read(bytearray(BLOCK_SIZE), changed * BLOCK_SIZE)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def server(self) -> Server:
        """The host as a server, with the worker that it has now."""
        return Server(self.name, self.uri, {"host": self._process.pid, "worker": self.stats()["worker_pid"]})

    @property
    def uri(self) -> str:
        """Where clients connect."""
        return f"nbd+unix:///?socket={self._directory}/nbd.sock"

    def read(self, buffer: bytearray, offset: int) -> None:
        """Read from a new connection; `SnapdError` as the device answers."""
        with NbdClient.connect(self.uri, _TIMEOUT_S) as client:
            client.read_into(buffer, offset)

    def stats(self) -> dict[str, Any]:
        """What the host counts."""
        return self._call({"verb": "stats"})

    def _call(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        control.send(self._control, message, list(fds))
        received = control.receive(self._control)
        if received is None or not received[0]["ok"]:
            raise RuntimeError(f"device host {self.name}: {received}")
        return received[0]

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(_TIMEOUT_S * 1000)


def _open(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return fd

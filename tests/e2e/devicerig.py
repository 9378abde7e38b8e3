"""A device under test: real files, a real device host process and its real worker."""

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from snapd.block.file import FileStore
from snapd.client.nbd import NbdClient
from snapd.cow.compress import CompressOption
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import WriterOptions, create_writer
from snapd.device.config import Descriptors
from snapd.dmuser.arena import create_arena
from snapd.merge.sharedmap import SharedMap
from snapd.proc import control
from snapd.proc.child import Child

BLOCK = 4096
BLOCKS = 1024
SIZE = BLOCKS * BLOCK
UNIT_BLOCKS = 4
WAIT_S = 30


class Images:
    """An old image, a new one, and the COW between them: a quarter each unchanged, replaced, zero and copied."""

    def __init__(self, seed: int, blocks: int = BLOCKS) -> None:
        source = random.Random(seed)
        self.blocks = blocks
        self.size_bytes = blocks * BLOCK
        self.old = source.randbytes(self.size_bytes)
        new = bytearray(self.old)
        self.replaced: list[int] = []
        self.copied: list[tuple[int, int]] = []
        self.zeroed: list[int] = []
        for start in range(0, blocks, UNIT_BLOCKS):
            kind = source.randrange(4)
            for block in range(start, start + UNIT_BLOCKS):
                at = block * BLOCK
                if kind == 1:
                    # Half of it compresses, so that payloads are packed and a damaged one is noticed.
                    new[at : at + BLOCK] = source.randbytes(BLOCK // 2) + bytes(BLOCK // 2)
                elif kind == 2:
                    new[at : at + BLOCK] = bytes(BLOCK)
                    self.zeroed.append(block)
                elif kind == 3:
                    origin = source.randrange(blocks)
                    new[at : at + BLOCK] = self.old[origin * BLOCK : (origin + 1) * BLOCK]
                    self.copied.append((block, origin))
            if kind == 1:
                self.replaced.append(start)
        self.new = bytes(new)

    def write_cow(self, fd: int) -> None:
        """Write the COW to an empty file."""
        options = WriterOptions(
            compression=CompressOption.parse("zstd"), op_count_max=self.blocks, unit=UNIT_BLOCKS * BLOCK
        )
        writer = create_writer(FileStore(fd), options)
        for start in self.replaced:
            writer.raw(start, self.new[start * BLOCK : (start + UNIT_BLOCKS) * BLOCK])
        for block in self.zeroed:
            writer.zero(block)
        for block, origin in self.copied:
            writer.copy(block, origin)
        writer.finalize()


class Device:
    """A device host over `images`, in a directory of its own; a context manager that leaves nothing behind.

    `route` is who serves it: a snapshot over base and COW, the old image as a writable store, or a daemon that connects
    to `daemon_path`. With `fuse_fd` it has a FUSE export too. Keyword arguments of `start` go into the device's
    configuration.
    """

    def __init__(self, images: Images, route: str = "snapshot", *, fuse_fd: int | None = None) -> None:
        self.images = images
        self.route = route
        # Short: the paths of unix sockets have less than 108 bytes.
        self.directory = tempfile.mkdtemp(prefix="snapd-", dir="/tmp")
        self.snapshot = uuid.UUID(int=random.Random(1).getrandbits(128))
        self._listeners = {
            "nbd_listener": _listen(self.nbd_path),
            "control_listener": control.listen(self.control_path),
        }
        self._files = {"arena": create_arena()}
        if route == "external":
            self._listeners["daemon_listener"] = _listen(self.daemon_path)
        else:
            self._files |= {"base": self._open("base"), "worker_fence": self._open("worker.fence")}
            os.pwrite(self._files["base"], images.old, 0)
        if route == "snapshot":
            self._make_snapshot()
        given = self._files | {name: listener.fileno() for name, listener in self._listeners.items()}
        if fuse_fd is not None:
            given["fuse"] = fuse_fd
        self.fds = Descriptors(given)
        self.host: Child | None = None
        self.connection: socket.socket | None = None

    def _make_snapshot(self) -> None:
        cow, extent_map_fd, shared_fd = self._open("cow"), self._open("map"), self._open("shared")
        self.images.write_cow(cow)
        extent_map = CowFile.parse(FileStore(cow)).extent_map(self.images.size_bytes, self.images.size_bytes)
        extent_map.save(extent_map_fd)
        self.extent_map = ExtentMap.load(extent_map_fd)
        self.shared = SharedMap.create(shared_fd, extent_map, self.snapshot, 1)
        os.mkdir(self._path("undo"))
        undo_fd = os.open(self._path("undo"), os.O_RDONLY | os.O_DIRECTORY)
        self._files |= {"cow": cow, "extent_map": extent_map_fd, "shared_map": shared_fd, "undo_directory": undo_fd}

    @property
    def nbd_path(self) -> str:
        return self._path("nbd")

    @property
    def control_path(self) -> str:
        return self._path("ctl")

    @property
    def daemon_path(self) -> str:
        return self._path("dmu")

    @property
    def base_path(self) -> str:
        return self._path("base")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.nbd_path}"

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        if self.host is not None:
            self.kill_host()
        for listener in self._listeners.values():
            listener.close()
        for fd in self._files.values():
            os.close(fd)
        shutil.rmtree(self.directory)

    def start(self, **settings: int | str | bool) -> dict[str, Any]:
        """Start a device host; returns its reply."""
        fence_fd = self._open("host.fence")
        ours, theirs = control.pair()
        ours.settimeout(30)
        self.host = Child.spawn("snapd.device", [], [theirs.fileno(), fence_fd])
        theirs.close()
        os.close(fence_fd)
        self.connection = ours
        is_snapshot = self.route == "snapshot"
        config = {"device": "test", "route": self.route, "size_bytes": self.images.size_bytes, "read_only": is_snapshot}
        if is_snapshot:
            config["snapshot"] = str(self.snapshot)
        message = {"verb": "start", "device": config | settings, "descriptors": self.fds.names}
        return self.call(message, self.fds.fds)[0]

    def call(self, message: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """Send a verb on the daemon's connection and wait for the reply."""
        assert self.connection is not None
        control.send(self.connection, message, list(fds))
        received = control.receive(self.connection)
        assert received is not None
        return received

    def status(self) -> dict[str, Any]:
        return self.call({"verb": "status"})[0]

    def stats(self) -> dict[str, Any]:
        return self.call({"verb": "stats"})[0]

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool], verb: str = "status") -> dict[str, Any]:
        """Ask until the answer is as it should be, and return it."""
        end = time.monotonic() + WAIT_S
        while not is_so(answer := self.call({"verb": verb})[0]):
            assert time.monotonic() < end, answer
        return answer

    def content(self) -> bytes:
        """What the base, or the store, holds now."""
        return os.pread(self._files["base"], self.images.size_bytes, 0)

    def kill_host(self) -> int:
        """SIGKILL the device host and wait for its exit; returns its status."""
        assert self.host is not None
        assert self.connection is not None
        self.host.kill()
        self.connection.close()
        status = self.host.wait(30_000)
        self.host = None
        return status

    def stop(self) -> int:
        """The orderly end; returns the exit status."""
        assert self.host is not None
        assert self.connection is not None
        assert self.call({"verb": "stop"})[0]["ok"]
        status = self.host.wait(30_000)
        self.host = None
        self.connection.close()
        return status

    def kill_worker(self) -> int:
        """SIGKILL the worker there is, and return its process id."""
        pid = int(self.status()["worker_pid"])
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    @contextlib.contextmanager
    def client(self) -> Iterator[NbdClient]:
        with NbdClient.connect(self.uri, timeout_s=60) as client:
            yield client

    def give(self, name: str, fd: int) -> None:
        """One more descriptor for hosts that are started from now on; it stays the caller's."""
        self.fds = Descriptors(dict(zip(self.fds.names, self.fds.fds, strict=True)) | {name: fd})

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _open(self, name: str) -> int:
        return os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    return listener

"""A device under test: real files, a real device host process and its real worker."""

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from snapd.block.file import FileStore
from snapd.client.nbd import NbdClient
from snapd.cow.compress import CompressOption
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import WriterOptions, create_writer
from snapd.device.config import Descriptors
from snapd.merge.sharedmap import SharedMap
from snapd.proc import control
from snapd.proc.child import Child

BLOCK = 4096
BLOCKS = 1024
SIZE = BLOCKS * BLOCK
UNIT_BLOCKS = 4


class Images:
    """An old image, a new one, and the COW between them: a quarter each unchanged, replaced, zero and copied."""

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.old = source.randbytes(SIZE)
        new = bytearray(self.old)
        self.replaced: list[int] = []
        self.copied: list[tuple[int, int]] = []
        self.zeroed: list[int] = []
        for start in range(0, BLOCKS, UNIT_BLOCKS):
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
                    origin = source.randrange(BLOCKS)
                    new[at : at + BLOCK] = self.old[origin * BLOCK : (origin + 1) * BLOCK]
                    self.copied.append((block, origin))
            if kind == 1:
                self.replaced.append(start)
        self.new = bytes(new)

    def write_cow(self, fd: int) -> None:
        """Write the COW to an empty file."""
        options = WriterOptions(compression=CompressOption.parse("zstd"), op_count_max=BLOCKS, unit=UNIT_BLOCKS * BLOCK)
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

    Keyword arguments of `start` go into the device's configuration.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        # Short: the paths of unix sockets have less than 108 bytes.
        self.directory = tempfile.mkdtemp(prefix="snapd-", dir="/tmp")
        self.snapshot = uuid.UUID(int=random.Random(1).getrandbits(128))
        os.mkdir(self._path("undo"))
        cow = self._open("cow")
        base = self._open("base")
        extent_map_fd = self._open("map")
        shared_fd = self._open("shared")
        images.write_cow(cow)
        os.pwrite(base, images.old, 0)
        extent_map = CowFile.parse(FileStore(cow)).extent_map(SIZE, SIZE)
        extent_map.save(extent_map_fd)
        self.extent_map = ExtentMap.load(extent_map_fd)
        self.shared = SharedMap.create(shared_fd, extent_map, self.snapshot, 1)
        self._nbd = socket.socket(socket.AF_UNIX)
        self._nbd.bind(self.nbd_path)
        self._nbd.listen(64)
        self._control = control.listen(self.control_path)
        self.fds = Descriptors(
            cow=cow,
            base=base,
            extent_map=extent_map_fd,
            shared_map=shared_fd,
            undo_directory=os.open(self._path("undo"), os.O_RDONLY | os.O_DIRECTORY),
            worker_fence=self._open("worker.fence"),
            nbd_listener=self._nbd.fileno(),
            control_listener=self._control.fileno(),
        )
        self.host: Child | None = None
        self.connection: socket.socket | None = None

    @property
    def nbd_path(self) -> str:
        return self._path("nbd")

    @property
    def control_path(self) -> str:
        return self._path("ctl")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.nbd_path}"

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        if self.host is not None:
            self.kill_host()
        self._nbd.close()
        self._control.close()
        for fd in self.fds[:6]:
            os.close(fd)
        shutil.rmtree(self.directory)

    def start(self, **timeouts_ms: int) -> dict[str, Any]:
        """Start a device host; returns its reply."""
        fence_fd = self._open("host.fence")
        ours, theirs = control.pair()
        ours.settimeout(30)
        self.host = Child.spawn("snapd.device", [], [theirs.fileno(), fence_fd])
        theirs.close()
        os.close(fence_fd)
        self.connection = ours
        config = {"device": "test", "snapshot": str(self.snapshot), "size_bytes": SIZE, **timeouts_ms}
        return self.call({"verb": "start", "device": config}, self.fds)[0]

    def call(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> tuple[dict[str, Any], list[int]]:
        """Send a verb on the daemon's connection and wait for the reply."""
        assert self.connection is not None
        control.send(self.connection, message, fds)
        received = control.receive(self.connection)
        assert received is not None
        return received

    def status(self) -> dict[str, Any]:
        return self.call({"verb": "status"})[0]

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

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _open(self, name: str) -> int:
        return os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

"""What the service tests share: a pair of images with their COW, and a private daemon."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from snapd.client.nbd import NbdClient
from snapd.client.service import Client
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.verbs.create import create_cow
from snapd.ctl.demo_service import PrivateService

BLOCK = 4096


@dataclass(frozen=True)
class Images:
    """A base that may be written to, its COW, and pristine copies of both images."""

    base: Path
    cow: Path
    old: bytes
    new: bytes


def make_images(directory: Path, seed: int, blocks: int, new_blocks: int | None = None) -> Images:
    """Images with unchanged, moved, zeroed, compressible and random blocks; every copy's source is overwritten."""
    random = Random(seed)
    old = [random.randbytes(BLOCK) for _ in range(blocks)]
    new = list(old)
    for start in range(0, blocks, 64):
        kind = random.randrange(5)
        for block in range(start, min(start + 64, blocks)):
            if kind == 1:
                new[block] = old[(block + blocks // 2) % blocks]
            elif kind == 2:
                new[block] = bytes(BLOCK)
            elif kind == 3:
                new[block] = random.randbytes(64) * (BLOCK // 64)
            elif kind == 4:
                new[block] = random.randbytes(BLOCK)
    new += [random.randbytes(BLOCK) for _ in range((new_blocks or blocks) - blocks)]
    base, target, cow = directory / "base.img", directory / "target.img", directory / "update.cow"
    images = Images(base, cow, b"".join(old), b"".join(new))
    base.write_bytes(images.old)
    target.write_bytes(images.new)
    create_cow(base, target, cow, CreateOptions(), lambda _done, _total: None)
    target.unlink()
    return images


def read_device(uri: str) -> bytes:
    """The whole content of a mapped device."""
    with NbdClient.connect(uri) as device:
        content = bytearray(device.size_bytes)
        device.read_into(content, 0)
    return bytes(content)


class Service(PrivateService):
    """A private daemon with a client and the command line."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    def client(self) -> Client:
        """A new connection."""
        return Client(self.server)

    def snapctl(self, *arguments: str, code: int = 0) -> str:
        """Run the real command; checks the exit code and returns standard output."""
        command = [sys.executable, "-m", "snapd.ctl", "--server", self.server, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == code, (
            f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}\n{self.log()}"
        )
        return result.stdout if code == 0 else result.stderr

    def json(self, *arguments: str) -> Any:
        """The verb's JSON."""
        return json.loads(self.snapctl(*arguments, "-o", "json"))


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="snapd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def service(short_dir: Path) -> Iterator[Service]:
    """A daemon that serves; at the end, none of the processes that it started is left."""
    with Service(short_dir) as running:
        yield running
    assert processes_of(short_dir) == []


def processes_of(directory: Path) -> list[int]:
    """The processes that hold a file below the directory open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                links = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                if any(link.startswith(f"{directory}/") for link in links):
                    found.append(int(entry.name))
    return found


@pytest.fixture
def images(short_dir: Path) -> Callable[..., Images]:
    """Makes images in the test's directory."""

    def make(seed: int = 1, blocks: int = 2048, new_blocks: int | None = None) -> Images:
        return make_images(short_dir, seed, blocks, new_blocks)

    return make

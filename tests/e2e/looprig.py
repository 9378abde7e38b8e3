"""A device as a loop device under test. A command that may touch it has a time limit and hangs nobody but itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
from devicerig import BLOCK, Device, Images

from snapd.manager.loopdevice import LoopExport, probe

SIZE = 64 << 20
COMMAND_TIMEOUT_S = 60
POLL_S = 0.01


class Blank(Images):
    """A store of `SIZE` zeros."""

    def __init__(self) -> None:
        self.blocks = SIZE // BLOCK
        self.size_bytes = SIZE
        self.old = bytes(SIZE)


class Command:
    """A command in the background, ended with the context; its output goes to a file, so that no pipe holds it up."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __enter__(self) -> "Command":
        self._output_fd = os.memfd_create("output")
        self._process = subprocess.Popen(
            self.arguments, stdin=subprocess.DEVNULL, stdout=self._output_fd, stderr=subprocess.STDOUT
        )
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        if self.is_running:
            self._process.kill()
            # It may be waiting in the kernel for ever: nobody waits for it without end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        os.close(self._output_fd)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        length = os.fstat(self._output_fd).st_size
        return os.pread(self._output_fd, length, 0).decode(errors="replace")

    def wait_for_output(self, text: str) -> None:
        """Return when it has said so."""
        end = time.monotonic() + COMMAND_TIMEOUT_S
        while text not in self.output:
            assert self.is_running, self.output
            assert time.monotonic() < end, f"{self.arguments} has not said {text!r}"
            time.sleep(POLL_S)

    def interrupt(self) -> None:
        """Have it end by itself, with a summary."""
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = COMMAND_TIMEOUT_S) -> int:
        """The exit status, which has to come in time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} takes longer than {timeout_s} s:\n{self.output}") from None


def run(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a command that has to succeed; returns its output."""
    with Command(*arguments) as command:
        status = command.wait(timeout_s)
        assert status == 0, f"{arguments}: {status}\n{command.output}"
        return command.output


def require(*programs: str) -> None:
    """Skip where there can be no loop devices, or where a program is missing."""
    reason = probe()
    if reason is not None:
        pytest.skip(reason)
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


class LoopRig:
    """A device with its FUSE export and loop device; whatever happens, nothing of them is left behind."""

    def __init__(self, device: Device, export: LoopExport, directory: Path) -> None:
        self.device = device
        self.export = export
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self._settings: dict[str, int | str | bool] = {}
        self._is_mounted = False

    def start(self, **settings: int | str | bool) -> str:
        """Have a host serve it, and attach the loop device; returns its node."""
        self._settings = settings
        self.restart()
        return asyncio.run(self.export.attach())

    def restart(self) -> None:
        """Another host for the same device, with the same descriptors."""
        reply = self.device.start(**self._settings)
        assert reply["ok"], reply

    def mount(self, *options: str) -> Path:
        """Mount the file system on the loop device."""
        self.mountpoint.mkdir()
        self._is_mounted = True
        run("mount", *options, self.export.loop, str(self.mountpoint))
        return self.mountpoint

    def unmount(self) -> None:
        run("umount", str(self.mountpoint))
        self._is_mounted = False
        self.mountpoint.rmdir()

    def detach(self) -> None:
        """The orderly end."""
        asyncio.run(self.export.detach())

    def wait_for_traffic(self, requests: int) -> None:
        """Return when this host has answered so many reads and writes more."""
        wanted = self._answered() + requests
        end = time.monotonic() + COMMAND_TIMEOUT_S
        while (answered := self._answered()) < wanted:
            assert time.monotonic() < end, f"{answered} requests answered, {wanted} wanted"
            time.sleep(POLL_S)

    def _answered(self) -> int:
        stats = self.device.call({"verb": "stats"})[0]
        return int(stats["reads"]) + int(stats["writes"])

    def close(self) -> None:
        """Have no file system mounted, whatever else still works."""
        if self._is_mounted:
            with contextlib.suppress(AssertionError):
                run("umount", "-l", str(self.mountpoint), timeout_s=20)


def mounts_below(directory: Path) -> list[str]:
    """What is mounted there, as the kernel lists it."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {directory}/" in line]


@contextlib.contextmanager
def loop_rig(images: Images, route: str) -> Iterator[LoopRig]:
    """A device of a route that nobody serves yet, mounted and not attached."""
    require()
    directory = Path(tempfile.mkdtemp(prefix="loop-", dir="/tmp"))
    export = asyncio.run(LoopExport.open(directory, read_only=route == "snapshot"))
    try:
        assert export.fuse_fd is not None
        with Device(images, route, fuse_fd=export.fuse_fd) as device:
            rig = LoopRig(device, export, directory)
            try:
                yield rig
            finally:
                rig.close()
    finally:
        # Without a host and with our copy closed, whoever still waits for the device gets EIO.
        export.close()
        asyncio.run(export.abandon())
        assert mounts_below(directory) == []
        shutil.rmtree(directory)

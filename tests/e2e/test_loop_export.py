"""Mounting, attaching and undoing it: every wait ends, what fails is undone, and the next daemon finds it again."""

import asyncio
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from looprig import Blank, Command, LoopRig, loop_rig, mounts_below, require, run

from snapd.block.errors import SnapdError
from snapd.device.loopctl import nodes_of
from snapd.manager import loopdevice
from snapd.manager.loopdevice import LoopExport, clear


@pytest.fixture
def directory() -> Iterator[Path]:
    require()
    path = Path(tempfile.mkdtemp(prefix="loop-", dir="/tmp"))
    yield path
    assert mounts_below(path) == []
    shutil.rmtree(path)


@pytest.fixture
def rig() -> Iterator[LoopRig]:
    require("mkfs.ext4", "mount", "umount")
    with loop_rig(Blank(), "raw") as rig:
        yield rig


def is_gone(directory: Path) -> bool:
    return not mounts_below(directory) and not nodes_of(f"{directory}/loop/image") and not os.listdir(directory)


def test_attach_without_a_host(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Nobody serves: the step that waits is named, and the steps before it are undone."""
    monkeypatch.setattr(loopdevice, "STEP_TIMEOUT_S", 1.0)
    export = asyncio.run(LoopExport.open(directory, read_only=False))
    assert len(mounts_below(directory)) == 1
    with pytest.raises(SnapdError, match="attach the loop device: not done within 1 s") as raised:
        asyncio.run(export.attach())
    assert raised.value.errno == errno.ETIMEDOUT
    assert export.fuse_fd is None
    assert is_gone(directory)


def test_mount_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A descriptor that is not one of FUSE's."""
    monkeypatch.setattr(loopdevice, "FUSE", "/dev/null")
    with pytest.raises(SnapdError, match="mount the device's directory") as raised:
        asyncio.run(LoopExport.open(directory, read_only=False))
    assert raised.value.errno == errno.EINVAL
    assert is_gone(directory)


def test_device_in_use_is_not_detached(rig: LoopRig) -> None:
    """EBUSY, and whoever uses it notices nothing."""
    node = rig.start()
    run("mkfs.ext4", "-q", node)
    mountpoint = rig.mount()
    with pytest.raises(SnapdError, match=f"{node} is mounted") as raised:
        rig.detach()
    assert raised.value.errno == errno.EBUSY
    run("dd", "if=/dev/urandom", f"of={mountpoint}/file", "bs=4096", "count=8", "oflag=direct")
    rig.unmount()
    rig.detach()
    assert is_gone(rig.directory)


def test_next_daemon_finds_it_again(rig: LoopRig) -> None:
    """The record has the node, the host has the descriptor; the loop device lives on between the two daemons."""
    node = rig.start()
    rig.export.close()
    run("dd", "if=/dev/urandom", f"of={node}", "bs=4096", "count=8", "oflag=direct")
    reply, fds = rig.device.call({"verb": "adopt"})
    given = dict(zip(reply["descriptors"], fds, strict=True))
    adopted = asyncio.run(LoopExport.adopt(rig.directory, given.pop("fuse")))
    for fd in given.values():
        os.close(fd)
    assert adopted is not None
    assert adopted.loop == node
    run("dd", f"if={node}", "of=/dev/null", "bs=4096", "count=8", "iflag=direct")
    asyncio.run(adopted.detach())
    assert is_gone(rig.directory)


def test_half_made_export_is_not_adopted(rig: LoopRig) -> None:
    """A daemon that died before it had attached: what it had done is undone."""
    rig.restart()
    assert rig.export.fuse_fd is not None
    assert asyncio.run(LoopExport.adopt(rig.directory, os.dup(rig.export.fuse_fd))) is None
    assert is_gone(rig.directory)


def test_daemon_and_host_gone(rig: LoopRig) -> None:
    """Without the descriptor nobody can serve it any more: readers get EIO at once, and what is left is cleared."""
    node = rig.start()
    with Command("sh", "-c", f"exec 3<{node}; echo open; exec sleep 600") as user:
        user.wait_for_output("open")
        rig.device.kill_host()
        rig.export.close()
        with Command("dd", f"if={node}", "of=/dev/null", "bs=4096", "iflag=direct", "count=1") as reader:
            assert reader.wait(20) == 1
            assert "Input/output error" in reader.output
        asyncio.run(clear(rig.directory))
        assert mounts_below(rig.directory) == []
        # It ends with its last user; without the mount its file has lost its name.
        attached = Path("/sys/block", Path(node).name, "loop")
        assert attached.exists()
    assert not attached.exists()
    assert is_gone(rig.directory)


def test_others_cannot_see_it(rig: LoopRig) -> None:
    """The directory is root's alone, and so is the mount even for who got in."""
    rig.start()
    rig.directory.chmod(0o755)
    for path in (rig.directory / "loop", rig.directory / "loop" / "image"):
        result = subprocess.run(
            ["stat", path], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=30
        )
        assert "Permission denied" in result.stderr

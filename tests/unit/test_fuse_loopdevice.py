"""The record of a loop device, without one: what the next daemon makes of it."""

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.manager import loopdevice
from snapd.manager.loopdevice import LoopExport, clear, probe


@pytest.fixture
def fuse_fd(tmp_path: Path) -> int:
    """A descriptor that stands for the adopted one."""
    return os.open(tmp_path, os.O_RDONLY)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def write_record(directory: Path, *, restartable: bool) -> None:
    record = {"loop": "/dev/loop77", "read_only": True, "restartable": restartable}
    (directory / "loop.json").write_text(json.dumps(record))


def test_adopt(tmp_path: Path, fuse_fd: int) -> None:
    write_record(tmp_path, restartable=True)
    export = asyncio.run(LoopExport.adopt(tmp_path, fuse_fd))
    assert export is not None
    assert (export.loop, export.fuse_fd) == ("/dev/loop77", fuse_fd)
    export.close()
    assert not is_open(fuse_fd)


def test_adopt_without_restarts(tmp_path: Path, fuse_fd: int) -> None:
    """Before Linux 6.9 nobody but the host keeps the descriptor: with the host everything fails, and nothing hangs."""
    write_record(tmp_path, restartable=False)
    export = asyncio.run(LoopExport.adopt(tmp_path, fuse_fd))
    assert export is not None
    assert (export.loop, export.fuse_fd) == ("/dev/loop77", None)
    assert not is_open(fuse_fd)


@pytest.mark.parametrize("record", [None, b"", b"{cut off"])
def test_nothing_to_adopt(tmp_path: Path, fuse_fd: int, record: bytes | None) -> None:
    if record is not None:
        (tmp_path / "loop.json").write_bytes(record)
    assert asyncio.run(LoopExport.adopt(tmp_path, fuse_fd)) is None
    assert not is_open(fuse_fd)


def test_clear_where_nothing_is(tmp_path: Path) -> None:
    """No helper is needed to find that out; a record without a mount is of another boot."""
    write_record(tmp_path, restartable=True)
    asyncio.run(clear(tmp_path))
    assert os.listdir(tmp_path) == []
    asyncio.run(clear(tmp_path / "missing"))


def test_ordinary_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EPERM, and nothing is changed."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert probe() == "a loop device needs root, and we are user 1000"
    with pytest.raises(SnapdError, match="needs root") as raised:
        asyncio.run(LoopExport.open(tmp_path, read_only=False))
    assert raised.value.errno == errno.EPERM
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("attribute", ["FUSE", "CONTROL"])
def test_missing_device_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attribute: str) -> None:
    """EOPNOTSUPP with the name of what is missing, and nothing is changed."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    # The other one is there for everybody.
    monkeypatch.setattr(loopdevice, "FUSE", "/dev/null")
    monkeypatch.setattr(loopdevice, "CONTROL", "/dev/null")
    monkeypatch.setattr(loopdevice, attribute, "/dev/missing")
    assert probe() == "a loop device needs /dev/missing: No such file or directory"
    with pytest.raises(SnapdError, match="/dev/missing") as raised:
        asyncio.run(LoopExport.open(tmp_path, read_only=False))
    assert raised.value.errno == errno.EOPNOTSUPP
    assert os.listdir(tmp_path) == []

"""The `truncate` verb of real stores; the simulated one is tested with its losses in test_simdisk."""

import errno
import os
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore, FileStore
from snapd.block.store import read_bytes


def test_a_file_ends_where_it_was_told_to(tmp_path: Path) -> None:
    """Cut off, and lengthened with zeros; nothing that was cut off comes back."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    store = FileStore(fd)
    store.write(b"a" * 1000, 0)
    store.truncate(300)
    assert store.size() == 300
    store.truncate(2000)
    assert read_bytes(store, 0, 2000) == b"a" * 300 + bytes(1700)
    os.close(fd)


def test_a_device_has_no_end_to_move(tmp_path: Path) -> None:
    """Asked to, it stays as it is."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a" * 1000)
    BlockDeviceStore(fd).truncate(0)
    assert os.fstat(fd).st_size == 1000
    os.close(fd)


def test_the_system_may_refuse(tmp_path: Path) -> None:
    """The error names the file and what was wanted."""
    (tmp_path / "file").write_bytes(b"a")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(SnapdError, match="cut file to 0 bytes") as caught:
        FileStore(fd, "file").truncate(0)
    assert caught.value.errno == errno.EINVAL
    os.close(fd)

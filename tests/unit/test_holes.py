"""Reading images with holes: exact, and without reading what is none."""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.holes import SparseReader
from snapd.block.simdisk import SimDisk

SIZE = 64 << 12


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[FileStore]:
    """A file of 64 blocks; 10 to 12, and 40, have data."""
    with open(tmp_path / "image", "w+b") as file:
        os.truncate(file.fileno(), SIZE)
        os.pwrite(file.fileno(), b"a" * (3 << 12), 10 << 12)
        os.pwrite(file.fileno(), b"b" * (1 << 12), 40 << 12)
        if os.lseek(file.fileno(), 0, os.SEEK_DATA) != 10 << 12:
            pytest.skip("this file system has no holes")
        yield FileStore(file.fileno(), "image")


@given(st.integers(0, SIZE), st.integers(0, SIZE))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_reads_as_it_would_without_holes(sparse: FileStore, one: int, other: int) -> None:
    """False says that all of the range is in a hole, and then the buffer is as it was."""
    start, end = sorted((one, other))
    expected = bytearray(end - start)
    sparse.read_into(expected, start)
    buffer = memoryview(bytearray(b"x" * (end - start)))
    if SparseReader(sparse).read(buffer, start):
        assert buffer == expected
    else:
        assert not any(expected)
        assert bytes(buffer) == b"x" * (end - start)


def test_only_data_is_read(sparse: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read for each stretch of data, none for a hole."""
    reads: list[tuple[int, int]] = []
    monkeypatch.setattr(FileStore, "read_into", lambda _self, buffer, offset: reads.append((offset, len(buffer))))
    buffer, reader = memoryview(bytearray(SIZE)), SparseReader(sparse)
    assert reader.read(buffer, 0)
    assert reads == [(10 << 12, 3 << 12), (40 << 12, 1 << 12)]
    assert not reader.read(buffer[: 9 << 12], 1 << 12)
    assert not reader.read(buffer[: 9 << 12], 50 << 12)
    assert len(reads) == 2


def test_data_is_looked_for_once(sparse: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces that are read, the end of a stretch of data is asked for once."""
    calls: list[int] = []
    real = os.lseek

    def seek(fd: int, offset: int, what: int) -> int:
        calls.append(what)
        return real(fd, offset, what)

    monkeypatch.setattr("snapd.block.holes.os.lseek", seek)
    os.pwrite(sparse.fd, b"c" * SIZE, 0)
    reader = SparseReader(sparse)
    for offset in range(0, SIZE, 512):
        assert reader.read(memoryview(bytearray(512)), offset)
    assert calls == [os.SEEK_DATA, os.SEEK_HOLE]


def test_behind_the_end_is_no_hole(sparse: FileStore) -> None:
    """An image that is shorter than it was is an error, not zeros."""
    buffer = memoryview(bytearray(1 << 12))
    with pytest.raises(SnapdError, match="behind the end"):
        SparseReader(sparse).read(buffer, SIZE - 2048)


def test_where_nothing_tells_holes_all_is_data() -> None:
    """A store that is no file is read."""
    store = SimDisk(Random(0)).store("image", bytes(1 << 12))
    buffer = memoryview(bytearray(b"x" * (1 << 12)))
    assert SparseReader(store).read(buffer, 0)
    assert bytes(buffer) == bytes(1 << 12)

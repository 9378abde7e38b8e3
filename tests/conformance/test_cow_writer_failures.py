"""Where writing ends: a device too small, a disk that fails, files that must not be appended to."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from cow_writing import BLOCK, VERSIONS, Call, begin, content, options

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore, FileStore
from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import Buffer
from snapd.cow.compress import CompressOption
from snapd.cow.errors import CowError
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import CowWriter, WriterOptions, append_writer, create_writer

NONE = CompressOption.parse("none")


class Device(BlockDeviceStore):
    """A block device of a fixed size, made of a file."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd, "device")
        self._size = size

    def size(self) -> int:
        return self._size

    def zero(self, offset: int, length: int) -> None:
        FileStore.zero(self, offset, length)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device of 40 blocks, full of what was there before."""
    fd = os.open(tmp_path / "device", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"\x01" * 40 * 4096, 0)
    yield Device(fd, 40 * 4096)
    os.close(fd)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_is_never_written_behind_its_end(version: int, device: Device) -> None:
    """COW-128: no space, named, in both versions; the last label is what the file has, and the writer is done."""
    writer = create_writer(device, options(version, cluster_ops=5))
    writer.raw(0, BLOCK * 20)
    writer.label(1)
    writer.raw(20, BLOCK * 30)
    with pytest.raises(CowError, match="COW-128") as caught:
        writer.label(2)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(CowError, match="COW-128"):
        writer.finalize()
    assert os.fstat(device.fd).st_size == 40 * 4096
    assert CowFile.parse(device, label=1).op_count == 20


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_file_on_a_device_is_dead(version: int, device: Device) -> None:
    """COW-90, COW-94: of a finished file nothing can be read once a new one has begun in its place."""
    writer = create_writer(device, options(version, cluster_ops=5))
    writer.raw(0, BLOCK * 9)
    writer.label(7)
    writer.finalize()
    assert CowFile.parse(device).op_count == 9
    # The same number of records, of which only the first one is new.
    writer = create_writer(device, options(version, cluster_ops=5))
    writer.raw(50, BLOCK)
    with pytest.raises(CowError, match="V15"):
        CowFile.parse(device, label=7)
    if version == 2:
        with pytest.raises(CowError, match="V12"):
            CowFile.parse(device)
    else:
        assert CowFile.parse(device).op_count == 0
    writer.finalize()
    assert CowFile.parse(device).ops.new_block.tolist() == [50]


class Failing(SimStore):
    """A file whose writes fail from one on."""

    def __init__(self) -> None:
        super().__init__(SimDisk(Random(0)), "cow", b"")
        self.writes_left = 1 << 30

    def write(self, data: Buffer, offset: int) -> None:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise SnapdError(errno.EIO, "the disk is broken")
        super().write(data, offset)


def label_on(writer: CowWriter) -> None:
    """Labels, until one fails."""
    for number in range(2, 9):
        writer.label(number)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_writer_that_failed_stays_failed(version: int) -> None:
    """COW-94, COW-95: the same error from every call, also once the disk works again; the label is what there is."""
    for writes in range(6):
        store = Failing()
        writer = create_writer(store, options(version, cluster_ops=3))
        writer.raw(0, BLOCK * 2)
        writer.label(1)
        store.writes_left = writes
        writer.raw(10, BLOCK * 10)
        with pytest.raises(SnapdError, match="the disk is broken"):
            label_on(writer)
        store.writes_left = 1 << 30
        calls: list[Call] = [
            lambda writer: writer.zero(50),
            lambda writer: writer.raw(60, BLOCK),
            lambda writer: writer.label(9),
            lambda writer: writer.finalize(),
        ]
        for call in calls:
            with pytest.raises(SnapdError, match="the disk is broken") as caught:
                call(writer)
            assert caught.value.errno == errno.EIO
        assert CowFile.parse(store, label=1).op_count == 2


def test_an_interrupted_call_ends_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C in the middle of a call must not leave a writer that finishes half of it."""
    store, writer = begin(options(3))
    writer.label(1)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.label(2)
    with pytest.raises(SnapdError, match="interrupted"):
        writer.finalize()


@pytest.mark.parametrize("version", VERSIONS)
def test_append_refuses_what_it_would_spoil(version: int) -> None:
    """COW-89, COW-148, COW-208: another compression, a merge that has begun, a file that breaks rules."""
    store, writer = begin(options(version, "gz"))
    writer.raw(0, BLOCK * 3)
    writer.label(5)
    writer.finalize()
    before = content(store)
    for other in ("none", "lz4", "zstd"):
        with pytest.raises(CowError, match="COW-89"):
            append_writer(store, CowFile.parse(store, label=5), CompressOption.parse(other))
    assert content(store) == before
    store.write((1).to_bytes(8, "little"), 26)
    with pytest.raises(CowError, match="COW-148") as caught:
        append_writer(store, CowFile.parse(store, label=5), CompressOption.parse("gz"))
    assert caught.value.errno == errno.EBUSY
    store.write(bytes(8), 26)
    assert content(store) == before
    writer = append_writer(store, CowFile.parse(store, label=5), CompressOption.parse("gz,1"))
    writer.finalize()
    assert content(store) == before


def test_append_refuses_a_window_that_is_done() -> None:
    """COW-148: the scratch space may hold blocks that are nowhere else."""
    store = SimDisk(Random(0)).store("cow")
    writer = create_writer(store, WriterOptions(op_count_max=5))
    writer.label(1)
    store.write(b"\x02", 78)
    with pytest.raises(CowError, match="COW-148"):
        append_writer(store, CowFile.parse(store, label=1), NONE)


def test_a_file_without_payloads_takes_any_compression() -> None:
    """COW-18, COW-89: in version 2 the ops say which it is, and there is none yet."""
    store, writer = begin(options(2))
    writer.zero(1)
    writer.label(1)
    writer = append_writer(store, CowFile.parse(store, label=1), CompressOption.parse("zstd"))
    writer.raw(2, BLOCK)
    writer.finalize()
    assert CowFile.parse(store).header.compression == CompressOption.parse("zstd").algorithm


def test_append_refuses_a_target_block_that_has_an_op() -> None:
    """COW-61: also where the op was there before."""
    for version in VERSIONS:
        store, writer = begin(options(version, unit=65536 if version == 3 else 4096))
        writer.raw(10, BLOCK * 4)
        writer.label(1)
        writer.zero(30)
        writer.finalize()
        writer = append_writer(store, CowFile.parse(store, label=1), NONE)
        for block in (10, 13):
            with pytest.raises(CowError, match="COW-61"):
                writer.zero(block)
        writer.zero(30)
        writer.zero(14)
        writer.finalize()
        assert CowFile.parse(store).ops.new_block.tolist()[-2:] == [30, 14]

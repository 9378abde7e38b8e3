"""A device as a real block device: file systems on it, and what they notice of kills, which is nothing."""

import hashlib
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from devicerig import BLOCK, BLOCKS, UNIT_BLOCKS, Images
from devicerig import SIZE as SNAPSHOT_SIZE
from looprig import SIZE, Blank, Command, LoopRig, loop_rig, mounts_below, require, run

from snapd.device.loopctl import nodes_of
from snapd.proc.deaths import CRASH_LOOP_DEATHS

FIO = (
    *("fio", "--name=verify", "--ioengine=io_uring", "--direct=1", "--rw=randrw", "--bs=4k", "--iodepth=16"),
    *("--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--verify_state_save=0", "--randseed=1"),
)


@pytest.fixture(params=["raw", "worker"])
def rig(request: pytest.FixtureRequest) -> Iterator[LoopRig]:
    require("mkfs.ext4", "fsck.ext4", "fio", "mount", "umount")
    with loop_rig(Blank(), request.param) as rig:
        yield rig


@pytest.fixture
def worker_rig() -> Iterator[LoopRig]:
    require("mkfs.ext4", "fsck.ext4", "fio", "mount", "umount")
    with loop_rig(Blank(), "worker") as rig:
        yield rig


def test_file_system(rig: LoopRig, tmp_path: Path) -> None:
    """mkfs, mount, write, trim, unmount, fsck, mount, compare; nothing is left afterwards."""
    node = rig.start()
    assert run("blockdev", "--getsize64", "--getro", node).split() == [str(SIZE), "0"]
    run("mkfs.ext4", "-q", node)
    for number in range(1, 8):
        (tmp_path / f"file{number}").write_bytes(random.Random(number).randbytes(100_000 * number))
    mountpoint = rig.mount()
    run("cp", "-r", f"{tmp_path}/.", str(mountpoint))
    run("fstrim", str(mountpoint))
    rig.unmount()
    run("fsck.ext4", "-fn", node)
    rig.mount()
    run("diff", "-r", "-x", "lost+found", str(tmp_path), str(mountpoint))
    rig.unmount()
    rig.detach()
    assert rig.device.call({"verb": "stats"})[0]["errors"] == 0
    assert rig.device.stop() == 0
    assert os.listdir(rig.directory) == []
    assert mounts_below(rig.directory) == []
    assert nodes_of(f"{rig.directory}/loop/image") == []


def test_fio_on_the_device(rig: LoopRig) -> None:
    node = rig.start()
    run(*FIO, f"--filename={node}", "--size=32m")
    run(*FIO, f"--filename={node}", "--size=32m", "--bs=512-1m", "--bsrange=512-1m")
    rig.detach()


def test_zeroed_and_discarded_ranges_read_as_zeros(rig: LoopRig) -> None:
    """BOW-130: both are PUNCH_HOLE to the file behind a loop device."""
    node = rig.start()
    run("dd", "if=/dev/urandom", f"of={node}", "bs=1M", "count=4", "oflag=direct")
    run("blkdiscard", "-o", "4096", "-l", "65536", node)
    run("blkdiscard", "-z", "-o", str(1 << 20), "-l", "65536", node)
    rig.detach()
    with open(rig.device.base_path, "rb") as file:
        stored = file.read(4 << 20)
    assert stored[4096 : 4096 + 65536] == bytes(65536)
    assert stored[1 << 20 : (1 << 20) + 65536] == bytes(65536)
    assert stored[:4096].strip(b"\0")
    assert stored[4096 + 65536 : 8192 + 65536].strip(b"\0")


def test_kills_under_a_mounted_file_system(worker_rig: LoopRig) -> None:
    """DMU-148, DMU-185: SIGKILL of workers and device hosts under ext4: fio sees no error, and fsck none either."""
    rig = worker_rig
    node = rig.start()
    run("mkfs.ext4", "-q", node)
    mountpoint = rig.mount()
    with Command(*FIO, f"--filename={mountpoint}/data", "--size=24m", "--time_based", "--runtime=300") as fio:
        for _ in range(3):
            # One death fewer than a crash loop, which a new host counts from the beginning.
            for _ in range(CRASH_LOOP_DEATHS - 1):
                rig.wait_for_traffic(100)
                assert rig.device.kill_worker()
            rig.wait_for_traffic(100)
            assert fio.is_running, fio.output
            rig.device.kill_host()
            rig.restart()
        rig.wait_for_traffic(100)
        check_fio(fio)
    rig.unmount()
    run("fsck.ext4", "-fn", node)
    rig.detach()


def check_fio(fio: Command) -> None:
    """It has found no error until now, since it ends with the first, and none in what it has still to verify."""
    assert fio.is_running, fio.output
    fio.interrupt()
    # Its way to say that it was interrupted.
    assert fio.wait() == 128, fio.output
    assert "err= 0" in fio.output


class FileSystemImages(Images):
    """A new image that is an ext4 with `files`; of the old one, every fourth unit is the same already."""

    def __init__(self, directory: Path) -> None:
        source = random.Random(7)
        self.files = {f"f{number}": source.randbytes(50_000) + bytes(50_000) for number in range(16)}
        tree = directory / "tree"
        tree.mkdir()
        for name, content in self.files.items():
            (tree / name).write_bytes(content)
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(SNAPSHOT_SIZE)
        run("mkfs.ext4", "-q", "-b", str(BLOCK), "-O", "^has_journal", "-d", str(tree), str(image))
        self.blocks, self.size_bytes = BLOCKS, SNAPSHOT_SIZE
        self.new = image.read_bytes()
        old = bytearray(source.randbytes(SNAPSHOT_SIZE))
        self.replaced: list[int] = []
        self.zeroed: list[int] = []
        self.copied: list[tuple[int, int]] = []
        unit_bytes = UNIT_BLOCKS * BLOCK
        for start in range(0, BLOCKS, UNIT_BLOCKS):
            at = start * BLOCK
            content = self.new[at : at + unit_bytes]
            if start // UNIT_BLOCKS % 4 == 0:
                old[at : at + unit_bytes] = content
            elif content == bytes(unit_bytes):
                self.zeroed += range(start, start + UNIT_BLOCKS)
            else:
                self.replaced.append(start)
        self.old = bytes(old)


READER = """
import hashlib, mmap, os, sys
directory = sys.argv[1]
buffer = mmap.mmap(-1, 1 << 20)
while True:
    for name in sorted(os.listdir(directory)):
        if name == "lost+found":
            continue
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_DIRECT)
        got = os.preadv(fd, [buffer], 0)
        os.close(fd)
        print(name, hashlib.sha256(buffer[:got]).hexdigest(), flush=True)
"""


def test_kills_under_a_mounted_snapshot(tmp_path: Path) -> None:
    """A read-only snapshot stays readable and right while its workers and hosts are killed."""
    require("mkfs.ext4", "mount", "umount")
    images = FileSystemImages(tmp_path)
    with loop_rig(images, "snapshot") as rig:
        node = rig.start()
        assert run("blockdev", "--getro", node).split() == ["1"]
        with pytest.raises(AssertionError, match=r"Operation not permitted|Read-only"):
            run("dd", "if=/dev/zero", f"of={node}", "bs=4096", "count=1", "oflag=direct")
        mountpoint = rig.mount("-o", "ro")
        with Command(sys.executable, "-I", "-c", READER, str(mountpoint)) as reader:
            for _ in range(3):
                for _ in range(2):
                    rig.wait_for_traffic(50)
                    assert rig.device.kill_worker()
                rig.wait_for_traffic(50)
                rig.device.kill_host()
                rig.restart()
            rig.wait_for_traffic(50)
            assert reader.is_running, reader.output
            *lines, _cut_off = reader.output.split("\n")
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in images.files.items()}
        assert len(lines) > len(digests)
        assert {tuple(line.split()) for line in lines} == set(digests.items())
        run("diff", "-r", "-x", "lost+found", str(tmp_path / "tree"), str(mountpoint))
        rig.unmount()
        run("fsck.ext4", "-fn", node)
        rig.detach()


def test_drained_host_is_replaced(worker_rig: LoopRig) -> None:
    """A planned restart under load: the verb `stop` ends one host, the next goes on with what it left."""
    rig = worker_rig
    node = rig.start()
    with Command(*FIO, f"--filename={node}", "--size=24m", "--time_based", "--runtime=300") as fio:
        for _ in range(3):
            rig.wait_for_traffic(100)
            assert rig.device.stop() == 0
            rig.restart()
        rig.wait_for_traffic(100)
        check_fio(fio)
    rig.detach()


def test_fail_fast(worker_rig: LoopRig) -> None:
    """SNAP-53, SNAP-61: with its worker the device is gone, as in the reference: every request fails at once."""
    rig = worker_rig
    node = rig.start(policy="fail_fast")
    with Command(*FIO, f"--filename={node}", "--size=24m", "--time_based", "--runtime=300") as fio:
        rig.wait_for_traffic(100)
        assert rig.device.kill_worker()
        assert fio.wait(20) == 1
        assert "Input/output error" in fio.output
    with Command("dd", f"if={node}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct") as reader:
        assert reader.wait(20) == 1
        assert "Input/output error" in reader.output
    rig.detach()


def test_kills_while_payload_is_copied(rig: LoopRig) -> None:
    """A host that dies within the kernel's copy of a request fails none: its memory was there before it began."""
    node = rig.start()
    moment = random.Random(5)
    with Command(*FIO, f"--filename={node}", "--bs=1m", "--size=60m", "--time_based", "--runtime=300") as fio:
        for _ in range(30):
            # No event of ours says when the kernel copies.
            time.sleep(moment.random() * 0.004)
            rig.device.kill_host()
            rig.restart()
        rig.wait_for_traffic(10)
        check_fio(fio)
    rig.detach()

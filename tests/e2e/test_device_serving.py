"""A real device host and a real worker: what clients read is the new image, exactly."""

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from devicerig import BLOCK, SIZE, UNIT_BLOCKS, Device, Images

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.cow.header import Header


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(seed=7)


@pytest.fixture
def device(images: Images) -> Iterator[Device]:
    with Device(images) as device:
        assert device.start() == {"ok": True, "pid": device.host.pid if device.host else 0, "id": None}
        yield device


def read(client: NbdClient, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    client.read_into(buffer, offset)
    return bytes(buffer)


def test_whole_image(device: Device) -> None:
    """DMU-167: replaced, zero, copied and unchanged blocks all read as the new image."""
    with device.client() as client:
        assert client.size_bytes == SIZE
        assert read(client, 0, SIZE) == device.images.new
    status = device.status()
    assert status["reads_passed_down"] > 0
    assert status["reads_to_worker"] > 0
    assert status["in_flight_bytes"] == 0
    assert status["worker_restarts"] == 0


def test_any_offset_and_length(device: Device) -> None:
    """DMU-182: no alignment is asked of clients."""
    choice = random.Random(3)
    with device.client() as client:
        for _ in range(200):
            offset = choice.randrange(SIZE)
            length = min(choice.choice([1, 3, 511, 513, 4095, 4097, 70_001]), SIZE - offset)
            assert read(client, offset, length) == device.images.new[offset : offset + length]


def test_several_connections(device: Device) -> None:
    with device.client() as one, device.client() as two:
        assert device.status()["connections"] == 2
        for offset in range(0, SIZE, SIZE // 8):
            assert read(one, offset, 10_000) == read(two, offset, 10_000)


def test_merged_blocks_are_read_from_the_base(device: Device) -> None:
    """UNDO-26, UNDO-5: while a merger marks blocks merged, reads change their way and nothing else."""
    with device.client() as client:
        before = device.status()["reads_to_worker"]
        os.pwrite(device.fds["base"], device.images.new, 0)
        device.shared.mark_merged(0, SIZE // BLOCK)
        assert read(client, 0, SIZE) == device.images.new
        assert device.status()["reads_to_worker"] == before


def test_damaged_payload_is_an_error(device: Device, images: Images) -> None:
    """DMU-167, DMU-65: a unit that does not decode fails the reads that need it, and no others."""
    cow = os.pread(device.fds["cow"], 78, 0)
    header = Header.unpack(cow)
    os.pwrite(device.fds["cow"], bytes(64), header.data_start)
    damaged = images.replaced[0] * BLOCK
    end = damaged + UNIT_BLOCKS * BLOCK
    with device.client() as client:
        with pytest.raises(SnapdError, match="error 5"):
            read(client, damaged, BLOCK)
        assert read(client, 0, damaged) == images.new[:damaged]
        assert read(client, end, SIZE - end) == images.new[end:]
    assert device.status()["worker_restarts"] == 0


def test_writes_are_refused(device: Device) -> None:
    with device.client() as client:
        with pytest.raises(SnapdError, match="error 22"):
            read(client, SIZE - 1, 2)
        assert read(client, SIZE - 1, 1) == device.images.new[-1:]


def test_stop_cuts_clients_and_exits(device: Device) -> None:
    """DMU-155: the verb `stop` ends the export, the worker and the process."""
    worker = int(device.status()["worker_pid"])
    with device.client() as client:
        assert device.stop() == 0
        with pytest.raises(SnapdError):
            read(client, 0, BLOCK)
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize("module", ["snapd.worker.__main__", "snapd.device.__main__"])
def test_serving_processes_import_nothing_heavy(module: str) -> None:
    """Start time is part of the pause a client sees."""
    script = f"import sys, {module}; print([m for m in ('numpy', 'asyncio', 'grpc') if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script],
        capture_output=True,
        check=True,
        text=True,
    )
    assert loaded.stdout.strip() == "[]"


def need(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def test_nbdinfo(device: Device) -> None:
    shown = subprocess.run([need("nbdinfo"), device.uri], capture_output=True, check=True, text=True, timeout=60).stdout
    assert f"export-size: {SIZE}" in shown
    assert "is_read_only: true" in shown
    assert "can_multi_conn: true" in shown
    assert "block_size_maximum: 33554432" in shown


def test_nbdinfo_list(device: Device) -> None:
    subprocess.run([need("nbdinfo"), "--list", device.uri], capture_output=True, check=True, timeout=60)


def test_nbdcopy(device: Device) -> None:
    copy = os.path.join(device.directory, "copy")
    subprocess.run([need("nbdcopy"), device.uri, copy], capture_output=True, check=True, timeout=60)
    with open(copy, "rb") as file:
        assert file.read() == device.images.new


def test_qemu_img(device: Device) -> None:
    copy = os.path.join(device.directory, "copy")
    subprocess.run(
        [need("qemu-img"), "convert", "-f", "raw", "-O", "raw", device.uri, copy],
        capture_output=True,
        check=True,
        timeout=60,
    )
    with open(copy, "rb") as file:
        assert file.read() == device.images.new


def test_fio(device: Device) -> None:
    fio = need("fio")
    engines = subprocess.run([fio, "--enghelp"], capture_output=True, text=True, timeout=60).stdout
    if "nbd" not in engines.split():
        pytest.skip("this fio has no nbd engine")
    subprocess.run(
        [
            *(fio, "--name=read", "--ioengine=nbd", f"--uri={device.uri}", "--rw=randread", "--bs=4k"),
            *("--iodepth=32", f"--size={SIZE}", "--output-format=terse"),
        ],
        capture_output=True,
        check=True,
        timeout=60,
        cwd=device.directory,
    )
    assert device.status()["in_flight_bytes"] == 0


def test_slow_client_holds_up_nobody(device: Device) -> None:
    """A client that asks and never reads keeps its credit, and only its own."""
    with device.client() as client:
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(device.nbd_path)
        slow.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6" + bytes(6))
        for _ in range(16):
            slow.sendall(bytes.fromhex("25609513") + bytes(20) + (1 << 20).to_bytes(4, "big"))
        assert read(client, 0, SIZE) == device.images.new
        assert device.status()["in_flight_bytes"] > 0
        slow.close()
        assert read(client, 0, SIZE) == device.images.new
    assert device.status()["in_flight_bytes"] == 0

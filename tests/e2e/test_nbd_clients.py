"""The clients that people have, against a real device host: each does what it came for, over either socket."""

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from devicerig import BLOCK, BLOCKS, SIZE, UNIT_BLOCKS, Device, Images
from nbdrig import listening_on_tcp
from tools import need, need_root, run

from snapd.block.file import FileStore

LARGE_BYTES = 64 << 20
UNIT = UNIT_BLOCKS * BLOCK
ZEROS, DATA = 3, 0


class Served:
    """A running device: its addresses, by the kind of their socket, and what it reads as."""

    def __init__(self, device: Device, uris: dict[str, str], content: bytes) -> None:
        self.device = device
        self.uris = uris
        self.content = content

    @property
    def uri(self) -> str:
        return self.uris["unix"]

    def path(self, name: str) -> str:
        return os.path.join(self.device.directory, name)

    def stored(self) -> bytes:
        """What the store holds, after the device's last flush."""
        return Path(self.device.base_path).read_bytes()


@contextlib.contextmanager
def serving(device: Device, content: bytes, **settings: int | str | bool) -> Iterator[Served]:
    """Start the device, on TCP too."""
    with device, listening_on_tcp(device) as (host, port):
        assert device.start(**settings)["ok"]
        yield Served(device, {"unix": device.uri, "tcp": f"nbd://{host}:{port}"}, content)
        assert device.status()["worker_restarts"] == 0


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Served]:
    """A snapshot whose base has holes where it is unchanged."""
    images = Images(seed=31)
    changed = {block for start in images.replaced for block in range(start, start + UNIT_BLOCKS)}
    changed |= {*images.zeroed, *(block for copy in images.copied for block in copy)}
    content = bytearray(images.new)
    device = Device(images)
    store = FileStore(device.fds["base"])
    for start in range(0, BLOCKS, UNIT_BLOCKS):
        if start % 3 and changed.isdisjoint(range(start, start + UNIT_BLOCKS)):
            store.discard(start * BLOCK, UNIT)
            content[start * BLOCK : start * BLOCK + UNIT] = bytes(UNIT)
    with serving(device, bytes(content)) as served:
        yield served


@pytest.fixture(params=["raw", "worker"])
def writable(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A small store with random content."""
    images = Images(seed=32)
    with serving(Device(images, request.param), images.old) as served:
        yield served


@pytest.fixture(params=["raw", "worker"])
def large(request: pytest.FixtureRequest) -> Iterator[Served]:
    """An empty store that has room for a file system."""
    device = Device(Images(seed=33), request.param)
    os.truncate(device.base_path, 0)
    os.truncate(device.base_path, LARGE_BYTES)
    with serving(device, bytes(LARGE_BYTES), size_bytes=LARGE_BYTES) as served:
        yield served


over_each_socket = pytest.mark.parametrize("over", ["unix", "tcp"])


def zero_ranges(served: Served) -> list[tuple[int, int]]:
    """The extents that a snapshot of such images must be said to have, as (bytes, state)."""
    found: list[tuple[int, int]] = []
    for start in range(0, SIZE, BLOCK):
        state = DATA if any(served.content[start : start + BLOCK]) else ZEROS
        if found and found[-1][1] == state:
            found[-1] = found[-1][0] + BLOCK, state
        else:
            found.append((BLOCK, state))
    return found


# Reading a snapshot.


@over_each_socket
def test_nbdinfo(snapshot: Served, over: str) -> None:
    shown = json.loads(run("nbdinfo", "--json", snapshot.uris[over]))
    assert (shown["protocol"], shown["structured"]) == ("newstyle-fixed", True)
    (export,) = shown["exports"]
    expected = {
        "export-name": "",
        "contexts": ["base:allocation"],
        "export-size": SIZE,
        "is_read_only": True,
        "can_multi_conn": True,
        "can_df": True,
        "can_flush": True,
        "can_fua": True,
        "can_trim": False,
        "can_zero": False,
        "can_fast_zero": False,
        "can_cache": False,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 << 20,
    }
    assert {name: export[name] for name in expected} == expected


def test_nbdinfo_of_a_writable_device(writable: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", writable.uri))["exports"]
    assert (export["is_read_only"], export["can_trim"], export["can_zero"]) == (False, True, True)
    assert export["block_size_minimum"] == 512


@over_each_socket
def test_nbdinfo_list(snapshot: Served, over: str) -> None:
    (export,) = json.loads(run("nbdinfo", "--list", "--json", snapshot.uris[over]))["exports"]
    assert (export["export-name"], export["export-size"]) == ("", SIZE)


@over_each_socket
def test_nbdinfo_map(snapshot: Served, over: str) -> None:
    """Zero ops and the holes of the base where it is unchanged, to the byte, and nothing else is zeros."""
    shown = json.loads(run("nbdinfo", "--map", "--json", snapshot.uris[over]))
    assert [(extent["length"], extent["type"]) for extent in shown] == zero_ranges(snapshot)
    assert [extent["offset"] for extent in shown] == [0, *(e["offset"] + e["length"] for e in shown[:-1])]


@over_each_socket
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-extents",),
        ("--synchronous",),
        ("--allocated", "--connections=1", "--requests=1"),
        ("--connections=8", "--requests=64", "--request-size=65536"),
        ("--request-size=2097152",),
        ("--request-size=33554432", "--no-extents"),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_nbdcopy(snapshot: Served, over: str, options: tuple[str, ...]) -> None:
    copy = snapshot.path("copy")
    run("nbdcopy", *options, snapshot.uris[over], copy)
    assert Path(copy).read_bytes() == snapshot.content
    os.unlink(copy)


@over_each_socket
def test_qemu_img(snapshot: Served, over: str) -> None:
    """Converted with holes and without, the copy is the image; compare agrees."""
    uri, copy = snapshot.uris[over], snapshot.path("copy")
    for options in ((), ("-S", "0"), ("-W", "-m", "16")):
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", *options, uri, copy)
        assert Path(copy).read_bytes() == snapshot.content
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, copy)
        os.unlink(copy)


def test_qemu_img_map(snapshot: Served) -> None:
    shown = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", snapshot.uri))
    assert [(extent["length"], extent["zero"]) for extent in shown] == [
        (length, state == ZEROS) for length, state in zero_ranges(snapshot)
    ]


def test_qemu_io_reads(snapshot: Served) -> None:
    """Bytes at any offset; and no write gets through."""
    start = snapshot.device.images.zeroed[0] * BLOCK
    shown = run("qemu-io", "-r", "-f", "raw", "-c", f"read -P 0 {start} {BLOCK}", "-c", "read -v 4094 5", snapshot.uri)
    assert "verification failed" not in shown
    assert " ".join(f"{byte:02x}" for byte in snapshot.content[4094:4099]) in shown
    run("qemu-io", "-f", "raw", "-c", "write 0 4096", snapshot.uri, code=1)


SHELL = """
content = open("content", "rb").read()
for structured in (False, True):
    for offset, length in ((0, 1), (511, 3), (4095, 70000), (0, len(content)), (len(content) - 1, 1)):
        h = nbd.NBD()
        h.set_request_structured_replies(structured)
        h.connect_uri(uri)
        assert h.get_structured_replies_negotiated() == structured
        assert h.get_size() == len(content)
        assert h.pread(length, offset) == content[offset:offset + length]
        h.set_strict_mode(0)
        for bad in (lambda: h.pread(2, len(content) - 1), lambda: h.pwrite(b"x" * 512, 0), lambda: h.trim(512, 0)):
            try:
                bad()
            except nbd.Error as error:
                assert error.errno in ("EINVAL", "EPERM"), error
            else:
                assert False
        if structured:
            chunks = []
            def chunk(data, at, kind, error):
                chunks.append((at, len(data), kind))
            buffer = h.pread_structured(length, offset, chunk, nbd.CMD_FLAG_DF)
            assert buffer == content[offset:offset + length]
            assert chunks == [(offset, length, nbd.READ_DATA)], chunks
        h.shutdown()
print("done")
"""


@over_each_socket
def test_nbdsh(snapshot: Served, over: str) -> None:
    """With structured replies, also not to be fragmented, and without; and errors as errors."""
    Path(snapshot.path("content")).write_bytes(snapshot.content)
    Path(snapshot.path("script")).write_text(SHELL)
    setting = f"uri = {snapshot.uris[over]!r}"
    assert "done" in run(
        "nbdsh", "-c", setting, "-c", "exec(open('script').read())", directory=snapshot.device.directory
    )


@over_each_socket
def test_fio_reads(snapshot: Served, over: str) -> None:
    need_fio_nbd()
    fio(snapshot, "--ioengine=nbd", f"--uri={snapshot.uris[over]}", "--rw=randread", "--bs=4k", f"--size={SIZE}")
    assert snapshot.device.status()["in_flight_bytes"] == 0


def test_nbdfuse_reads(snapshot: Served) -> None:
    """A read-only file, that other programs read."""
    Path(snapshot.path("expected")).write_bytes(snapshot.content)
    with nbdfuse(snapshot) as file:
        run("cmp", file, snapshot.path("expected"))
        fio(snapshot, f"--filename={file}", "--rw=randread", "--bs=4k", f"--size={SIZE}", "--readonly")


# Writing to a store.


@over_each_socket
def test_qemu_io_writes(writable: Served, over: str) -> None:
    """Each of its verbs, and then the store itself."""
    commands = (
        *("write -P 7 0 64k", "write -f -P 9 3M 4k", "write -z 1M 64k", "write -z -u 1200k 64k"),
        *("discard 2M 512k", "flush", "read -P 7 0 64k", "read -P 0 1M 64k", "read -P 0 1200k 64k"),
    )
    shown = run("qemu-io", "-f", "raw", *(word for c in commands for word in ("-c", c)), writable.uris[over])
    assert "verification failed" not in shown
    expected = bytearray(writable.content)
    expected[: 64 << 10] = b"\7" * (64 << 10)
    expected[3 << 20 : (3 << 20) + BLOCK] = b"\t" * BLOCK
    for start in (1 << 20, 1200 << 10):
        expected[start : start + (64 << 10)] = bytes(64 << 10)
    stored = bytearray(writable.stored())
    # What is discarded reads as anything.
    stored[2 << 20 : (2 << 20) + (512 << 10)] = expected[2 << 20 : (2 << 20) + (512 << 10)]
    assert stored == expected


@over_each_socket
def test_images_written_to_the_device(writable: Served, over: str) -> None:
    """By nbdcopy and by qemu-img, an image with stretches of zeros."""
    choice = random.Random(8)
    image = writable.path("image")
    for tool in ("nbdcopy", "qemu-img"):
        units = (choice.randbytes(UNIT) if choice.randrange(2) else bytes(UNIT) for _ in range(SIZE // UNIT))
        Path(image).write_bytes(b"".join(units))
        if tool == "nbdcopy":
            run("nbdcopy", "--flush", image, writable.uris[over])
        else:
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, writable.uris[over])
        assert writable.stored() == Path(image).read_bytes()


def test_discards_show_in_the_map(writable: Served) -> None:
    """What was given back is a hole, as soon as the discard has been answered."""
    assert json.loads(run("nbdinfo", "--map", "--json", writable.uri))[0]["length"] == SIZE
    run("qemu-io", "-f", "raw", "-c", "discard 1M 1M", writable.uri)
    shown = json.loads(run("nbdinfo", "--map", "--json", writable.uri))
    assert [(extent["offset"], extent["type"]) for extent in shown] == [(0, DATA), (1 << 20, ZEROS), (2 << 20, DATA)]


@over_each_socket
def test_fio_verifies(large: Served, over: str) -> None:
    """Random writes of several sizes, read back and compared, over fio's own client."""
    need_fio_nbd()
    verify = (
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--do_verify=1",
        "--bsrange=4k-256k",
    )
    fio(large, "--ioengine=nbd", f"--uri={large.uris[over]}", *verify, "--size=16m", "--fsync=16")
    assert large.device.status()["in_flight_bytes"] == 0


def test_file_system_over_nbdfuse(large: Served) -> None:
    """mkfs, mount, fio with verify, fsck; what was written is there after the mount, and after the device's end."""
    need_root()
    need("mkfs.ext4")
    mount = large.path("mount")
    os.mkdir(mount)
    with nbdfuse(large) as file:
        run("mkfs.ext4", "-q", "-F", file)
        run("mount", "-o", "loop,discard", file, mount)
        try:
            run("dd", "if=/dev/urandom", f"of={mount}/random", "bs=1M", "count=8", "conv=fsync")
            before = run("sha256sum", "random", directory=mount)
            run("cp", f"{mount}/random", f"{mount}/copy")
            run("rm", f"{mount}/copy")
            run("fstrim", mount)
            fio(
                large,
                f"--directory={mount}",
                "--rw=randwrite",
                "--bs=4k",
                "--size=8m",
                "--verify=crc32c",
                "--verify_state_save=0",
                "--end_fsync=1",
            )
        finally:
            run("umount", mount)
        run("fsck.ext4", "-f", "-n", file)
        run("mount", "-o", "loop,ro", file, mount)
        try:
            assert run("sha256sum", "random", directory=mount) == before
        finally:
            run("umount", mount)
    assert large.device.stop() == 0
    run("fsck.ext4", "-f", "-n", large.device.base_path)
    large.device.start(size_bytes=LARGE_BYTES)


def need_fio_nbd() -> None:
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("this fio has no nbd engine")


def fio(served: Served, *options: str) -> None:
    common = ("--name=job", "--iodepth=32", "--output-format=terse", "--randseed=5")
    run("fio", *common, *options, directory=served.device.directory)


@contextlib.contextmanager
def nbdfuse(served: Served) -> Iterator[str]:
    """The device as a file."""
    need("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is not for us")
    mount, ready = served.path("fuse"), Path(served.path("nbdfuse.pid"))
    os.makedirs(mount, exist_ok=True)
    process = subprocess.Popen([need("nbdfuse"), "--pidfile", str(ready), f"{mount}/nbd", served.uri])
    try:
        while not ready.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"nbdfuse ended with {process.wait(0.01)}")
        yield f"{mount}/nbd"
        run("fusermount3", "-u", mount)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            subprocess.run([need("fusermount3"), "-u", "-z", mount], check=False, timeout=60)
        ready.unlink(missing_ok=True)

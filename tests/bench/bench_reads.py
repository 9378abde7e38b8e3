"""Reads from a mapped snapshot beside qemu-nbd and nbdkit on the finished image, in one interleaved run.

    make bench            # or: .venv/bin/python tests/bench/bench_reads.py [ROUNDS]

Every round measures every server once, in turn, so that whatever else the machine does hits all of them. What is
printed is the minimum, median and maximum of the rounds, and the median's ratio to qemu-nbd's. Nothing is asserted.

- `new`: the new view before the merge; the COW replaces every block (zstd, 64 KiB units)
- `merged`: the same device after the merge, served from the base by pass-down
- `qemu-nbd`, `nbdkit`: the new image as a raw file
"""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from snapd.client.service import Client
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.verbs.create import create_cow
from snapd.ctl.demo_service import PrivateService

IMAGE_BYTES = 256 << 20
JOBS = (("4k QD1", "4k", 1), ("4k QD32", "4k", 32), ("128k QD8", "128k", 8))
SECONDS = 2


def make_images(directory: Path) -> tuple[Path, Path, Path]:
    """A base of zeros, a target of half-compressible data, and the COW between them."""
    base, target, cow = directory / "base.img", directory / "target.img", directory / "update.cow"
    random = Random(1)
    with open(base, "wb") as file:
        file.truncate(IMAGE_BYTES)
    with open(target, "wb") as file:
        for _ in range(IMAGE_BYTES >> 16):
            file.write(random.randbytes(32 << 10) + random.randbytes(64) * 512)
    create_cow(base, target, cow, CreateOptions(), lambda _done, _total: None)
    return base, target, cow


def iops(uri: str, block: str, depth: int) -> float:
    """Random reads a second, by fio's nbd engine."""
    options = [
        f"--uri={uri}",
        f"--size={IMAGE_BYTES}",
        f"--bs={block}",
        f"--iodepth={depth}",
        f"--runtime={SECONDS}",
        "--time_based",
    ]
    command = ["fio", "--name=read", "--ioengine=nbd", "--rw=randread", "--output-format=json", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # fio prints notes of its own before the JSON.
    report = json.loads(result.stdout[result.stdout.index("{") :])
    return float(report["jobs"][0]["read"]["iops"])


@contextlib.contextmanager
def foreign_server(command: list[str], socket: Path) -> Iterator[str]:
    """Another NBD server at `socket`."""
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()


def measure(rounds: int, servers: dict[str, str]) -> None:
    """Print the figures of `rounds` rounds over servers by name."""
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for job, block, depth in JOBS:
            for name, uri in servers.items():
                figures.setdefault((job, name), []).append(iops(uri, block, depth))
    for job, _, _ in JOBS:
        reference = statistics.median(figures[job, "qemu-nbd"])
        for name in servers:
            found = figures[job, name]
            median = statistics.median(found)
            print(
                f"{job:9} {name:9} {min(found):9.0f} {median:9.0f} {max(found):9.0f} IOPS  {median / reference:5.2f}x"
            )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    directory = Path(tempfile.mkdtemp(prefix="snapd-bench-"))
    try:
        base, target, cow = make_images(directory)
        merged_base, merged_cow = directory / "merged.img", directory / "merged.cow"
        shutil.copyfile(base, merged_base)
        shutil.copyfile(cow, merged_cow)
        qemu, nbdkit = directory / "qemu.sock", directory / "nbdkit.sock"
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(PrivateService(directory))
            client = stack.enter_context(Client(service.server))
            servers = {}
            for name, files in (("new", (base, cow)), ("merged", (merged_base, merged_cow))):
                client.create_update(name)
                client.create_snapshot(f"updates/{name}", "s", *map(str, files))
                servers[name] = client.map_snapshot(f"updates/{name}/snapshots/s").device.nbd_uri
            client.start_merge("updates/merged")
            list(client.watch_merge("updates/merged"))
            raw = ["-r", "-t", "-f", "raw", "-e", "8"]
            servers["qemu-nbd"] = stack.enter_context(
                foreign_server(["qemu-nbd", *raw, "-k", str(qemu), str(target)], qemu)
            )
            servers["nbdkit"] = stack.enter_context(
                foreign_server(["nbdkit", "-f", "-r", "-U", str(nbdkit), "file", str(target)], nbdkit)
            )
            measure(rounds, servers)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

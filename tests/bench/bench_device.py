"""A device in one interleaved run: reads from COWs, of what is passed down, start, memory and the death of a worker.

    make bench    # or: .venv/bin/python tests/bench/bench_device.py [--only PART ...] [--rounds N] [--seconds S]

Every round measures every server once, in turn, so that whatever else the machine does hits all of them. What is
printed is the median of the rounds with minimum and maximum, and what is required of the median. A ratio ("/") is taken
within each round, so it is the median of the rounds' ratios. Nothing is asserted. CPU time an I/O is what the server's
processes ran meanwhile: the steadiest figure on a machine with other work. The data is made by the first run and
kept, see `devicedata`.

- *content*: reads all over an image of which half changed, the update being COWs (zstd in units of 64 KiB, lz4 in units
  of 4 KiB) over a base, beside qemu-nbd with the same update as a qcow2 overlay (zstd, 64 KiB clusters) on that base.
- *changed*: the same inside a stretch that changed as a whole.
- *pass-down*: an image without ops beside nbdkit with the same file.
- *cold*: the same with the file's pages dropped before each run.
- *map*: from the request to map a snapshot of a million ops to its first 4 KiB, by the service, gRPC and NBD connection
  included; with a block map that is kept from before, and after a change of the COW.
- *memory*: the most private memory that device host and worker had under mixed load.
- *kill*: SIGKILL of the worker under reads in flight: until they have failed and a new one fails (fail_fast), or
  until they are answered after all (restart).
"""

import argparse
import contextlib
import functools
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchhost import BenchHost
from devicedata import CHANGED, COWS, IMAGE_BYTES, WHOLE, DeviceData, Region
from figures import Figure, Sheet
from fiojobs import JOBS, RANDOM_QD1, RANDOM_QD32, SEQUENTIAL, SEQUENTIAL_ONCE, Fio, Job, Load
from killing import kill_worker
from mapping import MillionOps
from nbdservers import Server, nbdkit, qemu_nbd
from procstats import cpu_ns, most_private

from snapd.device.config import Policy

MIB = 1 << 20
CONTENT_RATIOS = {
    "zstd-64k": {RANDOM_QD1: 1.5, RANDOM_QD32: 2.0, SEQUENTIAL: 2.0},
    "lz4-4k": {RANDOM_QD1: 2.0, RANDOM_QD32: 6.0, SEQUENTIAL: 2.5},
}
PASS_DOWN_RATIOS = {RANDOM_QD1: 0.85, RANDOM_QD32: 1.2, SEQUENTIAL: 0.9}
COLD_RATIOS = {RANDOM_QD32: 0.9, SEQUENTIAL_ONCE: 0.9}
MAP_KEPT_MS, MAP_CHANGED_MS = 150, 500
HOST_PRIVATE_MIB, WORKER_PRIVATE_MIB, WORKER_BYTES_AN_OP = 20, 40, 24

Round = Callable[[], None]


class Bench:
    """What the parts measure with: `data`, an empty directory with a short path, and the sheet that they fill.

    A part has what it measures started when it is asked for, and returns what a round does.
    """

    def __init__(
        self, data: DeviceData, scratch: Path, seconds: float, sheet: Sheet, files: contextlib.ExitStack
    ) -> None:
        self._sheet = sheet
        self._data = data
        self._scratch = scratch
        self._seconds = seconds
        self._files = files
        self._numbers = itertools.count()

    def content(self) -> Round:
        """Reads all over an image."""
        return self._content("content", WHOLE)

    def changed(self) -> Round:
        """Reads of what the COW has."""
        return self._content("changed", CHANGED)

    def pass_down(self) -> Round:
        """Reads of what the COW does not have, from memory."""
        return self._pass_down("pass-down", PASS_DOWN_RATIOS, lambda: None)

    def cold(self) -> Round:
        """Reads of what the COW does not have, from the disk."""
        measure_cold = self._pass_down("cold", COLD_RATIOS, lambda: _drop_pages(self._data.base))

        def measure() -> None:
            measure_cold()
            self._data.warm()

        return measure

    def map(self) -> Round:
        """From the request to map to the first bytes."""
        million = self._files.enter_context(MillionOps(self._data, self._scratch / "map"))

        def measure() -> None:
            heading = "map: a million ops, to the first byte"
            million.change()
            changed, kept = million.first_byte_ms(), million.first_byte_ms()
            self._sheet.add(heading, Figure("with the kept block map", "ms", at_most=MAP_KEPT_MS), kept)
            self._sheet.add(heading, Figure("after a change of the COW", "ms", at_most=MAP_CHANGED_MS), changed)

        return measure

    def memory(self) -> Round:
        """Private memory under load."""
        base = self._scratch / "million.base"
        with open(base, "wb") as file:
            file.truncate(self._data.million_base_bytes)
        hosts = [self._cow_host(name) for name in COWS]
        hosts.append(self._host("million ops", base, self._data.million))

        def measure() -> None:
            for host in hosts:
                loads = [Load(job, Region(0, host.size_bytes), self._seconds) for job in (RANDOM_QD32, SEQUENTIAL)]
                with most_private(host.server.pids) as most:
                    for fio in [Fio(host.uri, load) for load in loads]:
                        fio.result()
                worker_mib = WORKER_PRIVATE_MIB + WORKER_BYTES_AN_OP * host.op_count / MIB
                for process, at_most in (("host", HOST_PRIVATE_MIB), ("worker", worker_mib)):
                    figure = Figure(f"{process}, {host.name}", "MiB", at_most=at_most)
                    self._sheet.add("memory: private, under load", figure, most[process] / MIB)

        return measure

    def kill(self) -> Round:
        """The death of a worker with reads in flight."""
        name = next(iter(COWS))

        def measure() -> None:
            for policy in Policy:
                directory = self._scratch / f"host{next(self._numbers)}"
                with BenchHost(name, self._data.base, self._data.cow(name), directory, policy) as host:
                    death = kill_worker(host, CHANGED)
                heading, outcome = f"kill: policy {policy}", "failed" if death.failed else "answered"
                self._sheet.add(heading, Figure(f"reads in flight {outcome}", "ms"), death.in_flight_ms)
                self._sheet.add(heading, Figure(f"a new read {outcome}", "ms"), death.new_ms)

        return measure

    @functools.cached_property
    def _content_servers(self) -> list[Server]:
        foreign = self._files.enter_context(qemu_nbd(self._data.overlay, self._scratch))
        return [foreign, *(self._cow_host(name).server for name in COWS)]

    @functools.cached_property
    def _pass_down_servers(self) -> list[Server]:
        foreign = self._files.enter_context(nbdkit(self._data.base, self._scratch))
        return [foreign, self._host("snapd", self._data.base, self._data.unchanged).server]

    def _content(self, part: str, region: Region) -> Round:
        servers = self._content_servers

        def measure() -> None:
            for job in JOBS:
                ratios = {name: required[job] for name, required in CONTENT_RATIOS.items()}
                self._compare(f"{part}: {job.name}", servers, Load(job, region, self._seconds), ratios)

        return measure

    def _pass_down(self, part: str, ratios: Mapping[Job, float], prepare: Callable[[], None]) -> Round:
        servers = self._pass_down_servers

        def measure() -> None:
            for job, at_least in ratios.items():
                load = Load(job, Region(0, IMAGE_BYTES), self._seconds)
                self._compare(f"{part}: {job.name}", servers, load, {"snapd": at_least}, prepare)

        return measure

    def _compare(
        self,
        heading: str,
        servers: list[Server],
        load: Load,
        ratios: Mapping[str, float],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the load on each server, prepared each time; `ratios` are what is required of the others to the first."""
        first = 0.0
        for server in servers:
            prepare()
            before = {name: cpu_ns(pid) for name, pid in server.pids.items()}
            reads = Fio(server.uri, load).result()
            self._sheet.add(heading, Figure(server.name, "IOPS"), reads.iops)
            if server.name in ratios:
                figure = Figure(f"{server.name} / {servers[0].name}", "x", at_least=ratios[server.name])
                self._sheet.add(heading, figure, reads.iops / first)
            else:
                first = reads.iops
            for name, pid in server.pids.items():
                figure = Figure(f"{server.name}: CPU of {name}", "us/IO")
                self._sheet.add(heading, figure, (cpu_ns(pid) - before[name]) / reads.total / 1000)

    def _cow_host(self, name: str) -> BenchHost:
        return self._host(name, self._data.base, self._data.cow(name))

    def _host(self, name: str, base: Path, cow: Path) -> BenchHost:
        directory = self._scratch / f"host{next(self._numbers)}"
        return self._files.enter_context(BenchHost(name, base, cow, directory))


def _drop_pages(path: Path) -> None:
    """Have none of the file in memory; RuntimeError when that cannot be had."""
    with open(path, "rb") as file:
        # What is not on the disk yet cannot be dropped.
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.suppress(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
            raise RuntimeError(f"{path} stays in memory: somebody has it mapped")


PARTS = {
    "content": Bench.content,
    "changed": Bench.changed,
    "pass-down": Bench.pass_down,
    "cold": Bench.cold,
    "map": Bench.map,
    "memory": Bench.memory,
    "kill": Bench.kill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure devices.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run of fio")
    arguments = parser.parse_args()
    data = DeviceData()
    data.warm()
    scratch = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir="/tmp"))
    sheet = Sheet()
    try:
        with contextlib.ExitStack() as files:
            bench = Bench(data, scratch, arguments.seconds, sheet, files)
            measurements = {name: PARTS[name](bench) for name in arguments.only}
            for number in range(arguments.rounds):
                for name, measure in measurements.items():
                    print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                    measure()
    finally:
        shutil.rmtree(scratch)
        # What there is when one part fails, or the user has seen enough.
        sheet.show()
    print(f"\n{len(os.sched_getaffinity(0))} CPUs; load average over the last minutes {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()

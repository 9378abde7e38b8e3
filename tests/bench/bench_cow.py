"""COW files in one interleaved run: parsing, reading the new image, creating; beside what is required.

    make bench            # or: .venv/bin/python tests/bench/bench_cow.py [--rounds N]

Every round does everything once, in turn, so that whatever else the machine does hits all of it. What is printed is the
median of the rounds with minimum and maximum, what is required of the median, and what the reference takes for the
same kind of work, measured on another machine with two cores. Nothing is asserted. The data is made by the first run
and kept, see `benchdata`.

- *parse*: `CowFile.parse`, which checks all that it reads, of a million ops of every kind; memory is counted in runs of
  its own, since counting takes time. The reference is its daemon with 112 k ops, scaled.
- *read*: all of an image whose every block is a replaced one, with a view a thread, with and without a digests table.
  The reference is its daemon merging 112 k blocks on tmpfs, which writes them too.
- *create*: the whole command on two images of 768 MiB, from its start to its end, with two threads. The reference is
  its diff tool on two such images, which knows no XOR.
"""

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchdata import OP_COUNT, BenchData
from figures import Figure, Sheet
from images import BLOCK_BYTES, IMAGE_BYTES

from snapd.block.file import FileStore
from snapd.cow.digests import load_digests
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile

MB = 1_000_000
THREADS = 2
PIECE_BYTES = 1 << 20

# The reference, as measured: its daemon with 112 k ops (10 to 30 ms to parse), its diff tool with two images.
DAEMON_OPS = 112_000
DAEMON_PARSE_SECONDS = 0.02
DAEMON_MERGE_SECONDS = {("zstd", 64): 0.54, ("lz4", 64): 0.18, ("zstd", 4): 1.16, ("lz4", 4): 0.235}
DIFF_SECONDS = {"zstd": 2.6, "lz4": 1.9}
DIFF_PEAK_MB = {"zstd": 121, "lz4": 168}

PARSE_SECONDS = {"shuffled": 0.25, "ascending": 0.12}
READ_RATES = {("zstd", 64): 900, ("lz4", 64): 1500, ("zstd", 4): 350, ("lz4", 4): 800}
"""MB/s by compression and KiB of a unit; of small units, this is asked of two threads."""
CREATE_RATES = {("zstd", "same"): 300, ("lz4", "same"): 430, ("zstd", "search"): 60}
"""MB of image a second by compression and XOR."""
CREATE_PEAK_MB = ((150 << 20) + 24 * IMAGE_BYTES // BLOCK_BYTES) / MB
XOR_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Image:
    """A COW file that can be read through; with `digests` or without."""

    compress: str
    unit_kib: int
    digests: bool
    extent_map: ExtentMap
    cow: FileStore
    base: FileStore

    def read(self, threads: int) -> float:
        """Read all of it; MB/s."""
        size = self.extent_map.block_count * self.extent_map.block_size
        share = size // threads

        def read_share(start: int) -> None:
            view = CowView(self.extent_map, self.cow, source=self.base, base=self.base)
            piece = bytearray(PIECE_BYTES)
            for offset in range(start, start + share, PIECE_BYTES):
                view.read_into(piece, offset)

        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            # The results tell of a reader that failed.
            list(pool.map(read_share, range(0, size, share)))
            return size / (time.perf_counter() - begin) / MB


@dataclass(frozen=True, slots=True)
class Created:
    """What one run of `snapctl cow create` took."""

    seconds: float
    peak_mb: float
    cow_bytes: int


def create(source: Path, target: Path, out: Path, *, compress: str, unit_kib: int, xor: str) -> Created:
    """Run the command."""
    command = [
        *(str(Path(sys.executable).with_name("snapctl")), "cow", "create", "--jobs", str(THREADS)),
        *("--source", str(source), "--target", str(target), "--out", str(out)),
        *("--compress", compress, "--unit", f"{unit_kib}KiB", "--xor", xor),
    ]
    measured = [sys.executable, "-I", str(Path(__file__).with_name("measured.py")), *command]
    seconds, peak_bytes = subprocess.run(measured, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Created(float(seconds), int(peak_bytes) / MB, out.stat().st_size)


class Bench:
    """What a round does, and the sheet that it fills; `scratch` is an empty directory."""

    def __init__(self, data: BenchData, scratch: Path, files: contextlib.ExitStack) -> None:
        self._data = data
        self._out = scratch / "update.cow"
        self._files = files
        self.sheet = Sheet()
        self._parsed = {path.stem: self._open(path) for path in (data.shuffled, data.ascending)}
        self._images = list(self._make_images(scratch))

    def round(self) -> None:
        """Measure everything once."""
        for order in PARSE_SECONDS:
            self._parse(order)
        for image in self._images:
            for threads in (1, THREADS):
                self._read(image, threads)
        for compress, xor in CREATE_RATES:
            self._create(compress, xor)

    def count(self) -> None:
        """Measure what is the same in every round."""
        for order, store in self._parsed.items():
            gc.collect()
            tracemalloc.start()
            cow = CowFile.parse(store)
            kept, peak = (count / OP_COUNT for count in tracemalloc.get_traced_memory())
            tracemalloc.stop()
            del cow
            self.sheet.add("parse: memory", Figure(f"{order}, kept", "B/op", at_most=40), kept)
            self.sheet.add("parse: memory", Figure(f"{order}, peak", "B/op", at_most=100), peak)
        for compress in ("zstd", "lz4"):
            with_xor, without = (self._update(compress, xor).cow_bytes for xor in ("same", "none"))
            figure = Figure(f"{compress} 64k, --xor same / none", "", at_most=XOR_SHARE)
            self.sheet.add("create: size of the COW", figure, with_xor / without)

    def _parse(self, order: str) -> None:
        begin = time.perf_counter()
        CowFile.parse(self._parsed[order])
        seconds = time.perf_counter() - begin
        reference = DAEMON_PARSE_SECONDS / DAEMON_OPS * OP_COUNT
        figure = Figure(order, "s", at_most=PARSE_SECONDS[order], reference=reference)
        self.sheet.add("parse: a million ops", figure, seconds)

    def _read(self, image: Image, threads: int) -> None:
        kind = image.compress, image.unit_kib
        figure = Figure(
            f"{image.compress} {image.unit_kib}k{', digests' * image.digests}, {threads} thread{'s' * (threads > 1)}",
            "MB/s",
            at_least=READ_RATES[kind] if image.unit_kib == 64 or threads == THREADS else None,
            reference=DAEMON_OPS * BLOCK_BYTES / DAEMON_MERGE_SECONDS[kind] / MB,
        )
        self.sheet.add("read: the whole image", figure, image.read(threads))

    def _create(self, compress: str, xor: str) -> None:
        created = self._update(compress, xor)
        name = f"{compress} 64k, --xor {xor}"
        reference = IMAGE_BYTES / DIFF_SECONDS[compress] / MB
        figure = Figure(name, "MB/s", at_least=CREATE_RATES[compress, xor], reference=reference)
        self.sheet.add("create: two images of 768 MiB", figure, IMAGE_BYTES / created.seconds / MB)
        figure = Figure(name, "MB", at_most=CREATE_PEAK_MB, reference=DIFF_PEAK_MB[compress])
        self.sheet.add("create: peak memory", figure, created.peak_mb)

    def _update(self, compress: str, xor: str) -> Created:
        return create(self._data.old, self._data.new, self._out, compress=compress, unit_kib=64, xor=xor)

    def _make_images(self, scratch: Path) -> Iterator[Image]:
        base = self._open(self._data.nothing)
        for compress, unit_kib in READ_RATES:
            path = scratch / f"{compress}{unit_kib}.cow"
            create(self._data.nothing, self._data.content, path, compress=compress, unit_kib=unit_kib, xor="none")
            store = self._open(path)
            cow = CowFile.parse(store)
            for digests in (None, load_digests(path, cow)):
                extent_map = cow.extent_map(base.size(), self._data.content.stat().st_size, digests=digests)
                yield Image(compress, unit_kib, digests is not None, extent_map, store, base)

    def _open(self, path: Path) -> FileStore:
        return FileStore(self._files.enter_context(open(path, "rb")).fileno(), str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure parsing, reading and creating COW files.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    data = BenchData()
    with tempfile.TemporaryDirectory(dir=data.directory) as scratch, contextlib.ExitStack() as files:
        bench = Bench(data, Path(scratch), files)
        data.warm()
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            bench.round()
        bench.count()
    bench.sheet.show()
    print(f"\n{len(os.sched_getaffinity(0))} CPUs; load average over the last minutes {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()

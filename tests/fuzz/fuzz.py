"""Puts hostile files through everything, by number: `fuzz.py REPORT CORPUS FIRST END`, as `test_fuzz` starts it.

A process of its own, so that what no Python code can catch is noticed too. Each file has so much time, and none may
make the address space grow beyond what honest ones need. The counts go to the file REPORT, and every number goes there
before it is tried.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

from cases import make_case
from corpus import own_seeds, regressions
from findings import Finding, Outcome, memory_file, require
from refseeds import reference_seeds
from target import check

from snapd.block.errors import SnapdError
from snapd.cow.parse.reader import CowFile

CPU_SECONDS = 10
"""For one file; the slowest take a tenth."""
GROWTH_BYTES = 64 << 20
"""For all files one after the other, none of them above 128 KiB; decoders have windows of 8 or 16 MiB."""
PARSE_FACTOR, PARSE_BYTES = 16, 1 << 20
"""A parse takes at most so many times the file's length, and so much more."""
_NET_BYTES = 2 << 30
_BY_PATH, _MEASURED = 8, 64
"""Every so many files are also tried by path, or have the memory of their parse measured."""
_MOST_FINDINGS = 10


def main(report: Path, corpus: str, first: int, end: int) -> None:
    """Try the files of the numbers [first, end), made of our own corpus or of the `reference`."""
    signal.signal(signal.SIGPROF, _out_of_time)
    began = time.monotonic()
    honest = reference_seeds() if corpus == "reference" else own_seeds()
    seeds = honest + regressions()
    outcome, findings = Outcome(), list[str]()
    with report.open("w") as file, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in honest:
            check(seed.raw, seed.digests, Random(0), folder)
        # What is here stays; so what one file leaves behind is collected quickly before the next is tried.
        gc.collect()
        gc.freeze()
        before = _address_space()
        resource.setrlimit(resource.RLIMIT_AS, (before + _NET_BYTES, before + _NET_BYTES))
        for number in range(first, end):
            os.pwrite(file.fileno(), b"%20d" % number, 0)
            case = make_case(number, seeds)
            gc.collect()
            try:
                with _limits(before):
                    outcome += check(case.raw, case.digests, Random(number), folder if number % _BY_PATH == 0 else None)
                if number % _MEASURED == 0:
                    check_parse_memory(case.raw)
            # Whatever it is, it is what we are looking for.
            except BaseException as error:  # noqa: BLE001
                findings.append(f"SNAPD_FUZZ_SEED={number} ({case.story})\n{_text(error)}")
                before = max(before, _address_space() - GROWTH_BYTES // 2)
                if len(findings) == _MOST_FINDINGS:
                    break
        grown = _address_space() - before
    result = {
        "seconds": time.monotonic() - began,
        "growth_bytes": grown,
        "outcome": [[*key, count] for key, count in sorted(outcome.items())],
        "findings": findings,
    }
    report.write_text(json.dumps(result))


@contextlib.contextmanager
def _limits(before: int) -> Iterator[None]:
    """A finding if what is done meanwhile takes too long, or takes the address space too far beyond `before`."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = _address_space() - before
    require(grown <= GROWTH_BYTES, f"the address space grew by {grown} bytes")


def check_parse_memory(raw: bytes, *, label: int | None = None, lenient: bool = False) -> None:
    """A finding if a parse needs more memory than it may."""
    store = memory_file(raw)
    tracemalloc.start()
    try:
        with contextlib.suppress(SnapdError):
            CowFile.parse(store, label=label, lenient=lenient)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        os.close(store.fd)
    require(peak <= PARSE_FACTOR * len(raw) + PARSE_BYTES, f"{peak} bytes to parse {len(raw)}")


def _address_space() -> int:
    """The most bytes of address space that this process has had."""
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(b"VmPeak:"))


def _out_of_time(_signal: int, _frame: FrameType | None) -> None:
    raise Finding(f"more than {CPU_SECONDS} s of processor time")


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]))

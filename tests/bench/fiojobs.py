"""Reads by fio's nbd engine."""

import json
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

from devicedata import Region


@dataclass(frozen=True, slots=True)
class Job:
    """A kind of load: `pattern` is fio's `rw`. One that is not `timed` reads everything once."""

    name: str
    pattern: str
    block: str
    depth: int
    timed: bool = True


RANDOM_QD1 = Job("4k random QD1", "randread", "4k", 1)
RANDOM_QD32 = Job("4k random QD32", "randread", "4k", 32)
SEQUENTIAL = Job("128k sequential QD8", "read", "128k", 8)
SEQUENTIAL_ONCE = Job("128k sequential QD8", "read", "128k", 8, timed=False)
JOBS = (RANDOM_QD1, RANDOM_QD32, SEQUENTIAL)


class Load(NamedTuple):
    """A job on a part of an export, for so long."""

    job: Job
    region: Region
    seconds: float


class Reads(NamedTuple):
    """What a run of a job came to."""

    total: int
    iops: float


class Fio:
    """A load on the export at `uri`, begun at once; `result` waits for its end."""

    def __init__(self, uri: str, load: Load) -> None:
        job, region, seconds = load
        where = [f"--uri={uri}", f"--offset={region.offset_bytes}", f"--size={region.size_bytes}"]
        what = [f"--rw={job.pattern}", f"--bs={job.block}", f"--iodepth={job.depth}", "--norandommap", "--randrepeat=0"]
        timed = ["--time_based", f"--runtime={round(seconds * 1000)}ms"] if job.timed else []
        command = ["fio", "--name=read", "--ioengine=nbd", "--thread", "--output-format=json", *where, *what, *timed]
        self._fio = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def result(self) -> Reads:
        """What came of it; CalledProcessError when a read failed."""
        printed, _ = self._fio.communicate()
        if self._fio.returncode:
            raise subprocess.CalledProcessError(self._fio.returncode, self._fio.args, printed)
        # fio prints notes of its own before the JSON.
        reads = json.loads(printed[printed.index("{") :])["jobs"][0]["read"]
        return Reads(int(reads["total_ios"]), float(reads["iops"]))

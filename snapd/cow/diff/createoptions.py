"""What can be asked of a creation, checked once."""

import errno
import os
from dataclasses import dataclass, field

from snapd.block.errors import SnapdError
from snapd.cow.compress import CompressOption
from snapd.cow.diff.xormode import XorMode
from snapd.cow.format import BLOCK_SIZE, MIN_UNIT, Compression
from snapd.cow.write.writeroptions import WriterOptions

MAX_JOBS = 64
_DEFAULT_UNIT = 64 << 10


def usable_cpus() -> int:
    """The CPUs that this process may use, at most `MAX_JOBS`."""
    return min(len(os.sched_getaffinity(0)), MAX_JOBS)


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """How to make a COW; `jobs` is the number of threads, which the result does not depend on.

    `unit` is the most bytes that one compressed unit covers; 0 means 64 KiB, or one block in version 2, which has no
    larger ones (COW-223). Errors: EINVAL for a version, unit or number of jobs that there is not.
    """

    compression: CompressOption = field(default_factory=lambda: CompressOption.parse("zstd"))
    unit: int = 0
    version: int = 3
    xor: XorMode = XorMode.SAME
    jobs: int = field(default_factory=usable_cpus)

    def __post_init__(self) -> None:
        if not self.unit:
            object.__setattr__(self, "unit", MIN_UNIT if self.version < 3 else _DEFAULT_UNIT)
        if not 1 <= self.jobs <= MAX_JOBS:
            raise SnapdError(errno.EINVAL, f"{self.jobs} jobs: expected 1 to {MAX_JOBS}")
        self.writer_options(target_blocks=1)

    def writer_options(self, target_blocks: int) -> WriterOptions:
        """How to write the file: with a slot for every target block (COW-16)."""
        return WriterOptions(
            version=self.version,
            compression=self.compression,
            unit=self.unit,
            max_blocks=target_blocks,
            op_count_max=target_blocks,
        )

    @property
    def unit_blocks(self) -> int:
        """The most blocks of one replace op."""
        return self.unit // BLOCK_SIZE

    @property
    def has_xor(self) -> bool:
        """Whether XOR ops can be worth anything: uncompressed, a difference is as long as what it differs from."""
        return self.xor is not XorMode.NONE and self.compression.algorithm is not Compression.NONE

"""What can be asked of a writer, checked once; and how runs of blocks are cut into units."""

import errno
from dataclasses import dataclass, field

from snapd.block.errors import SnapdError
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.errors import CowError
from snapd.cow.format import (
    BLOCK_SIZE,
    DEFAULT_CLUSTER_OPS,
    MAX_OP_COUNT,
    MAX_UNIT,
    MAX_UNIT_BLOCKS,
    MIN_UNIT,
    Compression,
)

_MAX_BLOCK_SIZE = 65535

MAX_CLUSTER_OPS = 1 << 16


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How to write a file (section 12). Errors: EINVAL for what no file can be.

    `unit` is the most bytes that one replace op covers; version 2 has no choice (COW-223). `cluster_ops` is the cluster
    size in version 2, 0 for none; in version 3 the blocks of a batch, which no unit crosses (COW-113). `op_count_max`
    is the number of op slots of version 3, 0 for one for each of the `max_blocks` target blocks. A request for version
    1 gives a version 2 file (COW-3). The file does not depend on `threads`, which compress.
    """

    version: int = 3
    compression: CompressOption = field(default_factory=lambda: CompressOption(Compression.NONE, 0))
    block_size: int = BLOCK_SIZE
    unit: int = MIN_UNIT
    max_blocks: int | None = None
    cluster_ops: int = DEFAULT_CLUSTER_OPS
    scratch: bool = True
    op_count_max: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.version not in (1, 2, 3):
            raise _bad(f"version {self.version}: files are written in version 2 or 3", "COW-3")
        object.__setattr__(self, "version", max(self.version, 2))
        size = self.block_size
        if not 512 <= size <= _MAX_BLOCK_SIZE or size & (size - 1):
            raise _bad(f"block size {size} is not a power of two from 512 to 32768", "COW-4")
        # The slots that a cluster leaves free are written as zeros: no header may ask for more than a little of that.
        if not 0 <= self.cluster_ops <= MAX_CLUSTER_OPS:
            raise _bad(f"clusters of {self.cluster_ops} ops: written are at most {MAX_CLUSTER_OPS}", "V9")
        if self.threads < 1:
            raise SnapdError(errno.EINVAL, f"{self.threads} threads: at least one has to compress")
        if self.version == 3:
            self._check_v3()
        elif self.unit != MIN_UNIT:
            raise _bad(f"unit of {self.unit} bytes: version 2 has one block an op", "COW-223")
        elif self.cluster_ops == 1:
            raise _bad("clusters of one op have no room for an op", "V9")
        # A level is checked by whoever uses it; here, so that it fails before anything is written (COW-101).
        self.encoder()

    def _check_v3(self) -> None:
        check_unit_size(self.unit)
        if self.unit < self.block_size:
            raise _bad(f"unit of {self.unit} bytes: blocks have {self.block_size}", "V23")
        if not 0 <= self.op_count_max <= MAX_OP_COUNT:
            raise _bad(f"{self.op_count_max} op slots: a file holds at most {MAX_OP_COUNT}", "COW-49")

    @property
    def unit_blocks(self) -> int:
        """The most blocks of one replace op."""
        return min(self.unit // self.block_size, MAX_UNIT_BLOCKS) if self.version == 3 else 1

    def encoder(self) -> Encoder:
        """A new encoder of this file's payloads, for one thread."""
        max_unit = self.unit if self.version == 3 else self.block_size
        return Encoder(self.compression, version=self.version, max_unit=max_unit)

    def cut(self, blocks: int) -> list[int]:
        """The units, in blocks, that one call's run of raw blocks becomes: batch by batch, from its start (COW-113)."""
        batch = max(self.cluster_ops, 1)
        whole = unit_lengths(batch, self.unit_blocks) if blocks >= batch else []
        return whole * (blocks // batch) + unit_lengths(blocks % batch, self.unit_blocks)


def check_unit_size(unit: int) -> None:
    """EINVAL unless `unit` is a legal largest replace unit in bytes (COW-112)."""
    if not MIN_UNIT <= unit <= MAX_UNIT or unit & (unit - 1):
        raise _bad(f"unit of {unit} bytes: not a power of two from 4 to 256 KiB", "COW-112")


def unit_lengths(blocks: int, unit_blocks: int) -> list[int]:
    """How a run of `blocks` is cut into units: the largest power of two that fits, again and again (COW-113)."""
    lengths = [unit_blocks] * (blocks // unit_blocks)
    rest = blocks % unit_blocks
    while rest:
        lengths.append(1 << (rest.bit_length() - 1))
        rest -= lengths[-1]
    return lengths


def _bad(message: str, statement: str) -> CowError:
    return CowError(message, statement=statement, number=errno.EINVAL)

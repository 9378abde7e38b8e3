"""The COW v3 layout: header, op record, regions (COW-1 to COW-49).

All integers are little-endian, nothing is padded or aligned (COW-1). This module is the only one that knows
where a byte lies.
"""

import errno
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from snapd.cow.errors import CowError

MAGIC = 0x436F77634F572121
BLOCK_SIZE = 4096
HEADER_SIZE = 78
OP_SIZE = 16
RESUME_POINT_SIZE = 16
RESUME_POINT_MAX = 4
SCRATCH_SIZE = 2 << 20
MIN_UNIT = 4 << 10
MAX_UNIT = 256 << 10
MAX_UNIT_BLOCKS = 64
MAX_OP_COUNT = (1 << 32) - 1
SOURCE_BITS = 48
SOURCE_LIMIT = 1 << SOURCE_BITS
PROGRESS_OFFSET = 26
"""Where `num_merge_ops` lies, in every version (COW-146)."""

PREFIX = struct.Struct("<QHHH")
_HEADER = struct.Struct("<QHHHHHIIQIQIIQQII")
OP = struct.Struct("<IIQ")
PROGRESS = struct.Struct("<Q")


class OpType(IntEnum):
    """What an op does to its target blocks (section 6)."""

    COPY = 1
    REPLACE = 2
    ZERO = 3
    XOR = 6


# Looked up once a block read: calling the enum costs several times as much.
_OP_TYPES = {int(kind): kind for kind in OpType}
_SOURCE_MASK = SOURCE_LIMIT - 1


class Compression(IntEnum):
    """One algorithm a file (COW-12); the value is the header's code."""

    NONE = 0
    GZ = 1
    BROTLI = 2
    LZ4 = 3
    ZSTD = 4


@dataclass(frozen=True, slots=True)
class Header:
    """The v3 header (COW-12); sizes in bytes."""

    block_size: int = BLOCK_SIZE
    num_merge_ops: int = 0
    buffer_size: int = SCRATCH_SIZE
    sequence_data_count: int = 0
    resume_point_count: int = 0
    resume_point_max: int = RESUME_POINT_MAX
    op_count: int = 0
    op_count_max: int = 0
    compression: int = Compression.NONE
    max_compression_size: int = MIN_UNIT

    @property
    def ops_start(self) -> int:
        """Where the op region begins (COW-41)."""
        return HEADER_SIZE + self.buffer_size + 4 * self.sequence_data_count + RESUME_POINT_SIZE * self.resume_point_max

    @property
    def data_start(self) -> int:
        """Where the payloads begin: behind all op slots, used or not (COW-41, COW-45)."""
        return self.ops_start + OP_SIZE * self.op_count_max

    def with_ops(self, op_count: int) -> "Header":
        """The same file with another number of valid ops."""
        return replace(self, op_count=op_count)

    def pack(self) -> bytes:
        """The 78 bytes on disk."""
        return _HEADER.pack(
            MAGIC,
            3,
            0,
            HEADER_SIZE,
            0,
            OP_SIZE,
            self.block_size,
            0,
            self.num_merge_ops,
            self.buffer_size,
            self.sequence_data_count,
            self.resume_point_count,
            self.resume_point_max,
            self.op_count,
            self.op_count_max,
            self.compression,
            self.max_compression_size,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> "Header":
        """Parse and check the header; `raw` is the start of the file (rows V1 to V10, V21, V24, V29)."""
        if len(raw) < PREFIX.size:
            raise CowError(f"only {len(raw)} bytes long, too short for a COW header", statement="V1")
        magic, major, minor, header_size = PREFIX.unpack_from(raw)
        if magic != MAGIC:
            raise CowError(f"not a COW file: magic {magic:#018x}", statement="V2", offset=0)
        if major not in (1, 2, 3):
            raise CowError(f"unknown major version {major}", statement="V5", offset=8)
        if major != 3:
            raise CowError(
                f"version {major} is not supported, only version 3",
                statement="COW-3",
                offset=8,
                number=errno.EOPNOTSUPP,
            )
        if minor != 0:
            raise CowError(f"unknown minor version {minor}", statement="V6", offset=10)
        if header_size != HEADER_SIZE:
            raise CowError(f"header size {header_size}, not {HEADER_SIZE}", statement="V4", offset=12)
        if len(raw) < HEADER_SIZE:
            raise CowError(f"only {len(raw)} bytes long, the header has {HEADER_SIZE}", statement="V1")
        (_, _, _, _, footer_size, op_size, block_size, cluster_ops, *rest) = _HEADER.unpack_from(raw)
        if footer_size != 0:
            raise CowError(f"footer size {footer_size} in a version 3 file", statement="V7", offset=14)
        if op_size != OP_SIZE:
            raise CowError(f"op size {op_size}, not {OP_SIZE}", statement="V8", offset=16)
        if block_size < 512 or block_size & (block_size - 1):
            raise CowError(f"block size {block_size} is not a power of two from 512", statement="V10", offset=18)
        if cluster_ops != 0:
            raise CowError(f"cluster size {cluster_ops} in a version 3 file", statement="V9", offset=22)
        header = cls(block_size, *rest)
        if not header.op_count <= header.op_count_max <= MAX_OP_COUNT:
            raise CowError(f"{header.op_count} ops in {header.op_count_max} slots", statement="V21", offset=54)
        if header.compression not in Compression._value2member_map_:
            raise CowError(f"unknown compression {header.compression}", statement="V24", offset=70)
        unit = header.max_compression_size
        if not MIN_UNIT <= unit <= MAX_UNIT or unit & (unit - 1):
            raise CowError(f"unit size {unit} is not a power of two from 4 to 256 KiB", statement="V29", offset=74)
        return header


class Op(NamedTuple):
    """One op record (section 3.3): `blocks` target blocks from `new_block`.

    `source` is a source block (copy), the payload's byte offset in the COW (replace) or 0 (zero);
    `data_length` is the payload's bytes on disk.
    """

    type: OpType
    new_block: int
    blocks: int
    source: int
    data_length: int

    def pack(self) -> bytes:
        """The 16 bytes on disk; ERANGE for a field that does not fit (COW-21, COW-23)."""
        if self.new_block >> 32:
            raise CowError(
                f"target block {self.new_block} needs more than 32 bits", statement="COW-23", number=errno.ERANGE
            )
        if self.source >> SOURCE_BITS:
            raise CowError(f"source {self.source} needs more than 48 bits", statement="COW-23", number=errno.ERANGE)
        if not 1 <= self.blocks <= MAX_UNIT_BLOCKS or self.blocks & (self.blocks - 1):
            raise CowError(
                f"{self.blocks} blocks are no power of two up to {MAX_UNIT_BLOCKS}",
                statement="COW-21",
                number=errno.ERANGE,
            )
        factor = self.blocks.bit_length() - 1
        return OP.pack(self.data_length, self.new_block, self.type << 60 | factor << 57 | self.source)

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview, offset: int) -> "Op":
        """The record at `offset` of `raw`, which `reader` has checked before."""
        data_length, new_block, info = OP.unpack_from(raw, offset)
        return cls(_OP_TYPES[info >> 60], new_block, 1 << (info >> 57 & 7), info & _SOURCE_MASK, data_length)

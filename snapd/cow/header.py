"""The header of a COW file, versions 1 to 3 (COW-10 to COW-16), and where it puts the regions of version 3."""

from dataclasses import dataclass, replace

from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import (
    BLOCK_SIZE,
    FOOTER_SIZE,
    HEADER_SIZES,
    HEADER_V1,
    HEADER_V2,
    HEADER_V3,
    MAGIC,
    MAX_BLOCK_SIZE,
    MAX_OP_COUNT,
    MAX_UNIT,
    MIN_UNIT,
    OP_SIZE_V2,
    OP_SIZE_V3,
    PREFIX,
    RESUME_POINT_MAX,
    RESUME_POINT_SIZE,
    SCRATCH_SIZE,
    Compression,
)

MAX_HEADER_SIZE = HEADER_SIZES[3]


@dataclass(frozen=True, slots=True)
class Header:
    """The header (COW-11, COW-12); sizes in bytes. Fields from `sequence_data_count` on exist in version 3 only.

    Versions 1 and 2 do not store the compression: the reader puts in what the ops say (COW-18).
    """

    version: int = 3
    block_size: int = BLOCK_SIZE
    cluster_ops: int = 0
    num_merge_ops: int = 0
    buffer_size: int = SCRATCH_SIZE
    sequence_data_count: int = 0
    resume_point_count: int = 0
    resume_point_max: int = RESUME_POINT_MAX
    op_count: int = 0
    op_count_max: int = 0
    compression: int = Compression.NONE
    max_compression_size: int = MIN_UNIT
    odd_size: int = 0
    """The header size that a file states where it is not the one of its version (V4); else 0."""

    @property
    def size(self) -> int:
        """Bytes of the header itself."""
        return self.odd_size or HEADER_SIZES[self.version]

    @property
    def sequence_start(self) -> int:
        """Where the scratch space ends: the first record (versions 1, 2) or the sequence (version 3) begins."""
        return self.size + self.buffer_size

    @property
    def resume_start(self) -> int:
        """Where the resume points of version 3 begin (COW-41)."""
        return self.sequence_start + 4 * self.sequence_data_count

    @property
    def ops_start(self) -> int:
        """Where the op region of version 3 begins (COW-41)."""
        return self.resume_start + RESUME_POINT_SIZE * self.resume_point_max

    @property
    def data_start(self) -> int:
        """Where the payloads of version 3 begin: behind all op slots, used or not (COW-41, COW-45)."""
        return self.ops_start + OP_SIZE_V3 * self.op_count_max

    @property
    def max_unit(self) -> int:
        """The most bytes one op of this file covers."""
        return self.max_compression_size if self.version == 3 else self.block_size

    def with_ops(self, op_count: int) -> "Header":
        """The same version 3 file with another number of valid ops."""
        return replace(self, op_count=op_count)

    def pack(self) -> bytes:
        """The bytes on disk."""
        if self.version < 3:
            fields = (
                *(MAGIC, self.version, 0, self.size, FOOTER_SIZE, OP_SIZE_V2),
                *(self.block_size, self.cluster_ops, self.num_merge_ops),
            )
            return HEADER_V1.pack(*fields) if self.version == 1 else HEADER_V2.pack(*fields, self.buffer_size)
        return HEADER_V3.pack(
            *(MAGIC, 3, 0, self.size, 0, OP_SIZE_V3),
            *(self.block_size, self.cluster_ops, self.num_merge_ops, self.buffer_size),
            *(self.sequence_data_count, self.resume_point_count, self.resume_point_max),
            *(self.op_count, self.op_count_max, self.compression, self.max_compression_size),
        )

    @classmethod
    def unpack(cls, raw: bytes, tolerance: Tolerance | None = None) -> "Header":
        """Parse and check the header; `raw` is the start of the file (rows V1 to V10, V21, V24, V29).

        With a `tolerance` a wrong header size is only noted (V4, COW-208): what is missing reads as 0 (COW-13).
        """
        if len(raw) < PREFIX.size:
            raise CowError(f"only {len(raw)} bytes long, too short for a COW header", statement="V1")
        magic, major, minor, header_size = PREFIX.unpack_from(raw)
        if magic != MAGIC:
            raise CowError(f"not a COW file: magic {magic:#018x}", statement="V2", offset=0)
        if header_size > MAX_HEADER_SIZE:
            raise CowError(f"header size {header_size}, at most {MAX_HEADER_SIZE}", statement="V3", offset=12)
        if major not in HEADER_SIZES:
            raise CowError(f"unknown major version {major}", statement="V5", offset=8)
        if minor != 0:
            raise CowError(f"unknown minor version {minor}", statement="V6", offset=10)
        if header_size != HEADER_SIZES[major]:
            error = CowError(f"header size {header_size}, not {HEADER_SIZES[major]}", statement="V4", offset=12)
            if tolerance is None or header_size < PREFIX.size:
                raise error
            tolerance.note(error)
        if len(raw) < header_size:
            raise CowError(f"only {len(raw)} bytes long, the header has {header_size}", statement="V1")
        fields = raw[:header_size].ljust(MAX_HEADER_SIZE, b"\0")
        header = cls._unpack_v3(fields) if major == 3 else cls._unpack_v2(fields, major)
        return header if header.size == header_size else replace(header, odd_size=header_size)

    @classmethod
    def _unpack_v2(cls, raw: bytes, version: int) -> "Header":
        (_, _, _, _, footer_size, op_size, block_size, cluster_ops, num_merge_ops, buffer) = HEADER_V2.unpack_from(raw)
        if footer_size != FOOTER_SIZE:
            raise CowError(f"footer size {footer_size}, not {FOOTER_SIZE}", statement="V7", offset=14)
        if op_size != OP_SIZE_V2:
            raise CowError(f"op size {op_size}, not {OP_SIZE_V2}", statement="V8", offset=16)
        _check_block_size(block_size)
        if cluster_ops == 1:
            raise CowError("clusters of one op have no room for an op", statement="V9", offset=22)
        # Whatever bytes stand there, version 1 has no scratch space (COW-14).
        return cls(
            version=version,
            block_size=block_size,
            cluster_ops=cluster_ops,
            num_merge_ops=num_merge_ops,
            buffer_size=buffer if version == 2 else 0,
            resume_point_max=0,
            max_compression_size=0,
        )

    @classmethod
    def _unpack_v3(cls, raw: bytes) -> "Header":
        (_, _, _, _, footer_size, op_size, block_size, cluster_ops, *rest) = HEADER_V3.unpack_from(raw)
        if footer_size != 0:
            raise CowError(f"footer size {footer_size} in a version 3 file", statement="V7", offset=14)
        if op_size != OP_SIZE_V3:
            raise CowError(f"op size {op_size}, not {OP_SIZE_V3}", statement="V8", offset=16)
        _check_block_size(block_size)
        if cluster_ops != 0:
            raise CowError(f"cluster size {cluster_ops} in a version 3 file", statement="V9", offset=22)
        header = cls(3, block_size, 0, *rest)
        if not header.op_count <= header.op_count_max <= MAX_OP_COUNT:
            raise CowError(f"{header.op_count} ops in {header.op_count_max} slots", statement="V21", offset=54)
        if header.compression not in Compression._value2member_map_:
            raise CowError(f"unknown compression {header.compression}", statement="V24", offset=70)
        unit = header.max_compression_size
        if not MIN_UNIT <= unit <= MAX_UNIT or unit & (unit - 1):
            raise CowError(f"unit size {unit} is not a power of two from 4 to 256 KiB", statement="V29", offset=74)
        return header


def _check_block_size(block_size: int) -> None:
    # More than 32 KiB no writer makes (COW-4), and a payload of a few bytes may stand for a block.
    if not 512 <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        message = f"block size {block_size} is not a power of two from 512 to {MAX_BLOCK_SIZE}"
        raise CowError(message, statement="V10", offset=18)

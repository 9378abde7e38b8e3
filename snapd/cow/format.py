"""The constants of the COW layout, all versions (COW-1 to COW-9).

All integers are little-endian, nothing is padded or aligned (COW-1).
"""

import struct
from enum import IntEnum

MAGIC = 0x436F77634F572121
BLOCK_SIZE = 4096
MAX_BLOCK_SIZE = 32 << 10
HEADER_SIZES = {1: 34, 2: 38, 3: 78}
OP_SIZE_V2 = 20
OP_SIZE_V3 = 16
FOOTER_DATA_SIZE = 64
FOOTER_SIZE = OP_SIZE_V2 + FOOTER_DATA_SIZE
RESUME_POINT_SIZE = 16
RESUME_POINT_MAX = 4
SCRATCH_SIZE = 2 << 20
DEFAULT_CLUSTER_OPS = 1024
MIN_UNIT = 4 << 10
MAX_UNIT = 256 << 10
MAX_UNIT_BLOCKS = 64
MAX_OP_COUNT = (1 << 32) - 1
SOURCE_BITS = 48
SOURCE_LIMIT = 1 << SOURCE_BITS
PROGRESS_OFFSET = 26
"""Where `num_merge_ops` lies, in every version (COW-146)."""
SCRATCH_DONE = 2
"""The read-ahead state byte of a window that is durable in the scratch space (section 1.2)."""

PREFIX = struct.Struct("<QHHH")
HEADER_V1 = struct.Struct("<QHHHHHIIQ")
HEADER_V2 = struct.Struct("<QHHHHHIIQI")
HEADER_V3 = struct.Struct("<QHHHHHIIQIQIIQQII")
OP_V2 = struct.Struct("<BBHQQ")
OP_V3 = struct.Struct("<IIQ")
RESUME_POINT = struct.Struct("<QQ")
PROGRESS = struct.Struct("<Q")


class OpType(IntEnum):
    """What an op does; the first four map target blocks, the others are metadata of versions 1 and 2 (COW-8)."""

    COPY = 1
    REPLACE = 2
    ZERO = 3
    XOR = 6
    LABEL = 4
    CLUSTER = 5
    SEQUENCE = 7
    FOOTER = 255


DATA_TYPES = (OpType.COPY, OpType.REPLACE, OpType.ZERO, OpType.XOR)


class Compression(IntEnum):
    """One algorithm a file (COW-12, COW-18); the value is the code on disk."""

    NONE = 0
    GZ = 1
    BROTLI = 2
    LZ4 = 3
    ZSTD = 4

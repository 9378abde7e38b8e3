"""COW v3 files byte by byte, from the layout's tables alone: the code under test has no part in making them."""

import struct
from random import Random

from snapd.block.simdisk import SimDisk, SimStore

HEADER = struct.Struct("<QHHHHHIIQIQIIQQII")
FIELDS = [
    "magic",
    "major",
    "minor",
    "header_size",
    "footer_size",
    "op_size",
    "block_size",
    "cluster_ops",
    "num_merge_ops",
    "buffer_size",
    "sequence_data_count",
    "resume_point_count",
    "resume_point_max",
    "op_count",
    "op_count_max",
    "compression",
    "max_compression_size",
]
COPY, REPLACE, ZERO, XOR = 1, 2, 3, 6
RawOp = tuple[int, int, int]
"""(data_length, new_block, source_info)."""


def op(kind: int, new_block: int, source: int = 0, data_length: int = 0, exponent: int = 0, reserved: int = 0) -> RawOp:
    """One record's three fields."""
    return data_length, new_block, kind << 60 | exponent << 57 | reserved << 48 | source


def header(**changed: int) -> bytes:
    """A header without ops and scratch, some fields changed."""
    values = dict.fromkeys(FIELDS, 0) | {
        "magic": 0x436F77634F572121,
        "major": 3,
        "header_size": 78,
        "op_size": 16,
        "block_size": 4096,
        "resume_point_max": 4,
        "max_compression_size": 65536,
    }
    return HEADER.pack(*(values | changed).values())


def raw_cow(ops: list[RawOp], data: bytes = b"", sequence: tuple[int, ...] = (), **changed: int) -> bytes:
    """A whole file: header, scratch of zeros, sequence, resume points, ops and data."""
    fields = {"op_count": len(ops), "op_count_max": len(ops), "sequence_data_count": len(sequence)} | changed
    head = header(**fields)
    scratch = bytes(fields.get("buffer_size", 0))
    records = b"".join(struct.pack("<IIQ", *record) for record in ops)
    return head + scratch + struct.pack(f"<{len(sequence)}I", *sequence) + bytes(64) + records + data


def data_start(op_slots: int, sequence: int = 0) -> int:
    """Where the payloads begin in a file without scratch."""
    return 78 + 4 * sequence + 64 + 16 * op_slots


def store(content: bytes) -> SimStore:
    """The bytes as a store."""
    return SimDisk(Random(0)).store("cow", content)

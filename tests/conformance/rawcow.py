"""COW files byte by byte, from the layout's tables alone: the code under test has no part in making them."""

import struct
from random import Random
from typing import NamedTuple

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
COPY, REPLACE, ZERO, LABEL, CLUSTER, XOR, SEQUENCE, FOOTER = 1, 2, 3, 4, 5, 6, 7, 255
NONE, GZ, BROTLI, LZ4, ZSTD = range(5)
RawOp = tuple[int, int, int]
"""(data_length, new_block, source_info)."""


def op(kind: int, new_block: int, source: int = 0, data_length: int = 0, exponent: int = 0, reserved: int = 0) -> RawOp:
    """One version 3 record's three fields."""
    return data_length, new_block, kind << 60 | exponent << 57 | reserved << 48 | source


def header(**changed: int) -> bytes:
    """A version 3 header without ops and scratch, some fields changed."""
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


def raw_cow(
    ops: list[RawOp],
    data: bytes = b"",
    sequence: tuple[int, ...] = (),
    points: tuple[tuple[int, int], ...] = (),
    **changed: int,
) -> bytes:
    """A whole version 3 file: header, scratch of zeros, sequence, four resume points, ops and data."""
    fields = {
        "op_count": len(ops),
        "op_count_max": len(ops),
        "sequence_data_count": len(sequence),
        "resume_point_count": len(points),
    } | changed
    head = header(**fields)
    scratch = bytes(fields.get("buffer_size", 0))
    resume = b"".join(struct.pack("<QQ", *point) for point in points).ljust(64, b"\0")
    records = b"".join(struct.pack("<IIQ", *record) for record in ops)
    unused = bytes(16 * (max(fields["op_count_max"], len(ops)) - len(ops))) if data else b""
    return head + scratch + struct.pack(f"<{len(sequence)}I", *sequence) + resume + records + unused + data


def data_start(op_slots: int, sequence: int = 0) -> int:
    """Where the payloads of version 3 begin in a file without scratch."""
    return 78 + 4 * sequence + 64 + 16 * op_slots


class Rec(NamedTuple):
    """A version 1 or 2 record and its payload; what is None follows from the layout."""

    kind: int
    new_block: int = 0
    source: int | None = None
    payload: bytes = b""
    code: int | None = None
    data_length: int | None = None


class RawStream(NamedTuple):
    """A version 1 or 2 file, and where in it the given records, their payloads and what was added begin."""

    raw: bytes
    records: list[int]
    payloads: list[int]
    clusters: list[int]
    footer: int


def stream_header(version: int, **changed: int) -> bytes:
    """A version 1 or 2 header without scratch, some fields changed."""
    values = dict.fromkeys(FIELDS[:10], 0) | {
        "magic": 0x436F77634F572121,
        "major": version,
        "header_size": 34 if version == 1 else 38,
        "footer_size": 84,
        "op_size": 20,
        "block_size": 4096,
    }
    fields = list((values | changed).values())
    return struct.pack("<QHHHHHIIQI", *fields)[: 34 if version == 1 else 38]


def raw_stream(
    records: list[Rec],
    version: int = 2,
    *,
    cluster_ops: int = 0,
    compression: int = NONE,
    finish: bool = True,
    **changed: int,
) -> RawStream:
    """A whole version 1 or 2 file; without `finish` it ends as it lies on disk before the footer is written.

    Records with a payload get the code of `compression`, replace and sequence records the offset of their payload.
    """
    head = stream_header(version, cluster_ops=cluster_ops, **changed)
    out = bytearray(head + bytes(changed.get("buffer_size", 0) if version == 2 else 0))
    offsets, payloads, clusters = list[int](), list[int](), list[int]()
    count, at = 0, 0
    while at < len(records) or not cluster_ops:
        taken = records[at : at + cluster_ops - 1] if cluster_ops else records
        start, data = len(out), bytearray()
        for slot, record in enumerate(taken):
            place = start + 20 * cluster_ops + len(data) if cluster_ops else len(out) + 20
            offsets.append(start + 20 * slot if cluster_ops else len(out))
            payloads.append(place)
            out += _packed(record, place, compression)
            if cluster_ops:
                data += record.payload
            else:
                out += record.payload
        at += len(taken)
        count += len(taken)
        if not cluster_ops:
            break
        if len(taken) == cluster_ops - 1 or (data and finish):
            unused = 20 * (cluster_ops - len(taken) - 1)
            clusters.append(len(out))
            out += struct.pack("<BBHQQ", CLUSTER, 0, 0, 0, len(data) + unused) + bytes(unused)
            count += 1
        elif data:
            out += bytes(20 * (cluster_ops - len(taken)))
        out += data
    footer = len(out)
    if finish:
        out += struct.pack("<BBHQQ", FOOTER, 0, 64, 20 * count, count) + bytes(64)
    return RawStream(bytes(out), offsets, payloads, clusters, footer)


def _packed(record: Rec, place: int, compression: int) -> bytes:
    kind, new_block, source, payload, code, length = record
    if source is None:
        source = place if kind in (REPLACE, SEQUENCE) else 0
    if code is None:
        code = compression if kind in (REPLACE, XOR) else NONE
    return struct.pack("<BBHQQ", kind, code, len(payload) if length is None else length, new_block, source)


def sequence_of(*blocks: int) -> Rec:
    """A sequence record that lists the blocks."""
    return Rec(SEQUENCE, payload=struct.pack(f"<{len(blocks)}I", *blocks))


def patched(raw: bytes, offset: int, content: bytes) -> bytes:
    """The file with other bytes at an offset."""
    return raw[:offset] + content + raw[offset + len(content) :]


def store(content: bytes) -> SimStore:
    """The bytes as a store."""
    return SimDisk(Random(0)).store("cow", content)

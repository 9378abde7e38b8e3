"""A second reader of COW files, written from the tables of the format alone: what the first one is compared with.

Plain loops over plain bytes. Every rule of the validation table is here too, so that both readers must agree on what is
refused, not only on what is served.
"""

import struct
from itertools import pairwise

from model import (
    BROTLI,
    CLUSTER,
    COPY,
    FOOTER,
    GZ,
    LABEL,
    LZ4,
    NONE,
    REPLACE,
    SEQUENCE,
    XOR,
    ZERO,
    ZSTD,
    Op,
    Reading,
)

_HEADER_SIZE = {1: 34, 2: 38, 3: 78}


class Refused(Exception):
    """The file breaks a rule."""


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise Refused(rule)


def read(data: bytes, *, label: int | None = None, lenient: bool = False) -> Reading:
    """Everything a file says, up to a label; `Refused` where it breaks a rule (section 9, "Ours")."""
    _need(len(data) >= 14, "V1")
    magic, major, minor, header_size = struct.unpack_from("<QHHH", data)
    _need(magic == 0x436F77634F572121, "V2")
    _need(header_size <= 78, "V3")
    _need(major in _HEADER_SIZE, "V5")
    _need(minor == 0, "V6")
    _need(header_size == _HEADER_SIZE[major] or (lenient and header_size >= 14), "V4")
    _need(len(data) >= header_size, "V1")
    head = data[:header_size].ljust(78, b"\0")
    footer_size, op_size, block_size, cluster_ops, merged = struct.unpack_from("<HHIIQ", head, 14)
    (scratch,) = struct.unpack_from("<I", head, 34)
    if major == 1:
        scratch = 0
    _need(footer_size == (0 if major == 3 else 84), "V7")
    _need(op_size == (16 if major == 3 else 20), "V8")
    _need(cluster_ops == 0 if major == 3 else cluster_ops != 1, "V9")
    _need(block_size in [512 << n for n in range(7)], "V10")
    start = header_size + scratch
    _need(start <= len(data), "V11")
    reading = Reading(data, major, block_size, header_size=header_size, merged_ops=merged)
    reading.tolerated = header_size != _HEADER_SIZE[major]
    if major == 3:
        _read_regions(reading, head, start, label, lenient)
    else:
        _read_stream(reading, cluster_ops, start, label, lenient)
    _check_ops(reading, lenient)
    _need(len(set(reading.sequence)) == len(reading.sequence), "COW-67")
    whole = label is None
    if whole:
        _need(set(reading.sequence) <= {op.block for op in reading.ops}, "V19")
        reading.op_total = reading.op_total if major == 3 else len(reading.ops)
    _need(reading.op_total is None or merged <= reading.op_total, "V25")
    reading.window_done = scratch > 0 and data[header_size] == 2
    return reading


def _read_regions(reading: Reading, head: bytes, start: int, label: int | None, lenient: bool) -> None:
    data = reading.data
    listed, point_count, point_max, op_count, op_max = struct.unpack_from("<QIIQQ", head, 38)
    compression, unit = struct.unpack_from("<II", head, 70)
    _need(op_count <= op_max < 1 << 32, "V21")
    _need(compression <= ZSTD, "V24")
    _need(unit in [4096 << n for n in range(7)], "V29")
    reading.compression, reading.unit, reading.op_total = compression, unit, op_count
    points_at = start + 4 * listed
    ops_at = points_at + 16 * point_max
    _need(points_at <= len(data), "V11")
    reading.sequence = list(struct.unpack_from(f"<{listed}I", data, start))
    points = []
    highest, most = -1, -1
    for slot in range(min(point_count, point_max)):
        if points_at + 16 * slot + 16 > len(data):
            break
        name, before = struct.unpack_from("<QQ", data, points_at + 16 * slot)
        if name > highest:
            highest = name
            if before < most:
                break
            if before <= op_count:
                most = before
            points.append((name, before))
            reading.tolerated |= lenient and before > op_count
    reading.names = [name for name, _ in points]
    count = op_count
    if label is not None:
        asked = [before for name, before in points if name == label]
        _need(bool(asked), "V15")
        _need(asked[0] <= op_count or lenient, "V32")
        count = min(asked[0], op_count)
    last = (1 << 64) - 1 if label is None else label
    reading.labels = [(name, before) for name, before in points if before <= op_count and name <= last]
    _need(not count or ops_at + 16 * count <= len(data), "V11")
    payload = ops_at + 16 * op_max
    for index in range(count):
        length, block, info = struct.unpack_from("<IIQ", data, ops_at + 16 * index)
        reading.ops.append(Op(info >> 60, block, 1 << (info >> 57 & 7), info & (1 << 48) - 1, length, payload, info))
        payload += length


def _read_stream(reading: Reading, cluster_ops: int, start: int, label: int | None, lenient: bool) -> None:
    data = reading.data
    reading.unit = reading.block_size
    op_at, data_at = start, start + 20 * max(cluster_ops, 1)
    used = records = 0
    codes: set[int] = set()
    data_ops_seen = False
    while True:
        _need(not cluster_ops or used < cluster_ops, "COW-28")
        _need(op_at + 20 <= len(data), "V12")
        kind, code, length, block, source = struct.unpack_from("<BBHQQ", data, op_at)
        if kind == FOOTER:
            _need(op_at + 84 <= len(data), "V13")
            _need((block, source) == (20 * records, records), "V14")
            _need(label is None, "V15")
            break
        records += 1
        used += 1
        _need(kind in (COPY, REPLACE, ZERO, LABEL, CLUSTER, XOR, SEQUENCE), "V22")
        _need(block < 1 << 32 and (source < 1 << 48 or kind == LABEL), "V16")
        codes.add(code)
        if kind == CLUSTER:
            _need(cluster_ops > 0, "V22")
            _need(length == 0 and op_at + 20 + source == data_at <= len(data), "V26")
            op_at, data_at, used = data_at, data_at + 20 * cluster_ops, 0
            continue
        if kind == LABEL:
            reading.labels.append((source, len(reading.ops)))
            reading.names.append(source)
            data_ops_seen = True
            if source == label:
                break
        elif kind == SEQUENCE:
            _need(cluster_ops > 0 and not data_ops_seen, "COW-58")
            _need(length % 4 == 0 and source == data_at and data_at + length <= len(data), "COW-37")
            reading.sequence += struct.unpack_from(f"<{length // 4}I", data, data_at)
        else:
            reading.ops.append(Op(kind, block, 1, source, length, data_at, kind << 60 | source))
            data_ops_seen = True
        if cluster_ops:
            op_at, data_at = op_at + 20, data_at + length
        else:
            op_at, data_at = op_at + 20 + (length if kind in (REPLACE, XOR) else 0), data_at + 20 + length
    codes.discard(0)
    _need(len(codes) <= 1 and codes <= {GZ, BROTLI, LZ4, ZSTD}, "V17")
    reading.compression = codes.pop() if codes else NONE
    if lenient:
        for op in reading.ops:
            if op.kind == REPLACE and op.payload != op.source:
                op.payload, reading.tolerated = op.source, True


def _check_ops(reading: Reading, lenient: bool) -> None:
    size = reading.block_size
    for op in reading.ops:
        _need(op.kind in (COPY, REPLACE, ZERO, XOR), "V22")
        plain = not op.info >> 48 & 0x1FF
        if op.kind == REPLACE:
            _need(op.blocks <= 64 and op.blocks * size <= reading.unit, "V23")
            _need(op.source == op.payload, "V18")
        else:
            _need(op.blocks == 1, "V23")
        if op.kind in (REPLACE, XOR):
            _need(op.length > 0, "COW-109")
            _need(reading.compression != NONE or op.length == op.blocks * size, "COW-107")
            _need(reading.version < 3 or op.length <= op.blocks * size, "COW-109")
            _need(op.payload >= reading.header_size and op.payload + op.length <= len(reading.data), "V20")
        else:
            plain &= op.length == 0 and (op.kind == COPY or op.source == 0)
        _need(op.block + op.blocks <= 1 << 32, "V16")
        _need(plain or lenient, "V28")
        reading.tolerated |= not plain
    spans = sorted((op.block, op.block + op.blocks) for op in reading.ops)
    apart = all(before[1] <= after[0] for before, after in pairwise(spans))
    _need(apart or lenient, "V27")
    reading.tolerated |= not apart

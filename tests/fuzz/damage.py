"""Damage of bytes: whatever was a COW file, or anything else, with some bytes other than they were.

Every damage takes chance, the bytes to change, and another file of the corpus to take from.
"""

import struct
from collections.abc import Callable
from random import Random

from rawcow import CLUSTER, REPLACE, XOR
from redraft import KINDS

_HEADER_FIELDS = (
    *((0, 8), (8, 2), (10, 2), (12, 2), (14, 2), (16, 2), (18, 4), (22, 4), (26, 8), (34, 4)),
    *((38, 8), (46, 4), (50, 4), (54, 8), (62, 8), (70, 4), (74, 4)),
)
_V2_FIELDS = ((0, 1), (1, 1), (2, 2), (4, 8), (12, 8))
_V3_FIELDS = ((0, 4), (4, 4), (8, 8), (8, 6), (14, 1), (15, 1))


def flip_bits(random: Random, raw: bytearray, _other: bytes) -> None:
    for _ in range(random.choice((1, 1, 2, 8))):
        if raw:
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)


def _flip_early_bits(random: Random, raw: bytearray, _other: bytes) -> None:
    """Where headers and records are."""
    for _ in range(random.choice((1, 1, 2))):
        if raw:
            raw[random.randrange(min(len(raw), 400))] ^= 1 << random.randrange(8)


def _interesting(random: Random, width: int, size: int) -> bytes:
    top = 1 << 8 * width
    values = (0, 1, 2, 3, 5, 7, 20, 255, 512, 4096, size, size - 1, size + 1, top // 2, top - 1, top - 2, top - 20)
    return (random.choice(values) % top).to_bytes(width, "little")


def _put(raw: bytearray, at: int, value: bytes | bytearray) -> None:
    raw[at : at + len(value)] = value[: max(0, len(raw) - at)]


def overwrite_word(random: Random, raw: bytearray, _other: bytes) -> None:
    width = random.choice((1, 2, 4, 8))
    _put(raw, random.randrange(len(raw) + 1), _interesting(random, width, len(raw)))


def _overwrite_header(random: Random, raw: bytearray, _other: bytes) -> None:
    at, width = random.choice(_HEADER_FIELDS)
    value = _interesting(random, width, len(raw))
    # Half of all header fields are refused at anything but one value: others are met more often by small changes.
    if random.random() < 0.5 and len(raw) >= at + width:
        number = int.from_bytes(raw[at : at + width], "little") + random.choice((-1, 1, 2))
        value = (number % (1 << 8 * width)).to_bytes(width, "little")
    _put(raw, at, value)


def _records(raw: bytearray) -> tuple[list[int], int]:
    """Where records seem to lie, and how long they are."""
    if len(raw) < 78:
        return [], 20
    (version,) = struct.unpack_from("<H", raw, 8)
    clusters, _, scratch, sequence, _, points, count = struct.unpack_from("<IQIQIIQ", raw, 22)
    if version == 3:
        start = 78 + scratch + 4 * sequence + 16 * points
        return [start + 16 * index for index in range(min(count, 64)) if start + 16 * index + 16 <= len(raw)], 16
    at = (34 if version == 1 else 38) + (scratch if version == 2 else 0)
    places: list[int] = []
    while at + 20 <= len(raw) and len(places) < 64:
        places.append(at)
        kind, _, length, _, source = struct.unpack_from("<BBHQQ", raw, at)
        jump = length if kind in (REPLACE, XOR) and not clusters else source if kind == CLUSTER else 0
        at += 20 + jump
    return places, 20


def _overwrite_record(random: Random, raw: bytearray, _other: bytes) -> None:
    places, size = _records(raw)
    if not places:
        return
    place = random.choice((*places, places[-1]))
    at, width = random.choice(_V3_FIELDS if size == 16 else _V2_FIELDS)
    value = _interesting(random, width, len(raw))
    if random.random() < 0.3:
        value = bytes([random.choice(KINDS)])
    _put(raw, place + at, value)


def _swap_records(random: Random, raw: bytearray, _other: bytes) -> None:
    places, size = _records(raw)
    if len(places) > 1:
        one, other = random.choice(places), random.choice(places)
        first, second = raw[one : one + size], raw[other : other + size]
        _put(raw, one, second)
        if random.random() < 0.6:
            _put(raw, other, first)


def cut_short(random: Random, raw: bytearray, _other: bytes) -> None:
    places, size = _records(raw)
    near = [max(0, place + random.choice((-1, 0, 1, size))) for place in places[-3:]]
    del raw[random.choice((random.randrange(len(raw) + 1), max(0, len(raw) - 1), max(0, len(raw) - 84), *near)) :]


def _extend(random: Random, raw: bytearray, other: bytes) -> None:
    raw += random.choice((bytes(random.randrange(200)), random.randbytes(40), other[:200], bytes(raw[-84:])))


def double_range(random: Random, raw: bytearray, _other: bytes) -> None:
    start = random.randrange(len(raw) + 1)
    length = random.choice((1, 4, 16, 20, 84, 200))
    raw[start:start] = raw[start : start + length]


def _remove_range(random: Random, raw: bytearray, _other: bytes) -> None:
    start = random.randrange(len(raw) + 1)
    del raw[start : start + random.choice((1, 4, 16, 20, 84, 200))]


def _splice(random: Random, raw: bytearray, other: bytes) -> None:
    cut, start = random.randrange(len(raw) + 1), random.randrange(len(other) + 1)
    raw[cut:] = other[random.choice((cut, start)) :]


DAMAGES: tuple[Callable[[Random, bytearray, bytes], None], ...] = (
    *(flip_bits, _flip_early_bits, overwrite_word, _overwrite_header, _overwrite_header, _overwrite_record),
    *(_overwrite_record, _swap_records, cut_short, _extend, double_range, _remove_range, _splice),
)

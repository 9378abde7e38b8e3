"""Changes of drafts: one thing is wrong or unusual, and the rest of the file is put together around it."""

import struct
from collections.abc import Callable
from random import Random

from corpus import BASE
from draft import Draft, DraftOp
from payloads import bombs, packed, unit
from rawcow import CLUSTER, COPY, FOOTER, LABEL, REPLACE, SEQUENCE, XOR, ZERO

KINDS = (0, COPY, REPLACE, ZERO, LABEL, CLUSTER, XOR, SEQUENCE, 8, 15, FOOTER)
_MOST_UNIT_BYTES = 64 << 10


def _op(random: Random, draft: Draft) -> DraftOp:
    if not draft.ops:
        draft.ops.append(DraftOp(ZERO, random.randrange(512), 0))
    return random.choice(draft.ops)


def _unit_bytes(draft: Draft, one: DraftOp) -> int:
    """What the op covers, as far as that is sensible."""
    return min(draft.block_size << min(one.exponent, 6), _MOST_UNIT_BYTES)


def _carrier(random: Random, draft: Draft) -> DraftOp:
    """An op with a payload."""
    carriers = [one for one in draft.ops if one.kind in (REPLACE, XOR)]
    return random.choice(carriers) if carriers else _op(random, draft)


def _change_kind(random: Random, draft: Draft) -> None:
    _op(random, draft).kind = random.choice(KINDS)


def _change_block(random: Random, draft: Draft) -> None:
    one, other = _op(random, draft), _op(random, draft)
    near = other.block + random.choice((-1, 0, 1, 2, 3))
    end = len(BASE) // max(draft.block_size, 1)
    one.block = max(0, random.choice((near, near, 0, end - 1, end, end + 1, (1 << 31), (1 << 32) - 1, 1 << 32)))


def _change_source(random: Random, draft: Draft) -> None:
    one = _op(random, draft)
    size, end = draft.block_size, len(BASE)
    copies = (0, end // size - 1, end // size, _op(random, draft).block, (1 << 48) - 1, 1 << 48)
    xors = (0, end - size, end - size + 1, size * 3, size * 3 + 1, (1 << 48) - size, (1 << 48) - 1)
    anywhere = (0, 1, 38, 78, 200, 4096, (1 << 48) - 1, 1 << 48, (1 << 64) - 1)
    one.source = random.choice({COPY: copies, XOR: xors}.get(one.kind, anywhere))


def _change_exponent(random: Random, draft: Draft) -> None:
    one = random.choice((_op, _carrier))(random, draft)
    one.exponent = random.randrange(8)


def _fit_exponent(random: Random, draft: Draft) -> None:
    """A larger unit whose payload is right."""
    one = _carrier(random, draft)
    one.exponent = random.randrange(7)
    one.payload = packed(draft.compression, unit(random, _unit_bytes(draft, one)), draft.version)


def _change_reserved(random: Random, draft: Draft) -> None:
    _op(random, draft).reserved = random.randrange(1, 512)


def _change_length(random: Random, draft: Draft) -> None:
    one = _op(random, draft)
    actual = len(one.payload)
    lengths = (0, 1, actual - 1, actual + 1, draft.block_size, 4 * draft.block_size, 0xFFFF, (1 << 32) - 1)
    one.length = max(0, random.choice(lengths))


def _change_code(random: Random, draft: Draft) -> None:
    _op(random, draft).code = random.choice((0, 1, 2, 3, 4, 5, 255))


def _drop_op(random: Random, draft: Draft) -> None:
    draft.ops.remove(_op(random, draft))


def _double_op(random: Random, draft: Draft) -> None:
    draft.ops.insert(random.randrange(len(draft.ops) + 1), _op(random, draft))


def _swap_ops(random: Random, draft: Draft) -> None:
    _op(random, draft)
    one, other = random.randrange(len(draft.ops)), random.randrange(len(draft.ops))
    draft.ops[one], draft.ops[other] = draft.ops[other], draft.ops[one]


def _insert_metadata(random: Random, draft: Draft) -> None:
    listed = struct.pack("<3I", *(random.choice((*(one.block & 0xFFFF for one in draft.ops), 7)) for _ in range(3)))
    metadata = random.choice(
        (
            DraftOp(LABEL, source=random.choice((0, 5, 7, 1 << 63))),
            DraftOp(LABEL, source=3, length=random.choice((1, 40))),
            DraftOp(SEQUENCE, payload=listed[: random.choice((12, 12, 11, 0))]),
            DraftOp(SEQUENCE, source=random.choice((0, 40, 78)), payload=listed),
            DraftOp(CLUSTER, source=random.choice((0, 20, 40, 1 << 47)), length=random.choice((0, 0, 9))),
            DraftOp(FOOTER, block=0, source=0),
            DraftOp(0, source=0),
        )
    )
    where = 0 if metadata.kind == SEQUENCE and random.random() < 0.7 else random.randrange(len(draft.ops) + 1)
    draft.ops.insert(where, metadata)


def _plant_bomb(random: Random, draft: Draft) -> None:
    one = _carrier(random, draft)
    one.payload = random.choice(bombs(draft.compression, _unit_bytes(draft, one)))


def _fray_payload(random: Random, draft: Draft) -> None:
    one = _carrier(random, draft)
    payload = one.payload
    cut = random.randrange(len(payload) + 1)
    whole = random.randbytes(_unit_bytes(draft, one))
    one.payload = random.choice((payload[:cut], payload[cut:], payload + b"\0", payload[:-1], b"", whole))


def _swap_payloads(random: Random, draft: Draft) -> None:
    one, other = _carrier(random, draft), _carrier(random, draft)
    one.payload, other.payload = other.payload, one.payload


def _change_sequence(random: Random, draft: Draft) -> None:
    blocks = [one.block & 0xFFFFFFFF for one in draft.ops] or [0]
    listed = random.sample(blocks, random.randrange(len(blocks) + 1))
    for _ in range(random.choice((0, 0, 1, 2))):
        block = random.choice((*blocks, 99999, (1 << 32) - 1))
        listed.insert(random.randrange(len(listed) + 1), block)
    if draft.version == 3:
        draft.sequence = listed
    else:
        draft.ops.insert(0, DraftOp(SEQUENCE, payload=struct.pack(f"<{len(listed)}I", *listed)))
        draft.cluster_ops = draft.cluster_ops or random.choice((0, 4, 30))


def _change_points(random: Random, draft: Draft) -> None:
    count = len(draft.ops)
    draft.points = [
        (random.choice((0, 1, 2, 5, 5, 9, (1 << 64) - 1)), random.choice((0, 1, count, count + 1, 1 << 40)))
        for _ in range(random.randrange(5))
    ]


def _change_layout(random: Random, draft: Draft) -> None:
    """Header fields that the rest of the file follows."""
    change = random.randrange(7)
    if change == 0:
        draft.slots = random.choice((1, 2, 50))
    elif change == 1:
        draft.unit = random.choice((4096, 8192, 262144, 2048, 12288, 0))
    elif change == 2:
        draft.block_size = random.choice((512, 1024, 4096, 32768, 65536, 1 << 20, 1 << 31, 768))
    elif change == 3:
        draft.compression = random.randrange(6)
    elif change == 4:
        draft.version = random.choice((1, 2, 3))
    elif change == 5:
        draft.cluster_ops = random.choice((0, 2, 3, 4, 17, 900))
    else:
        draft.scratch, draft.state = random.choice((16, 512, 4096)), random.randrange(4)


def _change_progress(random: Random, draft: Draft) -> None:
    count = len(draft.ops)
    draft.merged = random.choice((1, count // 2, count, count + 1, (1 << 64) - 1))
    if random.random() < 0.3:
        draft.scratch, draft.state = 64, random.randrange(3)


def _leave_unfinished(_random: Random, draft: Draft) -> None:
    draft.finish = False


CHANGES: tuple[Callable[[Random, Draft], None], ...] = (
    *(_change_kind, _change_block, _change_block, _change_source, _change_exponent, _fit_exponent, _change_reserved),
    *(_change_length, _change_code, _drop_op, _double_op, _swap_ops, _insert_metadata, _plant_bomb, _plant_bomb),
    *(
        _fray_payload,
        _swap_payloads,
        _insert_metadata,
        _change_sequence,
        _change_sequence,
        _change_points,
        _change_layout,
        _change_progress,
    ),
    _leave_unfinished,
)

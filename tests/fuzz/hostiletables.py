"""Digests tables for any file, right or wrong; their checksums are right all the same, but for the damaged ones."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from corpus import BASE
from damage import cut_short, double_range, flip_bits, overwrite_word
from modelcodecs import Damaged
from modelread import Refused, read
from tables import END, LABEL, Segment, block_digest, build_table, whole_digest

_MOST_BYTES = 4 << 20


@dataclass(slots=True)
class _Target:
    """What a table is about: a state of a COW, and the digests of the image it gives."""

    block_size: int
    op_count: int
    ops_digest: int
    digests: list[int]

    def segment(self, kind: int, first: int, end: int) -> Segment:
        """Closes the state, with the digests of blocks [first, end)."""
        segment = Segment(kind, self.op_count, self.ops_digest, [(first, end - first)], self.digests[first:end])
        if kind == END:
            segment.target_blocks, segment.target_digest = len(self.digests), whole_digest(self.digests)
        return segment

    def whole(self) -> Segment:
        """The end, with all digests at once."""
        return self.segment(END, 0, len(self.digests))


def make_table(random: Random, raw: bytes) -> tuple[bytes, str]:
    """A digests table for a file, and in what way it is wrong."""
    make = random.choice(_TABLES)
    return make(random, _target(raw)), make.__name__


def _target(raw: bytes) -> _Target:
    try:
        reading = read(raw, lenient=True)
    except Refused:
        return _Target(512, 0, 0, [block_digest(bytes(512))])
    size = reading.block_size
    count = max(len(BASE) // size, min(reading.end_block, _MOST_BYTES // size))
    contents = [BASE[block * size : block * size + size].ljust(size, b"\0") for block in range(count)]
    for op in reading.ops:
        if op.block + op.blocks <= count:
            try:
                content = reading.content(op, BASE)
            except Damaged:
                continue
            for index in range(op.blocks):
                contents[op.block + index] = content[index * size : index * size + size]
    return _Target(size, len(reading.ops), reading.ops_digest, list(map(block_digest, contents)))


def _right(random: Random, target: _Target) -> bytes:
    half = random.randrange(len(target.digests) + 1)
    before = target.segment(LABEL, 0, half)
    before.op_count, before.label = max(0, target.op_count - 1), 1
    parts = [before, target.segment(END, half, len(target.digests))]
    return build_table(target.block_size, random.choice(([target.whole()], parts, [*parts, target.whole()])))


def _right_for_a_label(random: Random, target: _Target) -> bytes:
    end = random.randrange(len(target.digests)) + 1
    return build_table(target.block_size, [target.segment(LABEL, random.randrange(end), end)])


def _wrong_digests(random: Random, target: _Target) -> bytes:
    right = whole_digest(target.digests)
    for _ in range(random.choice((1, 1, 3, 20))):
        index = random.randrange(len(target.digests))
        target.digests[index] = random.choice((0, 1, target.digests[index] ^ 1 << random.randrange(64)))
    segment = target.whole()
    if random.random() < 0.2:
        segment.target_digest = right
    return build_table(target.block_size, [segment])


def _wrong_state(random: Random, target: _Target) -> bytes:
    segments = random.choice(([target.whole()], [target.whole(), target.whole()]))
    segments[-1].op_count += random.choice((0, 1, 1 << 40))
    segments[-1].ops_digest ^= random.choice((0, 1))
    return build_table(target.block_size, segments)


def _wrong_size(random: Random, target: _Target) -> bytes:
    segment, count = target.whole(), len(target.digests)
    sizes = (0, 1, count - 1, count + 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 33, (1 << 64) - 1)
    segment.target_blocks = random.choice(sizes)
    if segment.target_blocks < count:
        segment.target_digest = whole_digest(target.digests[: segment.target_blocks])
    return build_table(target.block_size, [segment])


def _wrong_runs(random: Random, target: _Target) -> bytes:
    segment, count = target.whole(), len(target.digests)
    segment.runs = random.choice(
        (
            [(1, count)],
            [(0xFFFFFFF0, count)],
            [(5, 0)] * 40 + segment.runs,
            [(0, count // 2)] * 3,
            [(0, count // 2), (0, count - count // 2)],
            [],
        )
    )
    return build_table(target.block_size, [segment])


def _wrong_header(random: Random, target: _Target) -> bytes:
    size = random.choice((0, 1, target.block_size, target.block_size * 2, 1 << 31))
    return build_table(size, [target.whole()], version=random.choice((1, 1, 0, 2)))


def _wrong_counts(random: Random, target: _Target) -> bytes:
    segment = target.whole()
    many = random.choice((0, 1, 1 << 31, 0xFFFFFFFF))
    segment.run_count = random.choice((None, many))
    segment.digest_count = random.choice((None, many << random.choice((0, 32))))
    segment.kind = random.choice((END, END, 0, 3))
    segment.chain = random.choice((None, None, 5))
    return build_table(target.block_size, [target.segment(LABEL, 0, 1), segment])


def _damaged(random: Random, target: _Target) -> bytes:
    half = len(target.digests) // 2
    parts = [target.segment(LABEL, 0, half), target.segment(END, half, len(target.digests))]
    raw = bytearray(build_table(target.block_size, parts))
    for _ in range(random.choice((1, 2))):
        random.choice((flip_bits, cut_short, overwrite_word, double_range))(random, raw, b"")
    return bytes(raw)


_TABLES: tuple[Callable[[Random, _Target], bytes], ...] = (
    *(_right, _right, _right_for_a_label, _wrong_digests, _wrong_digests, _wrong_state, _wrong_size, _wrong_runs),
    *(_wrong_header, _wrong_counts, _damaged),
)

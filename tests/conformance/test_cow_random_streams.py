"""Random ops in files of every version: they are read as they were meant, and no damage gives anything but an error.

The files are made from the tables of the format by rawcow.py, their payloads by the compressors' own libraries.
"""

import contextlib
import tracemalloc
import zlib
from random import Random
from typing import NamedTuple

import brotli
import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rawcow import (
    BROTLI,
    COPY,
    GZ,
    LABEL,
    LZ4,
    NONE,
    REPLACE,
    XOR,
    ZERO,
    ZSTD,
    RawOp,
    Rec,
    data_start,
    op,
    patched,
    raw_cow,
    raw_stream,
    sequence_of,
    store,
)

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.errors import CowError
from snapd.cow.image.view import CowView
from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.parsed import End
from snapd.cow.parse.reader import CowFile

BLOCK = 512
BLOCKS = 40
BASE = Random(7).randbytes(BLOCK * BLOCKS // 2) + bytes(BLOCK * BLOCKS // 2)
SCRATCH = 1024


class Call(NamedTuple):
    """One op of `blocks` blocks, or a label; `content` is what its payload stands for."""

    kind: int
    new_block: int
    source: int
    content: bytes

    @property
    def blocks(self) -> int:
        """Blocks covered."""
        return max(1, len(self.content) // BLOCK)


class Script(NamedTuple):
    """What a file is made of; `cluster_ops` is of versions 1 and 2 only."""

    version: int
    compression: int
    cluster_ops: int
    scratch: bool
    sequence: tuple[int, ...]
    calls: tuple[Call, ...]

    @property
    def ops(self) -> list[Call]:
        """The calls that are ops."""
        return [call for call in self.calls if call.kind != LABEL]


class Made(NamedTuple):
    """A file, where its payloads begin, and which of its bytes are not payload."""

    raw: bytes
    payloads: list[int]
    lengths: list[int]
    structure: list[int]


def packed(content: bytes, script: Script) -> bytes:
    """The payload of a unit (COW-105 to COW-107)."""
    algorithm = script.compression
    if not content or algorithm == NONE:
        return content
    if algorithm == GZ:
        small = zlib.compress(content, 9)
    elif algorithm == BROTLI:
        small = brotli.compress(content, quality=5)
    elif algorithm == LZ4:
        small = lz4.block.compress(content, store_size=False)
    else:
        small = zstandard.ZstdCompressor().compress(content)
    always = script.version < 3 and algorithm in (GZ, BROTLI)
    return small if always or len(small) < len(content) else content


def make(script: Script) -> Made:
    """The file of a script."""
    return make_regions(script) if script.version == 3 else make_stream(script)


def make_regions(script: Script) -> Made:
    """Version 3: one slot more than ops, the last four labels."""
    scratch, slots = SCRATCH * script.scratch, len(script.ops) + 1
    at = data_start(slots, len(script.sequence)) + scratch
    ops, payloads, points, data = list[RawOp](), list[int](), list[tuple[int, int]](), b""
    for call in script.calls:
        if call.kind == LABEL:
            points = [*(point for point in points if point[0] < call.source), (call.source, len(ops))][-4:]
            continue
        content = packed(call.content, script)
        source = at + len(data) if call.kind == REPLACE else call.source
        payloads.append(at + len(data))
        ops.append(op(call.kind, call.new_block, source, len(content), call.blocks.bit_length() - 1))
        data += content
    raw = raw_cow(
        ops,
        data,
        script.sequence,
        tuple(points),
        op_count_max=slots,
        buffer_size=scratch,
        block_size=BLOCK,
        compression=script.compression,
        max_compression_size=4096,
    )
    structure = [*range(78), *range(78 + scratch, at - 16)]
    return Made(raw, payloads, [length for length, _, _ in ops], [place for place in structure if place < len(raw)])


def make_stream(script: Script) -> Made:
    """Versions 1 and 2."""
    records = [sequence_of(*script.sequence)] * bool(script.sequence)
    for kind, new_block, source, content in script.calls:
        place = None if kind == REPLACE else source
        records.append(Rec(kind, new_block, place, packed(content, script)))
    scratch = SCRATCH * script.scratch * (script.version == 2)
    stream = raw_stream(
        records,
        script.version,
        cluster_ops=script.cluster_ops,
        compression=script.compression,
        block_size=BLOCK,
        buffer_size=scratch,
    )
    begins = [*stream.records, *stream.clusters, stream.footer]
    structure = [*range(34 + 4 * (script.version == 2)), *(at + byte for at in begins for byte in range(20))]
    ops = [index for index, record in enumerate(records) if record.kind in (COPY, REPLACE, ZERO, XOR)]
    payloads = [stream.payloads[index] for index in ops]
    return Made(stream.raw, payloads, [len(records[index].payload) for index in ops], structure)


def image(ops: list[Call]) -> bytes:
    """What the ops make of the base."""
    new = bytearray(BASE)
    for kind, new_block, source, content in ops:
        if kind == COPY:
            content = BASE[source * BLOCK : (source + 1) * BLOCK]
        elif kind == ZERO:
            content = bytes(BLOCK)
        elif kind == XOR:
            content = bytes(a ^ b for a, b in zip(content, BASE[source : source + BLOCK], strict=True))
        new[new_block * BLOCK : new_block * BLOCK + len(content)] = content
    return bytes(new)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """A file of up to twenty ops and some labels, no block written twice."""
    version = draw(st.sampled_from([1, 2, 3]))
    free, calls = list(range(BLOCKS)), list[Call]()
    random = Random(draw(st.integers(0, 1 << 32)))
    for _ in range(draw(st.integers(0, 20))):
        kind = draw(st.sampled_from([COPY, REPLACE, ZERO, XOR, LABEL]))
        if kind == LABEL:
            calls.append(Call(LABEL, 0, draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 1 << 60, (1 << 64) - 1])), b""))
            continue
        blocks = random.choice([1, 2, 4, 8]) if version == 3 and kind == REPLACE else 1
        starts = [block for block in free if all(block + i in free for i in range(blocks))]
        if not starts:
            continue
        new_block = random.choice(starts)
        free = [block for block in free if not new_block <= block < new_block + blocks]
        dense = random.random() < 0.5
        content = random.randbytes(BLOCK * blocks) if dense else bytes([random.randrange(256)]) * BLOCK * blocks
        source = random.randrange(BLOCKS) if kind == COPY else random.randrange(BLOCK * (BLOCKS - 1)) * (kind == XOR)
        calls.append(Call(kind, new_block, source, content if kind in (REPLACE, XOR) else b""))
    cluster_ops = draw(st.sampled_from([0, 2, 3, 5])) if version < 3 else 0
    listed = [call.new_block for call in calls if call.kind != LABEL]
    with_sequence = draw(st.booleans()) and (version == 3 or cluster_ops > 0)
    sequence = tuple(random.sample(listed, random.randint(0, len(listed)))) if with_sequence else ()
    compression = draw(st.sampled_from([NONE, GZ, BROTLI, LZ4, ZSTD]))
    return Script(version, compression, cluster_ops, draw(st.booleans()), sequence, tuple(calls))


def check_read(script: Script, made: Made, cow: CowFile, count: int) -> None:
    """The first `count` ops are those of the script, and read as they must."""
    ops = script.ops[:count]
    assert cow.op_count == count
    assert cow.ops.type.tolist() == [call.kind for call in ops]
    assert cow.ops.new_block.tolist() == [call.new_block for call in ops]
    assert cow.ops.blocks.tolist() == [call.blocks for call in ops]
    assert cow.ops.data_length.tolist() == made.lengths[:count]
    assert cow.ops.payload.tolist() == made.payloads[:count]
    for call, source, place in zip(ops, cow.ops.source.tolist(), made.payloads, strict=False):
        assert source == (place if call.kind == REPLACE else call.source)
    assert cow.sequence.tolist() == list(script.sequence)
    base = store(BASE)
    view = CowView(cow.extent_map(len(BASE), len(BASE)), store(made.raw), source=base, base=base)
    assert read_bytes(view, 0, view.size) == image(ops)


def check_invariants(cow: CowFile) -> None:
    """What holds of every file that a parse hands out (COW-97)."""
    ops, count = cow.ops, cow.op_count
    assert set(ops.type.tolist()) <= {COPY, REPLACE, ZERO, XOR}
    assert len(ops.records) == 16 * count
    for index in range(count):
        one = ops.op(index)
        assert 0 <= one.source < 1 << 48
        assert one.new_block + one.blocks <= 1 << 32
        if one.type in (REPLACE, XOR):
            place = int(ops.payload[index])
            assert one.data_length > 0
            assert cow.header.size <= place <= place + one.data_length <= cow.size
            assert one.type == XOR or place == one.source
            assert one.blocks * cow.header.block_size <= cow.header.max_unit or one.type == XOR
    if not cow.tolerated.count:
        covered = sum(ops.blocks.tolist())
        assert covered == len(
            {block + i for block, n in zip(ops.new_block.tolist(), ops.blocks.tolist(), strict=True) for i in range(n)}
        )
    assert all(label.op_count <= count for label in cow.labels)
    if cow.end is not End.LABEL:
        assert set(cow.sequence.tolist()) <= set(ops.new_block.tolist())
    assert sorted(merge_list(cow).tolist()) == list(range(count))
    assert isinstance(order_fault(cow), str)
    assert not (cow.is_merged and cow.has_begun)
    if cow.highest_target_block < 1 << 16:
        with contextlib.suppress(SnapdError):
            assert cow.extent_map(1 << 16 << cow.header.block_size.bit_length()).op_count == count


def check_damaged(raw: bytes, label: int | None = None) -> None:
    """A damaged file is refused by a `CowError`, or it is a file like any other; leniently too."""
    for lenient in (False, True):
        try:
            cow = CowFile.parse(store(raw), label=label, lenient=lenient)
        except CowError:
            continue
        check_invariants(cow)


@given(scripts())
@settings(max_examples=300, deadline=None)
def test_a_file_is_read_as_it_was_meant(script: Script) -> None:
    """COW-24 to COW-36, COW-41 to COW-57, COW-81 to COW-86: ops, payloads, labels and image, also up to each label."""
    made = make(script)
    cow = CowFile.parse(store(made.raw))
    check_read(script, made, cow, len(script.ops))
    check_invariants(cow)
    expected = {}
    for number, call in enumerate(script.calls):
        if call.kind == LABEL and call.source not in expected:
            expected[call.source] = sum(before.kind != LABEL for before in script.calls[:number])
    if script.version < 3:
        assert dict(reversed(cow.labels)) == expected
    for label, count in dict(reversed(cow.labels)).items():
        check_read(script, made, CowFile.parse(store(made.raw), label=label), count)


@given(scripts(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_that_is_cut(script: Script, data: st.DataObject) -> None:
    """COW-94, V11 to V13, V20: at any byte."""
    raw = make(script).raw
    check_damaged(raw[: data.draw(st.integers(0, len(raw)))], data.draw(st.sampled_from([None, 0, 1, 5])))


@given(scripts(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_bit_that_flips(script: Script, data: st.DataObject) -> None:
    """COW-97: in the header or in a record, a sequence or a resume point."""
    made = make(script)
    at = data.draw(st.sampled_from(made.structure))
    flipped = bytes([made.raw[at] ^ 1 << data.draw(st.integers(0, 7))])
    check_damaged(patched(made.raw, at, flipped), data.draw(st.sampled_from([None, None, 0, 1, 5])))


EVERYTHING = (
    Call(COPY, 3, 7, b""),
    Call(REPLACE, 5, 0, b"\x41" * BLOCK),
    Call(LABEL, 0, 2, b""),
    Call(XOR, 6, 700, b"\x42" * BLOCK),
    Call(ZERO, 8, 0, b""),
    Call(LABEL, 0, 9, b""),
)


def everything(version: int, cluster_ops: int) -> Made:
    """A file that has one of each."""
    sequence = (6, 3) if version == 3 or cluster_ops else ()
    return make(Script(version, GZ, cluster_ops, True, sequence, EVERYTHING))


@pytest.mark.parametrize(
    ("version", "cluster_ops"), [(1, 0), (1, 3), (2, 0), (2, 2), (2, 64), (3, 0)], ids=lambda value: str(value)
)
def test_every_bit_of_a_small_file(version: int, cluster_ops: int) -> None:
    """COW-97, COW-176: each bit of header and records in turn."""
    made = everything(version, cluster_ops)
    for at in made.structure:
        for bit in range(8):
            check_damaged(patched(made.raw, at, bytes([made.raw[at] ^ 1 << bit])))


@pytest.mark.parametrize(("version", "cluster_ops"), [(1, 3), (2, 0), (2, 3), (3, 0)], ids=lambda value: str(value))
def test_what_a_header_claims_costs_nothing(version: int, cluster_ops: int) -> None:
    """COW-97: memory follows from the size of the file, never from a number in it."""
    made = everything(version, cluster_ops)
    tracemalloc.start()
    try:
        for at in range(10, 78):
            for bit in (0, 7):
                with contextlib.suppress(CowError):
                    CowFile.parse(store(patched(made.raw, at, bytes([made.raw[at] ^ 1 << bit]))))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize("version", [2, 3])
def test_what_an_op_costs(version: int) -> None:
    """COW-174: at most 40 bytes an op stay, and at most 100 are needed meanwhile."""
    count = 100_000
    targets = Random(1).sample(range(count * 2), count)
    if version == 3:
        raw = raw_cow([op(COPY, block, 7) for block in targets])
    else:
        raw = raw_stream([Rec(COPY, block, 7) for block in targets], cluster_ops=1024).raw
    file = store(raw)
    tracemalloc.start()
    try:
        cow = CowFile.parse(file)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cow.op_count == count
    assert kept < 40 * count
    assert peak < 100 * count


@given(st.binary(max_size=400), st.sampled_from([1, 2, 3]))
@settings(max_examples=200, deadline=None)
def test_noise_behind_a_header(noise: bytes, version: int) -> None:
    """COW-97: records of no meaning."""
    raw = make(Script(version, NONE, 0, False, (), ())).raw
    head = 78 + 64 if version == 3 else 34 + 4 * (version == 2)
    raw = raw[:head] + noise
    if version == 3:
        count = len(noise) // 16
        raw = patched(raw, 54, count.to_bytes(8, "little") * 2)
    check_damaged(raw)

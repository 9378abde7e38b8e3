"""What a lenient parse lets pass, and that it lets nothing else pass (COW-208)."""

import struct
from collections.abc import Callable

import pytest
from rawcow import (
    COPY,
    GZ,
    LZ4,
    REPLACE,
    XOR,
    ZERO,
    Rec,
    data_start,
    header,
    op,
    patched,
    raw_cow,
    raw_stream,
    sequence_of,
    store,
    stream_header,
)

from snapd.block.store import read_bytes
from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import OpType
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
OTHER = b"\x42" * 4096


def tolerated(raw: bytes, *statements: str, label: int | None = None) -> CowFile:
    """The lenient parse of a file whose strict one fails by the first statement; all of them are noted, in order."""
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(raw), label=label)
    assert caught.value.statement == statements[0]
    cow = CowFile.parse(store(raw), label=label, lenient=True)
    assert len(cow.tolerated.notes) == cow.tolerated.count == len(statements)
    for note, statement in zip(cow.tolerated.notes, statements, strict=True):
        assert note.endswith(f"({statement})")
    assert cow.tolerated.notes[0] == str(caught.value)
    return cow


def refused(raw: bytes, statement: str) -> None:
    """Not even a lenient parse takes the file."""
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(raw), lenient=True)
    assert caught.value.statement == statement


def image(cow: CowFile, raw: bytes, base: bytes) -> bytes:
    """What the file reads as over a base."""
    below = store(base)
    view = CowView(cow.extent_map(len(base)), store(raw), source=below, base=below)
    return read_bytes(view, 0, view.size)


@pytest.mark.parametrize(("version", "size"), [(1, 38), (1, 78), (2, 34), (2, 77)])
def test_v4_another_header_size(version: int, size: int) -> None:
    """V4, COW-13: the stream begins where the header says that it ends, and what is missing reads as 0."""
    good = raw_stream([], version).raw
    start = len(stream_header(version))
    body = raw_stream([Rec(COPY, 3, 7)], version).raw[start:]
    head = stream_header(version, header_size=size).ljust(size, b"\0")[:size]
    cow = tolerated(head + body, "V4")
    assert cow.ops.new_block.tolist() == [3]
    assert cow.header.size == size
    assert cow.header.pack()[:14] == head[:14]
    assert CowFile.parse(store(good), lenient=True).tolerated.count == 0


def test_v4_scratch_lies_behind_the_header_there_is() -> None:
    """V4, COW-142: the state byte too is found behind the header that the file has."""
    head = stream_header(2, header_size=78, buffer_size=4096).ljust(78, b"\0")
    body = raw_stream([]).raw[38:]
    assert tolerated(head + b"\x02" + bytes(4095) + body, "V4").window_done


@pytest.mark.parametrize(("size", "statement"), [(13, "V4"), (38, "V29"), (74, "V29"), (79, "V3")])
def test_v4_what_cannot_be_tolerated(size: int, statement: str) -> None:
    """V4, V29: a version 3 header that is cut has no unit size any more; one of less than its prefix is none."""
    refused(header(header_size=size) + bytes(64), statement)


@pytest.mark.parametrize("version", [1, 2])
def test_v18_payload_elsewhere(version: int) -> None:
    """V18 (COW-37): the payload is read where the op says, and every such op is named; other payloads stay put."""
    ops = [Rec(REPLACE, 1, payload=BLOCK), Rec(REPLACE, 2, payload=OTHER), Rec(XOR, 3, 0, BLOCK)]
    stream = raw_stream(ops, version, cluster_ops=8)
    one, two, three = stream.payloads
    raw = patched(stream.raw, stream.records[0] + 12, struct.pack("<Q", two))
    raw = patched(raw, stream.records[1] + 12, struct.pack("<Q", one))
    cow = tolerated(raw, "V18", "V18")
    assert cow.ops.payload.tolist() == [two, one, three]
    assert "op 0" in cow.tolerated.notes[0]
    assert image(cow, raw, bytes(4 * 4096)) == bytes(4096) + OTHER + BLOCK + BLOCK


def test_v18_is_never_tolerated_in_version_3() -> None:
    """V18 (COW-46): there the offsets say the same thing twice, and a difference is damage."""
    refused(raw_cow([op(REPLACE, 1, data_start(1) + 1, 4096)], BLOCK * 2), "V18")


def test_v27_the_last_op_wins() -> None:
    """V27 (COW-62, COW-209): in what is read, block by block; the note names both ops."""
    start = data_start(3)
    raw = raw_cow([op(REPLACE, 2, start, 16384, 2), op(ZERO, 3), op(COPY, 5, 0)], BLOCK * 4)
    cow = tolerated(raw, "V27", "V27")
    assert "op 1: target block 3 is already written by op 0" in cow.tolerated.notes[0]
    assert "op 2: target block 5 is already written by op 0" in cow.tolerated.notes[1]
    base = OTHER * 8
    assert image(cow, raw, base) == OTHER * 2 + BLOCK + bytes(4096) + BLOCK + OTHER * 3


def test_v27_the_unit_may_be_the_last() -> None:
    """V27 (COW-64): a unit that comes last hides what it covers."""
    start = data_start(3)
    raw = raw_cow([op(ZERO, 3), op(ZERO, 4), op(REPLACE, 2, start, 16384, 2)], BLOCK * 4)
    cow = tolerated(raw, "V27", "V27")
    assert image(cow, raw, OTHER * 8) == OTHER * 2 + BLOCK * 4 + OTHER * 2


@pytest.mark.parametrize("cluster_ops", [0, 8])
def test_xor_payloads_are_kept_by_op(cluster_ops: int) -> None:
    """COW-36, COW-224: two XOR ops of one block have two payloads, and the last one is that of the last op."""
    stream = raw_stream([Rec(XOR, 1, 0, BLOCK), Rec(XOR, 1, 0, OTHER)], cluster_ops=cluster_ops)
    cow = tolerated(stream.raw, "V27")
    assert cow.ops.payload.tolist() == stream.payloads
    assert image(cow, stream.raw, bytes(2 * 4096)) == bytes(4096) + OTHER


def test_overlapping_ops_do_not_cover_twice() -> None:
    """UNDO-23, COW-209: two ops of one block leave the block beside it without one."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 8), op(ZERO, 8)])), lenient=True)
    cow.check_sizes(8, 9)
    with pytest.raises(CowError, match="UNDO-23"):
        cow.check_sizes(8, 10)


@pytest.mark.parametrize(
    "record",
    [op(COPY, 3, 7, reserved=1), op(ZERO, 3, reserved=0x1FF), op(COPY, 3, 7, data_length=4096), op(ZERO, 3, source=5)],
)
def test_v28_fields_that_should_be_zero(record: tuple[int, int, int]) -> None:
    """V28 (COW-47): they are not looked at, but that a length moves the payloads behind it."""
    start = data_start(2) + record[0]
    raw = raw_cow([record, op(REPLACE, 9, start, 4096)], bytes(record[0]) + BLOCK)
    cow = tolerated(raw, "V28")
    assert cow.ops.op(0).type in (OpType.COPY, OpType.ZERO)
    assert cow.ops.op(0).new_block == 3
    assert image(cow, raw, OTHER * 10)[9 * 4096 :] == BLOCK


def test_v28_in_version_2() -> None:
    """V28: there too."""
    assert tolerated(raw_stream([Rec(ZERO, 3, 5)]).raw, "V28").ops.new_block.tolist() == [3]


def test_v32_a_point_of_more_ops_than_there_are() -> None:
    """V32: asked for it, a lenient parse takes the ops there are; not asked for, it is noted and left out."""
    raw = raw_cow([op(ZERO, 5), op(ZERO, 6)], points=((8, 1), (9, 1000)))
    cow = tolerated(raw, "V32", label=9)
    assert (cow.op_count, cow.labels) == (2, ((8, 1),))
    cow = CowFile.parse(store(raw), lenient=True)
    assert "label 9" in cow.tolerated.notes[0]
    assert cow.labels == ((8, 1),)


Corruption = Callable[[], bytes]


@pytest.mark.parametrize(
    ("corrupt", "statement"),
    [
        (lambda: header()[:20], "V1"),
        (lambda: header(magic=1) + bytes(64), "V2"),
        (lambda: header(major=4) + bytes(64), "V5"),
        (lambda: header(minor=4) + bytes(64), "V6"),
        (lambda: header(footer_size=4) + bytes(64), "V7"),
        (lambda: header(op_size=4) + bytes(64), "V8"),
        (lambda: header(cluster_ops=4) + bytes(64), "V9"),
        (lambda: header(block_size=4) + bytes(64), "V10"),
        (lambda: raw_cow([op(ZERO, 1)])[:-1], "V11"),
        (lambda: raw_stream([Rec(ZERO, 1)], finish=False).raw, "V12"),
        (lambda: raw_stream([Rec(ZERO, 1)]).raw[:-1], "V13"),
        (lambda: raw_stream([Rec(ZERO, 1 << 32)]).raw, "V16"),
        (lambda: raw_stream([Rec(XOR, n, 0, BLOCK, n) for n in (GZ, LZ4)]).raw, "V17"),
        (lambda: raw_cow([op(COPY, 3, 7)], sequence=(5,)), "V19"),
        (lambda: raw_cow([op(XOR, 3, 7, 4096)]), "V20"),
        (lambda: header(op_count=1) + bytes(80), "V21"),
        (lambda: raw_cow([op(4, 3)]), "V22"),
        (lambda: raw_cow([op(COPY, 3, 7, exponent=1)]), "V23"),
        (lambda: header(compression=9) + bytes(64), "V24"),
        (lambda: header(num_merge_ops=1) + bytes(64), "V25"),
        (lambda: header(max_compression_size=1) + bytes(64), "V29"),
        (lambda: raw_stream([sequence_of(3)._replace(source=50), Rec(COPY, 3, 1)], cluster_ops=4).raw, "COW-37"),
        (lambda: raw_cow([op(XOR, 3, 7, 0)]), "COW-109"),
    ],
)
def test_everything_else_is_refused(corrupt: Corruption, statement: str) -> None:
    """COW-208: the list of what may pass is closed."""
    refused(corrupt(), statement)


def test_notes_are_bounded() -> None:
    """COW-208: a file of nothing but faults costs no more than one of a hundred; they are all counted."""
    cow = CowFile.parse(store(raw_cow([op(ZERO, 3, source=1)] * 1000)), lenient=True)
    assert cow.tolerated.count == 1000 + 999
    assert len(cow.tolerated.notes) == Tolerance.LIMIT


def test_a_strict_parse_notes_nothing() -> None:
    """COW-208: what a strict parse takes needs no tolerance."""
    raw = raw_cow([op(COPY, 3, 7), op(ZERO, 4)])
    for lenient in (False, True):
        cow = CowFile.parse(store(raw), lenient=lenient)
        assert (cow.tolerated.count, cow.tolerated.notes) == (0, [])

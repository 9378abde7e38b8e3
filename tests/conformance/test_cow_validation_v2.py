"""The validation table for the stream of versions 1 and 2, with a corrupt file a row (COW-97).

The rows of the header are in test_cow_validation.py.
"""

import struct
import zlib

import pytest
from rawcow import (
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
    RawStream,
    Rec,
    patched,
    raw_stream,
    sequence_of,
    store,
    stream_header,
)

from snapd.cow.errors import CowError
from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.parsed import End
from snapd.cow.parse.reader import CowFile

BLOCK = b"\x41" * 4096
PACKED = zlib.compress(BLOCK)
VERSIONS = (1, 2)
CLUSTERS = (0, 2, 3, 5, 1024)
every_layout = pytest.mark.parametrize(("version", "cluster_ops"), [(v, n) for v in VERSIONS for n in CLUSTERS])
OPS = [Rec(COPY, 3, 7), Rec(REPLACE, 5, payload=BLOCK), Rec(XOR, 6, 4097, BLOCK), Rec(ZERO, 9)]


def refused(raw: bytes, statement: str, *, label: int | None = None) -> CowError:
    """The error that parsing `raw` gives, which names the statement."""
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(raw), label=label)
    assert caught.value.statement == statement
    assert statement in str(caught.value)
    return caught.value


def at_record(error: CowError, stream: RawStream, record: int, index: int | None) -> None:
    """The error names the byte of this record, and this op where it is one."""
    assert (error.offset, error.op_index) == (stream.records[record], index)


@every_layout
def test_the_uncorrupted_file_parses(version: int, cluster_ops: int) -> None:
    """Guards the rows below (COW-24, COW-27 to COW-36): the files they corrupt are good, and read op by op."""
    stream = raw_stream(OPS, version, cluster_ops=cluster_ops)
    cow = CowFile.parse(store(stream.raw))
    assert cow.end is End.FINISHED
    assert cow.ops.type.tolist() == [COPY, REPLACE, XOR, ZERO]
    assert cow.ops.new_block.tolist() == [3, 5, 6, 9]
    assert cow.ops.source.tolist() == [7, stream.payloads[1], 4097, 0]
    assert cow.ops.payload.tolist() == stream.payloads
    assert cow.ops.data_length.tolist() == [0, 4096, 4096, 0]
    assert cow.cursor is not None
    assert cow.cursor.op_pos == stream.footer


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("left", [1, 19])
def test_v11_torn_record(version: int, left: int) -> None:
    """V11: the file ends inside a record; with a label before it, the message says how to go on."""
    stream = raw_stream([Rec(COPY, 3, 7), Rec(LABEL, 0, 6), Rec(ZERO, 4)], version, finish=False)
    error = refused(stream.raw[: stream.records[2] + left], "V11")
    at_record(error, stream, 2, None)
    assert "labels 6" in str(error)
    assert CowFile.parse(store(stream.raw[: stream.records[2] + left]), label=6).op_count == 1


@every_layout
def test_v12_no_footer(version: int, cluster_ops: int) -> None:
    """V12 (COW-94, COW-214): an unfinished file; the message names the labels that it can be read up to."""
    ops = [*OPS, Rec(LABEL, 0, 11), Rec(COPY, 40, 1), Rec(LABEL, 0, 1 << 60), Rec(REPLACE, 41, payload=BLOCK)]
    stream = raw_stream(ops, version, cluster_ops=cluster_ops, finish=False)
    error = refused(stream.raw, "V12")
    assert f"11, {1 << 60}" in str(error)
    assert error.offset == (stream.footer if cluster_ops in (0, 2, 3, 5) else stream.records[-1] + 20)
    cow = CowFile.parse(store(stream.raw), label=11)
    assert (cow.end, cow.op_count, cow.labels) == (End.LABEL, 4, ((11, 4),))
    assert CowFile.parse(store(stream.raw), label=1 << 60).op_count == 5


@pytest.mark.parametrize("version", VERSIONS)
def test_v12_nothing_but_a_header(version: int) -> None:
    """V12: a stream that was never written to; that there is no label is said too."""
    error = refused(stream_header(version), "V12")
    assert error.offset == len(stream_header(version))
    assert "no label" in str(error)


@every_layout
@pytest.mark.parametrize("cut", [1, 63, 64])
def test_v13_footer_cut_off(version: int, cluster_ops: int, cut: int) -> None:
    """V13: the 64 bytes behind the footer's record are part of it; also met on the way to a label."""
    stream = raw_stream(OPS, version, cluster_ops=cluster_ops)
    assert refused(stream.raw[:-cut], "V13").offset == stream.footer
    assert refused(stream.raw[:-cut], "V13", label=1).offset == stream.footer


@every_layout
@pytest.mark.parametrize(("at", "content"), [(4, 1), (4, 0), (12, 0), (12, 1 << 40)])
def test_v14_footer_counts(version: int, cluster_ops: int, at: int, content: int) -> None:
    """V14 (COW-32): the footer counts every record, cluster ops too, and their bytes."""
    stream = raw_stream(OPS, version, cluster_ops=cluster_ops)
    raw = patched(stream.raw, stream.footer + at, struct.pack("<Q", content))
    assert refused(raw, "V14").offset == stream.footer
    assert refused(raw, "V14", label=1).offset == stream.footer


def test_the_unused_bytes_of_the_footer_say_nothing() -> None:
    """COW-20: they are ignored, and so is what a device has behind the footer."""
    stream = raw_stream(OPS)
    raw = patched(stream.raw, stream.footer + 20, b"\xff" * 64) + b"\xff" * 100
    assert CowFile.parse(store(raw)).op_count == 4


@every_layout
def test_v15_label_absent(version: int, cluster_ops: int) -> None:
    """V15: neither before the footer nor before the end of an unfinished file."""
    ops = [Rec(LABEL, 0, 5), *OPS, Rec(LABEL, 0, 7), Rec(LABEL, 0, 5)]
    for finish in (True, False):
        stream = raw_stream(ops, version, cluster_ops=cluster_ops, finish=finish)
        assert "5, 7, 5" in str(refused(stream.raw, "V15", label=6))
        assert CowFile.parse(store(stream.raw), label=5).op_count == 0


@every_layout
@pytest.mark.parametrize(
    ("record", "index"),
    [
        (Rec(ZERO, 1 << 32), 1),
        (Rec(COPY, 1, 1 << 48), 1),
        (Rec(XOR, 1, 1 << 63, BLOCK), 1),
        (Rec(REPLACE, 1 << 63, payload=BLOCK), 1),
        (Rec(LABEL, 1 << 32, 1), None),
    ],
)
def test_v16_wide_fields(version: int, cluster_ops: int, record: Rec, index: int | None) -> None:
    """V16 (COW-19): more than 32 bits of a target block or 48 of a source."""
    stream = raw_stream([Rec(ZERO, 2), record], version, cluster_ops=cluster_ops)
    at_record(refused(stream.raw, "V16"), stream, 1, index)


def test_labels_keep_64_bits() -> None:
    """COW-19: two labels that differ in the highest bits only are two labels."""
    ops = [Rec(ZERO, 1), Rec(LABEL, 0, 1 << 63), Rec(ZERO, 2), Rec(LABEL, 0, 0)]
    raw = raw_stream(ops).raw
    assert CowFile.parse(store(raw)).labels == ((1 << 63, 1), (0, 2))
    assert CowFile.parse(store(raw), label=1 << 63).op_count == 1
    assert CowFile.parse(store(raw), label=0).op_count == 2


@every_layout
def test_v17_two_compressions(version: int, cluster_ops: int) -> None:
    """V17 (COW-18): one algorithm a file; before a label it counts only what lies there."""
    ops = [
        *(Rec(REPLACE, 1, payload=PACKED, code=GZ), Rec(LABEL, 0, 1), Rec(REPLACE, 2, payload=BLOCK, code=NONE)),
        Rec(REPLACE, 3, payload=PACKED, code=BROTLI),
    ]
    stream = raw_stream(ops, version, cluster_ops=cluster_ops)
    at_record(refused(stream.raw, "V17"), stream, 3, 2)
    assert CowFile.parse(store(stream.raw), label=1).header.compression == GZ


@pytest.mark.parametrize(("code", "expected"), [(NONE, NONE), (GZ, GZ), (BROTLI, BROTLI), (LZ4, LZ4), (ZSTD, ZSTD)])
def test_compression_follows_from_the_ops(code: int, expected: int) -> None:
    """COW-17, COW-18: the one code there is counts for all ops, those marked 0 too."""
    ops = [Rec(ZERO, 1), Rec(REPLACE, 2, payload=BLOCK, code=NONE), Rec(REPLACE, 3, payload=BLOCK, code=code)]
    assert CowFile.parse(store(raw_stream(ops).raw)).header.compression == expected


@every_layout
@pytest.mark.parametrize("by", [-1, 1, 20])
def test_v18_payload_elsewhere(version: int, cluster_ops: int, by: int) -> None:
    """V18 (COW-25, COW-37): a replace op must name the place of its payload, to the byte."""
    stream = raw_stream(OPS, version, cluster_ops=cluster_ops)
    raw = patched(stream.raw, stream.records[1] + 12, struct.pack("<Q", stream.payloads[1] + by))
    at_record(refused(raw, "V18"), stream, 1, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_v19_sequence_names_a_missing_block(version: int) -> None:
    """V19 (COW-73, COW-203): checked when all ops are there; a file that is cut at a label keeps its sequence."""
    ops = [sequence_of(3, 8), Rec(COPY, 3, 7), Rec(LABEL, 0, 1)]
    stream = raw_stream(ops, version, cluster_ops=8)
    error = refused(stream.raw, "V19")
    assert "block 8" in str(error)
    assert error.offset == stream.payloads[0] + 4
    cow = CowFile.parse(store(stream.raw), label=1)
    assert cow.sequence.tolist() == [3, 8]
    assert merge_list(cow).tolist() == [0]


@pytest.mark.parametrize("version", VERSIONS)
def test_sequence_names_a_block_twice(version: int) -> None:
    """COW-67: also where the second entry is in another sequence op."""
    ops = [sequence_of(3, 4), sequence_of(5, 3), *(Rec(COPY, block, 9) for block in (3, 4, 5))]
    stream = raw_stream(ops, version, cluster_ops=3)
    assert refused(stream.raw, "COW-67").offset == stream.payloads[1] + 4


@every_layout
def test_v20_payload_leaves_the_file(version: int, cluster_ops: int) -> None:
    """V20: the last payload of a file that ends too early; where clusters lead behind the end, that is V26."""
    stream = raw_stream([Rec(COPY, 3, 7), Rec(XOR, 6, 1, BLOCK)], version, cluster_ops=cluster_ops, finish=False)
    if cluster_ops in (2, 3):
        assert refused(stream.raw[:-1], "V26").offset == stream.clusters[-1]
    elif cluster_ops:
        raw = stream.raw + raw_stream([Rec(LABEL, 0, 4)]).raw[38:58]
        raw = patched(stream.raw, stream.records[1] + 20, raw[-20:])[:-1]
        error = refused(raw, "V20", label=4)
        at_record(error, stream, 1, 1)
    else:
        at_record(refused(stream.raw[:-1], "V20"), stream, 1, 1)


def test_v20_inside_the_header() -> None:
    """V20: a payload that would lie in the header is refused where its place is tolerated (V18) too."""
    stream = raw_stream([Rec(REPLACE, 1, 37, BLOCK)])
    with pytest.raises(CowError) as caught:
        CowFile.parse(store(stream.raw), lenient=True)
    assert caught.value.statement == "V20"
    at_record(caught.value, stream, 0, 0)


@every_layout
@pytest.mark.parametrize("kind", [0, 8, 15, 16, 254])
def test_v22_unknown_type(version: int, cluster_ops: int, kind: int) -> None:
    """V22 (COW-40): a type that there is not, type 0 among them."""
    stream = raw_stream([Rec(COPY, 3, 7), Rec(kind, 9), Rec(ZERO, 4)], version, cluster_ops=cluster_ops)
    at_record(refused(stream.raw, "V22"), stream, 1, None)


def test_v22_zero_record_before_others() -> None:
    """V22 (COW-40): a record of zeros is nothing but the end, so none may follow it in its cluster."""
    stream = raw_stream([Rec(COPY, 3, 7), Rec(0), Rec(ZERO, 4)], cluster_ops=8)
    at_record(refused(stream.raw, "V22"), stream, 1, None)
    at_record(refused(stream.raw, "V22", label=5), stream, 1, None)


def test_v22_a_cluster_op_without_clusters() -> None:
    """V22 (COW-24): records and payloads alternate, there is nothing to jump over."""
    stream = raw_stream([Rec(COPY, 3, 7), Rec(CLUSTER, 0, 0)])
    at_record(refused(stream.raw, "V22"), stream, 1, None)


@every_layout
@pytest.mark.parametrize("code", [5, 255])
def test_v24_unknown_compression(version: int, cluster_ops: int, code: int) -> None:
    """V24: a code that there is not, on the first op that has one."""
    ops = [Rec(COPY, 3, 7), Rec(REPLACE, 5, payload=BLOCK, code=code)]
    stream = raw_stream(ops, version, cluster_ops=cluster_ops)
    at_record(refused(stream.raw, "V24"), stream, 1, 1)


@every_layout
def test_v25_more_merged_than_there_is(version: int, cluster_ops: int) -> None:
    """V25 (COW-80): progress counts data ops, so labels and cluster ops do not make room for more."""
    ops = [*OPS, Rec(LABEL, 0, 1)]
    good = raw_stream(ops, version, cluster_ops=cluster_ops, num_merge_ops=4)
    assert CowFile.parse(store(good.raw)).is_merged
    bad = raw_stream(ops, version, cluster_ops=cluster_ops, num_merge_ops=5)
    assert refused(bad.raw, "V25").offset == 26


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster_ops", [2, 3, 1024])
@pytest.mark.parametrize("by", [-1, 1, -4096, 1 << 40, 1 << 63, -20, 20])
def test_v26_cluster_that_ends_elsewhere(version: int, cluster_ops: int, by: int) -> None:
    """V26 (COW-29): a cluster leads to the end of its payloads: not back, not on, not out of the file."""
    stream = raw_stream([Rec(REPLACE, 5, payload=BLOCK)], version, cluster_ops=cluster_ops)
    (cluster,) = stream.clusters
    (source,) = struct.unpack_from("<Q", stream.raw, cluster + 12)
    raw = patched(stream.raw, cluster + 12, struct.pack("<Q", (source + by) % (1 << 64)))
    assert refused(raw, "V26").offset == cluster
    assert refused(raw, "V26", label=5).offset == cluster


def test_v26_cluster_behind_the_end() -> None:
    """V26: the next cluster would begin behind the end of the file."""
    stream = raw_stream([Rec(REPLACE, 5, payload=BLOCK)], cluster_ops=2)
    assert refused(stream.raw[: stream.footer - 1], "V26").offset == stream.clusters[0]


def test_a_cluster_op_has_no_payload() -> None:
    """COW-28: all its fields but the source are 0, so that records and payloads stay in step."""
    stream = raw_stream([Rec(ZERO, 5)], cluster_ops=2)
    raw = patched(stream.raw, stream.clusters[0] + 2, struct.pack("<H", 1))
    assert refused(raw, "V26").offset == stream.clusters[0]


def test_a_cluster_without_its_cluster_op() -> None:
    """COW-28: a full op area that does not end with a cluster op."""
    stream = raw_stream([Rec(ZERO, 5), Rec(ZERO, 6)], cluster_ops=3)
    raw = patched(stream.raw, stream.clusters[0], struct.pack("<BBHQQ", ZERO, 0, 0, 7, 0))
    assert refused(raw, "COW-28").offset == stream.clusters[0] + 20


@every_layout
def test_v27_overlap(version: int, cluster_ops: int) -> None:
    """V27 (COW-61, COW-209): no target block twice; both ops are named."""
    stream = raw_stream([*OPS, Rec(LABEL, 0, 1), Rec(ZERO, 5)], version, cluster_ops=cluster_ops)
    error = refused(stream.raw, "V27")
    at_record(error, stream, 5, 4)
    assert "block 5 is already written by op 1" in str(error)


@every_layout
@pytest.mark.parametrize("record", [Rec(ZERO, 3, 5), Rec(ZERO, 3, data_length=1), Rec(COPY, 3, 7, data_length=2)])
def test_v28_fields_that_must_be_zero(version: int, cluster_ops: int, record: Rec) -> None:
    """V28: what version 3 refuses in copy and zero ops is refused here too."""
    payload = bytes(record.data_length or 0)
    stream = raw_stream([Rec(COPY, 1, 1), record._replace(payload=payload)], version, cluster_ops=cluster_ops or 8)
    at_record(refused(stream.raw, "V28"), stream, 1, 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("record", "target_blocks"), [(Rec(COPY, 3, 8), 8), (Rec(XOR, 3, 7 * 4096 + 1, BLOCK), 8), (Rec(ZERO, 8), 8)]
)
def test_v30_blocks_outside_the_images(version: int, record: Rec, target_blocks: int) -> None:
    """V30: a source behind the base or a target behind the image, once the sizes are known."""
    cow = CowFile.parse(store(raw_stream([record], version).raw))
    with pytest.raises(CowError) as caught:
        cow.check_sizes(8, target_blocks)
    assert (caught.value.statement, caught.value.op_index) == ("V30", 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_v31_order_that_does_not_merge(version: int) -> None:
    """V31 (COW-75, COW-76): what stops an ordered merge is said when it is asked for."""
    cow = CowFile.parse(store(raw_stream([Rec(COPY, 2, 1), Rec(COPY, 3, 2)], version).raw))
    assert order_fault(cow).startswith("op 1: reads block 2")


@pytest.mark.parametrize(
    ("records", "statement", "record"),
    [
        ([Rec(COPY, 3, 7), sequence_of(3)], "COW-58", 1),
        ([sequence_of(3), Rec(LABEL, 0, 1), sequence_of(4)], "COW-58", 2),
        ([Rec(SEQUENCE, payload=bytes(7))], "COW-58", 0),
        ([sequence_of(3), sequence_of(4)._replace(source=9), Rec(COPY, 3, 7)], "COW-37", 1),
        ([sequence_of(3)._replace(code=GZ), Rec(COPY, 3, 7), Rec(REPLACE, 4, payload=BLOCK, code=LZ4)], "V17", 2),
    ],
)
def test_sequence_ops(records: list[Rec], statement: str, record: int) -> None:
    """COW-37, COW-58: before all other ops, whole entries, in their place."""
    stream = raw_stream(records, cluster_ops=16)
    assert refused(stream.raw, statement).offset == stream.records[record]


def test_a_sequence_behind_the_end() -> None:
    """V20: the list of a sequence op must lie in the file."""
    stream = raw_stream([sequence_of(1, 2), Rec(LABEL, 0, 1)], cluster_ops=8, finish=False)
    error = refused(stream.raw[:-1], "V20", label=1)
    at_record(error, stream, 0, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_cow_26_sequence_without_clusters(version: int) -> None:
    """COW-26: the next record lies where the list is, so there is no list to read."""
    stream = raw_stream([sequence_of(3), Rec(COPY, 3, 7)], version)
    at_record(refused(stream.raw, "COW-26"), stream, 0, None)


@every_layout
@pytest.mark.parametrize(
    ("payload", "code", "statement"),
    [(b"", GZ, "COW-109"), (b"", NONE, "COW-109"), (BLOCK[:-1], NONE, "COW-107"), (BLOCK + b"A", NONE, "COW-107")],
)
def test_payload_lengths(version: int, cluster_ops: int, payload: bytes, code: int, statement: str) -> None:
    """COW-107, COW-108, COW-109: never empty, and without compression exactly one block."""
    for kind in (REPLACE, XOR):
        record = Rec(kind, 5, None if kind == REPLACE else 0, payload, code)
        ops = [Rec(COPY, 3, 7), record, *([Rec(REPLACE, 6, payload=PACKED, code=code)] if code else [])]
        stream = raw_stream(ops, version, cluster_ops=cluster_ops)
        at_record(refused(stream.raw, statement), stream, 1, 1)


def test_a_stream_longer_than_its_block() -> None:
    """COW-105: in versions 1 and 2 gz and brotli may take more bytes than the block has."""
    for length in (4096, 4107, 65535):
        stream = raw_stream([Rec(REPLACE, 5, payload=bytes(length), code=GZ)])
        assert CowFile.parse(store(stream.raw)).ops.data_length.tolist() == [length]


def test_nothing_is_parsed_behind_the_footer() -> None:
    """COW-39: the first footer ends the stream."""
    stream = raw_stream([Rec(ZERO, 5)])
    assert stream.raw[stream.footer] == FOOTER
    assert CowFile.parse(store(stream.raw + stream.raw[38:])).op_count == 1

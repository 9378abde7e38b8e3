"""How calls become units and files: cuts, threads, what memory keeps, and how large a file gets (sections 10, 12)."""

from random import Random

import pytest
from cow_writing import BLOCK, VERSIONS, begin, content, options

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import CowWriter, WriterOptions, check_unit_size, create_writer, unit_lengths


@pytest.mark.parametrize("unit", [4096, 8192, 16384, 32768, 65536, 131072, 262144])
def test_legal_units(unit: int) -> None:
    """COW-112: seven sizes, stored as max_compression_size."""
    check_unit_size(unit)
    store, writer = begin(options(3, unit=unit))
    writer.finalize()
    assert CowFile.parse(store).header.max_compression_size == unit


@pytest.mark.parametrize("unit", [0, 512, 2048, 4095, 12288, 524288, -4096])
def test_illegal_units(unit: int) -> None:
    """COW-112: anything else fails."""
    with pytest.raises(SnapdError, match="COW-112"):
        check_unit_size(unit)
    with pytest.raises(SnapdError, match="COW-112"):
        options(3, unit=unit)


@pytest.mark.parametrize(
    ("blocks", "unit_blocks", "expected"),
    [
        (259, 16, [16] * 16 + [2, 1]),
        (200, 64, [64] * 3 + [8]),
        (59, 64, [32, 16, 8, 2, 1]),
        (5, 1, [1] * 5),
        (0, 16, []),
        (16, 16, [16]),
    ],
)
def test_runs_are_cut_greedily(blocks: int, unit_blocks: int, expected: list[int]) -> None:
    """COW-113, COW-114: the largest power of two that fits, again and again."""
    assert unit_lengths(blocks, unit_blocks) == expected


@pytest.mark.parametrize(
    ("cluster_ops", "unit", "expected"),
    [
        (1024, 65536, [16] * 16 + [2, 1]),
        (200, 262144, [64, 64, 64, 8, 32, 16, 8, 2, 1]),
        (1, 262144, [1] * 259),
        (0, 262144, [1] * 259),
    ],
)
def test_units_of_one_call(cluster_ops: int, unit: int, expected: list[int]) -> None:
    """COW-57, COW-113, COW-114, COW-115: no unit crosses a batch, and none is aligned."""
    store, writer = begin(options(3, max_blocks=300, op_count_max=300, cluster_ops=cluster_ops, unit=unit))
    writer.raw(1, BLOCK * 259)
    writer.finalize()
    ops = CowFile.parse(store).ops
    assert ops.blocks.tolist() == expected
    assert ops.new_block.tolist() == [1 + sum(expected[:i]) for i in range(len(expected))]


def test_version_2_has_one_block_an_op() -> None:
    """COW-111, COW-105: however much a call brings; and no payload is longer than 16 bits can say."""
    store, writer = begin(options(2, "gz"))
    writer.raw(10, BLOCK * 5)
    with pytest.raises(CowError, match="COW-109"):
        writer.put(OpType.REPLACE, 20, 1, 0, bytes(1 << 16))
    writer.finalize()
    ops = CowFile.parse(store).ops
    assert (ops.blocks.tolist(), ops.new_block.tolist()) == ([1] * 5, list(range(10, 15)))


def test_units_end_with_their_call() -> None:
    """COW-113, COW-116: two calls are two units at least; XOR ops have one block each."""
    store, writer = begin(options(3, unit=65536))
    writer.raw(0, BLOCK * 2)
    writer.raw(2, BLOCK * 2)
    writer.xor(4, BLOCK * 2, 7, 100)
    writer.finalize()
    ops = CowFile.parse(store).ops
    assert ops.blocks.tolist() == [2, 2, 1, 1]
    assert ops.source[2:].tolist() == [7 * 4096 + 100, 8 * 4096 + 100]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("algorithm", ["none", "gz", "brotli,2", "lz4", "zstd"])
def test_the_file_is_the_same_for_any_number_of_threads(version: int, algorithm: str) -> None:
    """COW-110: several MiB, so that every thread has its hands full, and ops of other kinds in between."""
    random = Random(7)
    data = b"".join(random.randbytes(2048) + bytes(2048) for _ in range(600))
    files = set()
    for threads in (1, 2, 4):
        settings = options(version, algorithm, max_blocks=2000, op_count_max=2000, threads=threads)
        store, writer = begin(settings)
        buffer = bytearray(data)
        writer.raw(0, buffer)
        # A buffer belongs to the caller again as soon as the call is over.
        buffer[:] = bytes(len(buffer))
        writer.copy(600, 5, 100)
        writer.xor(700, data[: 300 * 4096], 3, 17)
        writer.raw(1000, data)
        writer.finalize()
        writer.close()
        files.add(content(store))
    assert len(files) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_payloads_encoded_elsewhere_make_the_same_file(version: int) -> None:
    """COW-110: what a caller's own threads encode is what the writer's would."""
    settings = options(version, "zstd", unit=65536 if version == 3 else 4096)
    blocks = 4 if version == 3 else 1
    data = Random(3).randbytes(2048) * 2 * blocks

    def elsewhere(writer: CowWriter) -> None:
        encoder = settings.encoder()
        writer.put(OpType.REPLACE, 9, blocks, 0, encoder.encode(data))
        writer.put(OpType.XOR, 20, 1, 5000, encoder.encode(data[:4096]))

    def here(writer: CowWriter) -> None:
        writer.raw(9, data)
        writer.xor(20, data[:4096], 1, 904)

    files = set()
    for add in (elsewhere, here):
        store, writer = begin(settings)
        add(writer)
        writer.finalize()
        files.add(content(store))
    assert len(files) == 1


def test_nothing_counts_before_the_header_says_so() -> None:
    """COW-15, COW-43, COW-95, COW-96, COW-126: until a label or finalize the file on disk is one without ops."""
    store, writer = begin(options(3, max_blocks=600, op_count_max=600))
    for number in range(600):
        writer.raw(number, BLOCK)
        assert CowFile.parse(store).op_count == 0
    assert store.size() > 1 << 20
    writer.finalize()
    assert CowFile.parse(store).op_count == 600


def test_the_batch_bounds_what_is_kept() -> None:
    """COW-126, COW-132: with batches of two blocks, two blocks or 32 ops leave memory at once; `size` says so."""
    _, writer = begin(options(3, cluster_ops=2))
    empty = writer.size
    writer.raw(0, BLOCK)
    assert writer.size == empty
    writer.raw(1, BLOCK)
    assert writer.size == empty + 8192
    writer.raw(2, BLOCK)
    writer.zero(3, 30)
    assert writer.size == empty + 8192
    writer.zero(40)
    assert writer.size == empty + 3 * 4096


def test_estimates() -> None:
    """COW-130 to COW-134: the same calls without a file, with the sizes that the format's examples have."""
    found = []
    for version in (3, 2):
        writer = create_writer(None, WriterOptions(version=version))
        writer.copy(3, 7)
        writer.raw(5, BLOCK)
        writer.zero(6)
        before = writer.size
        writer.label(1)
        writer.finalize()
        found.append((before, writer.size, writer.op_count_max))
    assert found == [(2097294, 2101438, 3), (2121850, 2121850, 0)]


@pytest.mark.parametrize("cluster_ops", [0, 3, 1024])
def test_labels_are_part_of_an_estimate_of_version_2(cluster_ops: int) -> None:
    """COW-131, COW-136: they take records there; in version 3 they cost nothing."""
    sizes = {}
    for version in VERSIONS:
        for store in (None, SimDisk(Random(0)).store("cow")):
            writer = create_writer(store, options(version, cluster_ops=cluster_ops, op_count_max=5))
            for number in range(5):
                writer.zero(number)
                writer.label(number)
            sizes[version, store is None] = writer.size
            writer.finalize()
            assert writer.size == sizes[version, store is None]
            assert version == 3 or store is None or store.size() == writer.size
    assert sizes[2, True] == sizes[2, False]
    assert sizes[3, True] == sizes[3, False] == 78 + 64 + 5 * 16
    assert sizes[2, True] >= 38 + 10 * 20 + 84


def test_an_estimate_knows_the_slots_that_are_needed() -> None:
    """COW-132, COW-133: what it says is enough for the real writer, and not one slot too many."""
    estimate = create_writer(None, WriterOptions(unit=65536))

    def add(writer: CowWriter) -> None:
        writer.zero(0, 37)
        writer.raw(100, BLOCK * 39)

    add(estimate)
    estimate.finalize()
    assert estimate.op_count_max == 42
    for slots in (41, 42):
        _, writer = begin(WriterOptions(unit=65536, op_count_max=slots, scratch=False))
        if slots == 41:
            with pytest.raises(CowError, match="COW-127"):
                add(writer)
        else:
            add(writer)
            writer.finalize()
            assert writer.size + (2 << 20) == estimate.size


def test_slots_come_from_the_options() -> None:
    """COW-16, COW-49: op_count_max, else max_blocks; a file of version 3 needs one of them."""
    for settings, slots in ((WriterOptions(max_blocks=9), 9), (WriterOptions(op_count_max=3, max_blocks=9), 3)):
        assert create_writer(SimDisk(Random(0)).store("cow"), settings).op_count_max == slots
    store = SimDisk(Random(0)).store("cow")
    with pytest.raises(CowError, match="COW-49"):
        create_writer(store, WriterOptions())
    assert store.size() == 0

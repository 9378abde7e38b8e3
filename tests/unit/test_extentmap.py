"""The extent map: the same lookup as the COW, and never a damaged one."""

import os
import tempfile
from collections.abc import Iterator
from random import Random

import pytest
from cowfiles import block, diff, extent_map, image, written

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.format import BLOCK_SIZE, Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap, Run
from snapd.cow.parse.reader import CowFile

OLD = image([1, 2, 3, 4, 5, 6])
NEW = image([1, 9, 9, 4, 0, 5, 8, 8])
COW, _ = diff(OLD, NEW)


@pytest.fixture
def saved() -> Iterator[int]:
    """A descriptor of the file form."""
    with tempfile.TemporaryFile() as file:
        extent_map(COW, OLD).save(file.fileno())
        yield file.fileno()


def test_file_form_is_the_same_map(saved: int) -> None:
    """Every field and every entry survives."""
    made, loaded = extent_map(COW, OLD), ExtentMap.load(saved)
    assert list(loaded.runs(0, 8)) == list(made.runs(0, 8))
    assert (list(loaded.starts), list(loaded.whats)) == (list(made.starts), list(made.whats))
    assert (bytes(loaded.records), list(loaded.payloads)) == (bytes(made.records), list(made.payloads))
    assert loaded.digests is None
    assert loaded.version == 3
    assert (loaded.block_size, loaded.max_unit, loaded.compression) == (BLOCK_SIZE, 64 << 10, Compression.ZSTD)
    assert loaded.ops_digest == made.ops_digest
    assert [loaded.op(index) for index in range(loaded.op_count)] == [made.op(i) for i in range(made.op_count)]


def test_any_flipped_byte_is_noticed(saved: int) -> None:
    """A map with one changed byte is refused, wherever the byte is."""
    size = os.fstat(saved).st_size
    random = Random(1)
    for at in [*range(80), *(random.randrange(80, size) for _ in range(60)), size - 1]:
        healthy = os.pread(saved, 1, at)
        os.pwrite(saved, bytes([healthy[0] ^ 1 << random.randrange(8)]), at)
        with pytest.raises(SnapdError, match="extent map"):
            ExtentMap.load(saved)
        os.pwrite(saved, healthy, at)
    assert ExtentMap.load(saved).block_count == 8


@pytest.mark.parametrize("change", [-1, 1, 16, -16])
def test_another_length_is_noticed(saved: int, change: int) -> None:
    """A map that is cut off or has something behind it is refused."""
    os.ftruncate(saved, os.fstat(saved).st_size + change)
    with pytest.raises(SnapdError, match="extent map"):
        ExtentMap.load(saved)


@pytest.mark.parametrize("length", [0, 10, 79])
def test_less_than_a_header_is_noticed(length: int) -> None:
    """An empty or torn file is refused."""
    with tempfile.TemporaryFile() as file:
        file.truncate(length)
        with pytest.raises(SnapdError, match="extent map"):
            ExtentMap.load(file.fileno())


def test_changed_extents_are_the_runs_with_ops() -> None:
    """Ascending, maximal, cut at the borders asked for."""
    made = extent_map(COW, OLD)
    assert list(made.changed_extents(0, 8)) == [Extent(1, 2), Extent(4, 4)]
    assert list(made.changed_extents(2, 5)) == [Extent(2, 1), Extent(4, 1)]
    assert list(made.changed_extents(3, 4)) == []
    assert list(made.changed_extents(4, 4)) == []
    assert made.changed_blocks() == 6


def test_runs_join_what_is_served_the_same_way() -> None:
    """A copy that goes on, zeros, and units of one size whose ops follow each other are one run each."""
    cow = written(
        ("copy", 9, 3),
        ("copy", 8, 2),
        ("copy", 7, 5),
        ("zero", 4, 0),
        ("zero", 3, 0),
        ("replace", 10, image([1, 2])),
        ("replace", 12, image([3, 4])),
        ("replace", 14, block(5)),
        ("replace", 0, block(6)),
        unit=8 << 10,
    )
    made = extent_map(cow, bytes(16 * BLOCK_SIZE))
    assert list(made.runs(0, 16)) == [
        Run(0, 1, OpType.REPLACE, 1, 8),
        Run(1, 2, UNCHANGED, 1, 0),
        Run(3, 2, OpType.ZERO, 1, 0),
        Run(5, 2, UNCHANGED, 1, 0),
        Run(7, 1, OpType.COPY, 1, 5),
        Run(8, 2, OpType.COPY, 1, 2),
        Run(10, 4, OpType.REPLACE, 2, 5),
        Run(14, 1, OpType.REPLACE, 1, 7),
        Run(15, 1, UNCHANGED, 1, 0),
    ]
    assert list(made.runs(11, 12)) == [Run(10, 4, OpType.REPLACE, 2, 5)]


def test_an_image_with_few_changes_has_a_small_map() -> None:
    """What a map takes depends on the runs, not on the size of the image."""
    cow = written(("zero", 5, 0), ("copy", 900_000, 17))
    made = CowFile.parse(cow).extent_map(1_000_000 * BLOCK_SIZE)
    assert made.run_count == 5
    assert made.block_count == 1_000_000


def test_an_image_without_blocks_has_no_map() -> None:
    """A target of no bytes is refused with its size."""
    cow, _ = diff(block(1), block(1))
    with pytest.raises(SnapdError, match="target of 0 bytes"):
        extent_map(cow, b"")


def test_a_target_of_more_blocks_than_have_numbers_is_refused() -> None:
    """COW-23: 2^32 blocks would wrap to none."""
    cow = CowFile.parse(written(("zero", 5, 0)))
    assert cow.extent_map(0xFFFFFFFF * BLOCK_SIZE).block_count == 0xFFFFFFFF
    with pytest.raises(SnapdError, match="4294967296 blocks"):
        cow.extent_map(BLOCK_SIZE << 32)

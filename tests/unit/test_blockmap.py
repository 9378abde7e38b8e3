"""The block map: the same lookup as the COW, and never a damaged one."""

import os
import tempfile
from collections.abc import Iterator
from random import Random

import pytest
from cowfiles import block, block_map, diff, image

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.blockmap import NO_OP, BlockMap
from snapd.cow.format import BLOCK_SIZE, Compression

OLD = image([1, 2, 3, 4, 5, 6])
NEW = image([1, 9, 9, 4, 0, 5, 8, 8])
COW, _ = diff(OLD, NEW)


@pytest.fixture
def saved() -> Iterator[int]:
    """A descriptor of the file form."""
    with tempfile.TemporaryFile() as file:
        block_map(COW, OLD).save(file.fileno())
        yield file.fileno()


def test_file_form_is_the_same_map(saved: int) -> None:
    """Every field and every entry survives."""
    made, loaded = block_map(COW, OLD), BlockMap.load(saved)
    assert list(loaded.op_of_block) == list(made.op_of_block)
    assert bytes(loaded.ops) == bytes(made.ops)
    assert (loaded.block_size, loaded.max_unit, loaded.compression) == (BLOCK_SIZE, 64 << 10, Compression.ZSTD)
    assert loaded.ops_digest == made.ops_digest
    assert [loaded.op(index) for index in range(loaded.op_count)] == [made.op(i) for i in range(made.op_count)]


def test_any_flipped_byte_is_noticed(saved: int) -> None:
    """A map with one changed byte is refused, wherever the byte is."""
    size = os.fstat(saved).st_size
    random = Random(1)
    for at in [*range(56), *(random.randrange(64, size) for _ in range(60)), size - 1]:
        healthy = os.pread(saved, 1, at)
        os.pwrite(saved, bytes([healthy[0] ^ 1 << random.randrange(8)]), at)
        with pytest.raises(SnapdError, match="block map"):
            BlockMap.load(saved)
        os.pwrite(saved, healthy, at)
    assert BlockMap.load(saved).block_count == 8


@pytest.mark.parametrize("change", [-1, 1, 16, -16])
def test_another_length_is_noticed(saved: int, change: int) -> None:
    """A map that is cut off or has something behind it is refused."""
    os.ftruncate(saved, os.fstat(saved).st_size + change)
    with pytest.raises(SnapdError, match="block map"):
        BlockMap.load(saved)


@pytest.mark.parametrize("length", [0, 10, 63])
def test_less_than_a_header_is_noticed(length: int) -> None:
    """An empty or torn file is refused."""
    with tempfile.TemporaryFile() as file:
        file.truncate(length)
        with pytest.raises(SnapdError, match="block map"):
            BlockMap.load(file.fileno())


def test_changed_extents_are_the_runs_with_ops() -> None:
    """Ascending, maximal, cut at the borders asked for."""
    made = block_map(COW, OLD)
    assert list(made.changed_extents(0, 8)) == [Extent(1, 2), Extent(4, 4)]
    assert list(made.changed_extents(2, 5)) == [Extent(2, 1), Extent(4, 1)]
    assert list(made.changed_extents(3, 4)) == []
    assert made.op_of_block[0] == NO_OP


def test_an_image_without_blocks_has_no_map() -> None:
    """A target of no bytes is refused with its size."""
    cow, _ = diff(block(1), block(1))
    with pytest.raises(SnapdError, match="target of 0 bytes"):
        block_map(cow, b"")

"""The shared map: what readers may use of a merge in progress."""

import os
import uuid

import pytest
from merge_world import memory_file
from zeromap import zero_map

from snapd.block.errors import SnapdError
from snapd.cow.image.extentmap import ExtentMap
from snapd.merge.sharedmap import MERGED, PENDING, UNTOUCHED, SharedMap

SNAPSHOT = uuid.UUID(int=1)


def extent_map(changed: str) -> ExtentMap:
    """A map with a block for each character, those with an op marked `x`."""
    return zero_map({block for block, mark in enumerate(changed) if mark == "x"}, len(changed))


def test_a_new_map_lets_only_untouched_blocks_through() -> None:
    """UNDO-26: before a merge only blocks outside T may be read from the base."""
    with memory_file() as fd:
        shared = SharedMap.create(fd, extent_map("-xx-"), SNAPSHOT, 4)
    assert [shared.state(b) for b in range(4)] == [UNTOUCHED, PENDING, PENDING, UNTOUCHED]
    assert shared.undo_op_count == 0
    assert shared.new_view_on_base(3, 4)
    assert not shared.new_view_on_base(0, 2)


def test_another_mapping_sees_what_is_published() -> None:
    """UNDO-12 c': the reader's mapping is of the same file."""
    with memory_file() as fd:
        writer = SharedMap.create(fd, extent_map("xx"), SNAPSHOT, 4)
        reader = SharedMap(fd)
    writer.publish(1 << 40)
    writer.mark_merged(0, 1)
    assert reader.undo_op_count == 1 << 40
    assert (reader.snapshot, reader.generation, reader.block_count) == (SNAPSHOT, 4, 2)
    assert [reader.state(b) for b in range(2)] == [MERGED, PENDING]


def test_marking_a_range_leaves_blocks_without_op_untouched() -> None:
    """UNDO-26: a range that is done may contain blocks that no merge writes; those stay right in both views."""
    with memory_file() as fd:
        shared = SharedMap.create(fd, extent_map("x-x"), SNAPSHOT, 1)
    shared.mark_merged(0, 3)
    assert [shared.state(b) for b in range(3)] == [MERGED, UNTOUCHED, MERGED]
    assert shared.new_view_on_base(0, 3)


def test_withdrawing_takes_back_every_mark() -> None:
    """UNDO-26: before a rollback writes, nothing of T is passed down; the undo count stays."""
    with memory_file() as fd:
        shared = SharedMap.create(fd, extent_map(("-xx" * 1667)[:5000]), SNAPSHOT, 1)
    shared.publish(9)
    shared.mark_merged(0, 5000)
    shared.withdraw()
    assert [shared.state(b) for b in range(5000)] == [UNTOUCHED if b % 3 == 0 else PENDING for b in range(5000)]
    assert shared.undo_op_count == 9


@pytest.mark.parametrize("damage", [b"", b"short", b"X" * 66])
def test_what_is_not_a_map_is_refused(damage: bytes) -> None:
    """A file of another kind or length never counts as one."""
    with memory_file() as fd:
        os.pwrite(fd, damage, 0)
        with pytest.raises(SnapdError, match="shared map"):
            SharedMap(fd)

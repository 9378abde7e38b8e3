"""The full read path over a COW of every kind of op: any sectors, and errors for exactly the blocks concerned."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from workerimages import WorkerImages

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.block.lock import locked_store
from snapd.cow.digests import load_digests
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile


@contextlib.contextmanager
def opened(images: WorkerImages) -> Iterator[CowView]:
    """A view of the COW as it is now, with its digests if there are any."""
    with locked_store(images.cow) as payloads, locked_store(images.base) as base:
        cow = CowFile.parse(payloads)
        extent_map = cow.extent_map(len(images.old), digests=load_digests(images.cow, cow))
        yield CowView(extent_map, payloads, source=base, base=base)


def read(view: CowView, sector: int, count: int) -> bytes:
    buffer = bytearray(count * SECTOR_BYTES)
    view.read_into(buffer, sector * SECTOR_BYTES)
    return bytes(buffer)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_start_and_length(tmp_path: Path, seed: int, digests: bool) -> None:
    """SNAP-67 to SNAP-77: starts at each sector around every border between runs, over any mix of them."""
    images = WorkerImages(tmp_path, seed, digests=digests)
    random = Random(seed)
    assert {kind for kind, _, _ in images.runs} == {"unchanged", "packed", "raw", "xor", "copy", "zero"}
    with opened(images) as view:
        for _, first, _ in images.runs:
            for sector in range(max(0, first * 8 - 9), min(len(images.new) // SECTOR_BYTES, first * 8 + 9)):
                count = random.choice([1, 3, 7, 8, 9, 16, 133, 600])
                count = min(count, len(images.new) // SECTOR_BYTES - sector)
                start = sector * SECTOR_BYTES
                assert read(view, sector, count) == images.new[start : start + count * SECTOR_BYTES], (seed, sector)
        assert read(view, 0, len(images.new) // SECTOR_BYTES) == images.new


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("unit_blocks", [1, 2, 4, 8, 16])
def test_a_damaged_unit_fails_exactly_its_blocks(tmp_path: Path, unit_blocks: int, digests: bool) -> None:
    """COW-120, SNAP-78: each block of the unit, in any part, always; no other block; requests that touch one."""
    images = WorkerImages(tmp_path, 3, digests=digests)
    damaged = images.damage(images.packed_op(unit_blocks))
    near = range(max(0, damaged.start - 20), damaged.stop + 20)
    with opened(images) as view:
        # Twice: neither the damage nor what was decoded before it is remembered wrongly.
        for block in [*near, *near]:
            for sector, count in ((block * 8, 8), (block * 8 + 3, 1)):
                start = sector * SECTOR_BYTES
                if block in damaged:
                    with pytest.raises(CowError):
                        read(view, sector, count)
                else:
                    assert read(view, sector, count) == images.new[start : start + count * SECTOR_BYTES]
        with pytest.raises(CowError):
            read(view, near.start * 8, len(near) * 8)
        before = near.start * 8, (damaged.start - near.start) * 8
        assert read(view, *before) == images.new[near.start * BLOCK_SIZE : damaged.start * BLOCK_SIZE]


def test_a_changed_raw_unit_fails_one_block(tmp_path: Path) -> None:
    """COW-216: what only the digests can tell costs the block that it is in; its unit's others are served."""
    images = WorkerImages(tmp_path, 4, digests=True)
    op_map = images.extent_map()
    index = next(
        i for i in range(op_map.op_count) if op_map.op(i).blocks == 16 and op_map.op(i).data_length == 16 * BLOCK_SIZE
    )
    op = op_map.op(index)
    with open(images.cow, "r+b") as file:
        file.seek(op_map.payloads[index] + 5 * BLOCK_SIZE + 7)
        file.write(bytes([images.new[(op.new_block + 5) * BLOCK_SIZE + 7] ^ 1]))
    with opened(images) as view:
        for block in range(op.new_block, op.new_block + 16):
            if block == op.new_block + 5:
                with pytest.raises(CowError, match=f"block {block} of the image does not match"):
                    read(view, block * 8, 8)
            else:
                assert read(view, block * 8, 8) == images.new[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]


def test_a_base_that_cannot_be_read_fails_what_comes_from_it(tmp_path: Path) -> None:
    """SNAP-69: a base cut short under us: blocks of the COW's own are served, the others are errors, one by one."""
    images = WorkerImages(tmp_path, 5)
    with opened(images) as view:
        with open(images.base, "r+b") as file:
            file.truncate(0)
        for kind, first, count in images.runs:
            for block in range(first, min(first + count, first + 3)):
                if kind in ("packed", "raw", "zero"):
                    assert read(view, block * 8, 8) == images.new[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
                else:
                    with pytest.raises(SnapdError, match="behind the end"):
                        read(view, block * 8, 8)

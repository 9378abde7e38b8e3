"""What is claimed to be zeros is zeros, and no more than a bounded part is looked at."""

import os
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest
from zeromap import kinds_map, zero_map

from snapd.block.file import FileStore
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import UNCHANGED
from snapd.device.allocation import MAX_STEPS, Allocation

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK
DATA, ZEROS = 0, 3


@pytest.fixture
def store() -> Iterator[FileStore]:
    """An empty file on a file system that knows holes."""
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE):
            pytest.skip("this file system has no holes")
        yield FileStore(file.fileno(), "image")


def fill(store: FileStore, *blocks: int) -> None:
    for block in blocks:
        store.write(b"d" * BLOCK, block * BLOCK)


def states(allocation: Allocation, offset: int, length: int, limit: int = 1 << 20) -> list[int]:
    """The state of every byte, asked for in as many calls as it takes; checks the form of each answer."""
    found: list[int] = []
    while len(found) < length:
        extents = allocation.extents(offset + len(found), length - len(found), limit)
        assert 1 <= len(extents) <= limit
        assert all(one[1] != following[1] for one, following in pairwise(extents))
        for bytes_, state in extents:
            assert bytes_ > 0
            found += [state] * bytes_
    assert len(found) == length
    return found


def test_holes_of_a_raw_store(store: FileStore) -> None:
    fill(store, 3, 4, 10)
    allocation = Allocation(store)
    expected = [(3 * BLOCK, ZEROS), (2 * BLOCK, DATA), (5 * BLOCK, ZEROS), (BLOCK, DATA), (53 * BLOCK, ZEROS)]
    assert allocation.extents(0, SIZE, 100) == expected
    assert allocation.extents(0, SIZE, 2) == expected[:2]
    assert allocation.extents(5 * BLOCK - 1, 3, 100) == [(1, DATA), (2, ZEROS)]
    assert allocation.extents(SIZE - 1, 1, 1) == [(1, ZEROS)]


def test_a_raw_store_changes(store: FileStore) -> None:
    """Writes and discards show at once."""
    allocation = Allocation(store)
    assert allocation.extents(0, SIZE, 9) == [(SIZE, ZEROS)]
    fill(store, 1, 2)
    assert allocation.extents(0, SIZE, 9) == [(BLOCK, ZEROS), (2 * BLOCK, DATA), (61 * BLOCK, ZEROS)]
    store.discard(2 * BLOCK, BLOCK)
    assert allocation.extents(0, SIZE, 9) == [(BLOCK, ZEROS), (BLOCK, DATA), (62 * BLOCK, ZEROS)]


def test_a_hole_at_the_end(store: FileStore) -> None:
    """A file whose last block is cut short."""
    fill(store, BLOCKS - 2)
    store.truncate(SIZE - 1000)
    assert Allocation(store).extents(SIZE - 2 * BLOCK, 2 * BLOCK - 1000, 9) == [(BLOCK, DATA), (BLOCK - 1000, ZEROS)]


def test_behind_the_base_nothing_is_claimed(store: FileStore) -> None:
    """UNDO-23: what lies behind the base is not read from it; the system would call it a hole."""
    store.truncate(SIZE // 2 + 100)
    larger = kinds_map([UNCHANGED] * BLOCKS)
    assert Allocation(store, larger).extents(0, SIZE, 9) == [(SIZE // 2 + 100, ZEROS), (SIZE // 2 - 100, DATA)]
    assert Allocation(store).extents(SIZE - BLOCK, BLOCK, 9) == [(BLOCK, DATA)]


def test_a_base_that_is_cut_again(store: FileStore) -> None:
    """UNDO-23: a rollback ends with the base as long as it was; what was known of the rest is not believed any more."""
    allocation = Allocation(store, kinds_map([UNCHANGED] * BLOCKS))
    assert allocation.extents(0, SIZE, 9) == [(SIZE, ZEROS)]
    store.truncate(SIZE // 2)
    assert allocation.extents(0, SIZE, 9) == [(SIZE // 2, ZEROS), (SIZE // 2, DATA)]


def test_behind_the_map_nothing_is_claimed(store: FileStore) -> None:
    assert Allocation(store, zero_map({1}, 2)).extents(0, SIZE, 9) == [(2 * BLOCK, ZEROS), (SIZE - 2 * BLOCK, DATA)]


def test_where_holes_cannot_be_told_all_is_data() -> None:
    """A device node, as a block device is, and no store at all."""
    with open("/dev/zero", "rb") as device:
        assert Allocation(FileStore(device.fileno())).extents(5, SIZE, 9) == [(SIZE, DATA)]
        over = zero_map({1}, BLOCKS)
        assert Allocation(FileStore(device.fileno()), over).extents(0, SIZE, 9) == [
            (BLOCK, DATA),
            (BLOCK, ZEROS),
            (62 * BLOCK, DATA),
        ]
    assert Allocation(None).extents(5, SIZE, 1) == [(SIZE, DATA)]


def test_ops_hide_the_holes_of_the_base(store: FileStore) -> None:
    """Only a zero op says zeros; a copy out of a hole is data, since its source is not looked at."""
    fill(store, 2)
    kinds: list[int] = [UNCHANGED] * BLOCKS
    kinds[1:6] = [OpType.COPY, UNCHANGED, OpType.ZERO, OpType.REPLACE, OpType.XOR]
    assert Allocation(store, kinds_map(kinds)).extents(0, SIZE, 9) == [
        (BLOCK, ZEROS),
        (2 * BLOCK, DATA),
        (BLOCK, ZEROS),
        (2 * BLOCK, DATA),
        (58 * BLOCK, ZEROS),
    ]


def test_a_merge_turns_no_claim_into_a_lie(store: FileStore) -> None:
    """The merge writes ranges with ops only, and zeros or a hole where the op says zero (UNDO-26)."""
    kinds: list[int] = [OpType.ZERO, OpType.REPLACE, UNCHANGED, OpType.ZERO, *([UNCHANGED] * 60)]
    fill(store, 0, 3)
    allocation = Allocation(store, kinds_map(kinds))
    before = [(BLOCK, ZEROS), (BLOCK, DATA), (62 * BLOCK, ZEROS)]
    assert allocation.extents(0, SIZE, 9) == before
    store.zero(0, BLOCK)
    fill(store, 1)
    store.discard(3 * BLOCK, BLOCK)
    assert allocation.extents(0, SIZE, 9) == before


def test_work_is_bounded(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of very many runs that make one extent is walked in several calls, all of which get on."""
    runs = 3 * MAX_STEPS
    kinds: list[int] = [OpType.REPLACE, OpType.COPY] * (runs // 2)
    extent_map = kinds_map(kinds)
    allocation = Allocation(store, extent_map)
    walked: list[int] = []
    run_of = extent_map.run_of

    def counted(block: int) -> int:
        walked.append(block)
        return run_of(block)

    monkeypatch.setattr(extent_map, "run_of", counted)
    at = 0
    while at < runs * BLOCK:
        walked.clear()
        ((length, state),) = allocation.extents(at, runs * BLOCK - at, 9)
        assert state == DATA
        assert length > 0
        assert len(walked) <= MAX_STEPS
        at += length
    assert at == runs * BLOCK


def test_an_extent_of_a_base_is_looked_for_once(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the ranges asked for: some file systems look for its end page by page."""
    fill(store, *range(8, 40))
    looks: list[tuple[int, int]] = []
    seek = os.lseek

    def counted(fd: int, at: int, how: int) -> int:
        looks.append((at, how))
        return seek(fd, at, how)

    monkeypatch.setattr(os, "lseek", counted)
    allocation = Allocation(store, kinds_map([UNCHANGED] * BLOCKS))
    found = [allocation.extents(at, 512, 9)[0][1] for at in range(0, SIZE, 512)]
    assert found == [ZEROS] * 64 + [DATA] * 256 + [ZEROS] * 192
    assert len(looks) == 4


@pytest.mark.parametrize("seed", range(25))
def test_random_maps_over_random_holes(store: FileStore, seed: int) -> None:
    """Every byte, asked for from any offset in any pieces, against a model of what it reads as."""
    random = Random(seed)
    base_blocks = random.randrange(BLOCKS // 2, BLOCKS + 1)
    store.truncate(base_blocks * BLOCK)
    full = [random.random() < 0.5 for _ in range(base_blocks)]
    fill(store, *(block for block, is_full in enumerate(full) if is_full))
    kinds = random.choices([UNCHANGED, OpType.ZERO, OpType.REPLACE, OpType.COPY], [6, 2, 1, 1], k=BLOCKS)
    extent_map = kinds_map(kinds) if random.randrange(3) else None
    expected = []
    for block in range(BLOCKS):
        kind = kinds[block] if extent_map else UNCHANGED
        is_hole = kind == UNCHANGED and block < base_blocks and not full[block]
        expected += [ZEROS if is_hole or kind == OpType.ZERO else DATA] * BLOCK
    allocation = Allocation(store, extent_map)
    for _ in range(6):
        offset = random.randrange(SIZE)
        length = random.randrange(1, SIZE - offset + 1)
        limit = random.choice([1, 2, 5, 1000])
        assert states(allocation, offset, length, limit) == expected[offset : offset + length], f"seed {seed}"

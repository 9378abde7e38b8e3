"""Moved data is found at any byte, within bounds, and nothing that is not there."""

from random import Random

import numpy as np
import pytest
from cowfiles import content, diff, merged_in_order, store
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.diff import anchors
from snapd.cow.diff.anchors import AnchorIndex, Picker
from snapd.cow.diff.blockrows import NONE
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.xormode import XorMode
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.parse.reader import CowFile
from snapd.cow.progress import Meter

NOISE = Random(1).randbytes(200 * BLOCK_SIZE)


def searched(old: bytes, new: bytes, compress: str = "zstd", version: int = 3) -> tuple[int, int, int]:
    """Copied, XORed and replaced blocks of a diff with a search, which is exact and merges."""
    options = CreateOptions(compression=CompressOption.parse(compress), version=version, xor=XorMode.SEARCH)
    cow, counts = diff(old, new, options)
    assert content(cow, old, len(new)) == new
    assert merged_in_order(cow, old, len(new)) == new
    return counts.copy_blocks, counts.xor_blocks, counts.replace_blocks


@pytest.mark.parametrize("shift", [1, 37, 4095, 4097, 3 * BLOCK_SIZE + 100])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_moved_data_is_found_at_any_byte(shift: int, up: bool, version: int) -> None:
    """What moved by an odd number of bytes, either way, becomes XOR, but for the blocks that are new."""
    inserted = Random(2).randbytes(shift) + NOISE[: 100 * BLOCK_SIZE]
    size = len(inserted) // BLOCK_SIZE * BLOCK_SIZE
    old, new = NOISE[: 100 * BLOCK_SIZE], inserted[:size]
    if not up:
        old, new = new, old
    _, xors, replaced = searched(old, new, version=version)
    assert xors >= 98
    assert replaced <= 2 + shift // BLOCK_SIZE


def test_moved_data_costs_next_to_nothing() -> None:
    """A block that is byte for byte there, at whatever offset, is an XOR of zeros."""
    old, new = NOISE[: 50 * BLOCK_SIZE], NOISE[17 : 17 + 49 * BLOCK_SIZE]
    cow, _ = diff(old, new, CreateOptions(xor=XorMode.SEARCH))
    ops = CowFile.parse(cow).ops
    assert set(ops.type.tolist()) == {OpType.XOR}
    assert (ops.source.astype(np.int64) - ops.new_block.astype(np.int64) * BLOCK_SIZE).tolist() == [17] * 49
    assert int(ops.data_length.max()) < 40


@pytest.mark.parametrize("entries", [1 << 20, 1])
def test_moved_and_edited_blocks_are_found_through_their_neighbours(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edits in blocks that moved by whole blocks: the ones between copies are XOR ops, too, with hardly any anchors."""
    monkeypatch.setattr(anchors, "_INDEX_ENTRIES", entries)
    old = NOISE[: 80 * BLOCK_SIZE]
    new = bytearray(Random(3).randbytes(5 * BLOCK_SIZE) + old)
    # The first two have no neighbour before them that moved.
    edited = [5, 6, *range(10, 80, 3)]
    for block in edited:
        for at in range(0, BLOCK_SIZE, 256):
            new[block * BLOCK_SIZE + at] ^= 77
    copied, xors, replaced = searched(old, bytes(new))
    assert xors == len(edited)
    assert (copied, replaced) == (80 - xors, 5)


@pytest.mark.parametrize("first_bytes", [BLOCK_SIZE // 4, BLOCK_SIZE * 3 // 4])
def test_of_two_places_the_closer_one_is_taken(first_bytes: int) -> None:
    """A block whose parts moved by different distances takes that of the larger part."""
    switch = 20 * BLOCK_SIZE + first_bytes
    old = NOISE[: 90 * BLOCK_SIZE]
    new = old[100 : 100 + switch] + old[switch + 9999 : 40 * BLOCK_SIZE + 9999]
    cow, counts = diff(old, new, CreateOptions(xor=XorMode.SEARCH))
    ops = CowFile.parse(cow).ops
    distance = {op.new_block: op.source - op.new_block * BLOCK_SIZE for op in map(ops.op, range(len(ops)))}
    assert counts.xor_blocks == 40
    assert (distance[19], distance[21]) == (100, 9999)
    assert distance[20] == (100 if first_bytes > BLOCK_SIZE // 2 else 9999)


def test_own_place_goes_before_a_worse_one() -> None:
    """A block whose own place is closest is not moved."""
    old = NOISE[: 20 * BLOCK_SIZE]
    new = bytearray(old)
    new[::1000] = bytes(len(new[::1000]))
    cow, counts = diff(old, bytes(new), CreateOptions(xor=XorMode.SEARCH))
    ops = CowFile.parse(cow).ops
    assert counts.xor_blocks == 20
    assert (ops.source == ops.new_block.astype(np.uint64) * np.uint64(BLOCK_SIZE)).all()


def test_data_that_changed_places_by_odd_bytes_still_merges() -> None:
    """COW-79: two ranges that swap with an odd distance are a tangle of cycles; half of it is given up."""
    one, two, gap = NOISE[: 40 * BLOCK_SIZE], NOISE[50 * BLOCK_SIZE : 90 * BLOCK_SIZE], NOISE[-123:]
    size = len(one) + len(two)
    old = (one + two + gap).ljust(size + BLOCK_SIZE, b"x")
    new = (two + gap + one).ljust(size + BLOCK_SIZE, b"x")
    copied, xors, _ = searched(old, new)
    assert copied + xors >= 40


def test_the_end_of_the_source_is_not_passed() -> None:
    """V30: what would begin less than a block before the end of the source is not used."""
    old = NOISE[: 10 * BLOCK_SIZE]
    new = old[100:] + Random(4).randbytes(100)
    cow, _ = diff(old, new, CreateOptions(xor=XorMode.SEARCH))
    assert content(cow, old, len(new)) == new
    assert int(CowFile.parse(cow).ops.source.max()) <= 9 * BLOCK_SIZE


@given(seed=st.integers(0, 1 << 32), compress=st.sampled_from(["zstd", "lz4", "gz,1"]))
@settings(max_examples=60, deadline=None)
def test_any_cut_up_image_comes_back(seed: int, compress: str) -> None:
    """Pieces of any length from anywhere in any order: exact, in an order that merges, and less is stored."""
    random = Random(seed)
    old = random.randbytes(60 * BLOCK_SIZE)
    new = b""
    while len(new) < 50 * BLOCK_SIZE:
        start = random.randrange(len(old))
        new += old[start : start + random.randrange(8 * BLOCK_SIZE)]
    new = new[: 50 * BLOCK_SIZE]
    copied, xors, _ = searched(old, new, compress)
    assert copied + xors >= 5


def test_uniform_images_have_hardly_any_anchors() -> None:
    """Zeros have none, and what repeats itself has few: neither fills the index."""
    picker = Picker(6, 1 << 20)
    for byte in range(256):
        places, _ = picker.pick(memoryview(bytes([byte]) * (1 << 16)))
        assert len(places) <= (8 if byte else 0)


def test_what_is_made_to_be_full_of_anchors_is_bounded() -> None:
    """Words that all hash high: the number of anchors stays a small multiple of the usual one."""
    raw = full_of_anchors(1 << 16)
    places, _ = Picker(10, len(raw)).pick(memoryview(raw))
    assert 0 < len(places) < 4 * (16 + (len(raw) >> 10))


def test_an_index_of_such_an_image_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at twice what it should have."""
    monkeypatch.setattr(anchors, "_INDEX_ENTRIES", 20)
    index = AnchorIndex(store(full_of_anchors(1 << 20)), 2, Meter(lambda _done, _total: None, 1))
    assert 10 <= len(index._keys) <= 40


def full_of_anchors(words: int) -> bytes:
    """Words whose hashes are the highest there are."""
    inverse = pow(int(anchors._PICK), -1, 1 << 64)
    return ((~np.arange(words, dtype=np.uint64)) * np.uint64(inverse)).tobytes()


def test_anchors_do_not_depend_on_where_they_are() -> None:
    """The same bytes have the same anchors at every offset; the index knows the first place of each."""
    picker = Picker(6, 1 << 20)
    places, keys = picker.pick(memoryview(NOISE[: 1 << 18]))
    assert len(places) > (1 << 18) / 64 * 0.8
    shifted, shifted_keys = picker.pick(memoryview(b"12345" + NOISE[: 1 << 18]))
    inside = shifted >= 5
    assert (shifted[inside] - 5).tolist() == places.tolist()
    assert shifted_keys[inside].tolist() == keys.tolist()
    index = AnchorIndex(store(NOISE + NOISE), 2, Meter(lambda _done, _total: None, 1))
    assert index.find(keys).tolist() == places.tolist()
    assert index.find(keys + np.uint64(1)).tolist() == [NONE] * len(keys)


@pytest.mark.parametrize("slice_blocks", [3, 1 << 16])
def test_the_index_follows_the_size_of_the_image(slice_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the image, the index stays within its bound, and most of what moved is found all the same."""
    monkeypatch.setattr("snapd.cow.diff.xorsearch._SLICE_BLOCKS", slice_blocks)
    monkeypatch.setattr(anchors, "_INDEX_ENTRIES", 200)
    index = AnchorIndex(store(NOISE), 1, Meter(lambda _done, _total: None, 1))
    assert index.bits > 10
    assert len(index._keys) <= 400
    _, xors, _ = searched(NOISE, Random(5).randbytes(1001) + NOISE[: -2 * BLOCK_SIZE] + Random(6).randbytes(3095))
    # Without a neighbour behind them the first blocks of a slice are not found.
    assert xors >= (191 if slice_blocks == 3 else 197)


def test_same_file_for_every_way_to_cut_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices in which neighbours are looked for carry the distance over; what is found does not depend on threads."""
    new = Random(7).randbytes(777) + NOISE[: 120 * BLOCK_SIZE]
    new = new[: 120 * BLOCK_SIZE]
    for slice_blocks in (16, 1 << 16):
        monkeypatch.setattr("snapd.cow.diff.xorsearch._SLICE_BLOCKS", slice_blocks)
        files = []
        for jobs in (1, 2, 3):
            cow, counts = diff(NOISE, new, CreateOptions(xor=XorMode.SEARCH, jobs=jobs))
            files.append(read_bytes(cow, 0, cow.size()))
            assert counts.xor_blocks >= 119
        assert files[0] == files[1] == files[2]

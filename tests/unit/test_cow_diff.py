"""The difference of two images: exact, in an order that merges, and the same every time."""

import itertools
from random import Random

import pytest
from cowfiles import block, content, diff, image, merged_in_stream_order, store
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.diff import Diff
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.mergeorder import order_fault
from snapd.cow.reader import CowFile
from snapd.cow.writer import CowWriter

_BLOCKS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@given(source=_BLOCKS, target=_BLOCKS, seed=st.integers(0, 1 << 32), options=st.sampled_from(["zstd", "lz4", "none"]))
@settings(max_examples=150, deadline=None)
def test_target_comes_back_exactly(source: list[int], target: list[int], seed: int, options: str) -> None:
    """Any two images: the view gives the target, and so does a merge in stream order (COW-70, COW-75)."""
    noise = [block(0), *(Random(seed + value).randbytes(BLOCK_SIZE) for value in range(12))]
    old, new = (b"".join(noise[value] for value in values) for values in (source, target))
    cow, counts = diff(old, new, compress=options)
    assert order_fault(CowFile.parse(cow)) == ""
    assert content(cow, old, len(new)) == new
    assert merged_in_stream_order(cow, old, len(new)) == new
    assert counts.unchanged_blocks + counts.zero_blocks + counts.copy_blocks + counts.replace_blocks == len(target)


@given(order=st.permutations(range(1, 30)))
@settings(max_examples=100, deadline=None)
def test_permutation_costs_one_replace_a_cycle(order: list[int]) -> None:
    """Blocks that only change places are copied, but for one block of each cycle (COW-157)."""
    old, new = image(range(1, 30)), image(order)
    cycles, seen = 0, set[int]()
    for start in range(29):
        length, at = 0, start
        while at not in seen:
            seen.add(at)
            at = order[at] - 1
            length += 1
        cycles += length > 1
    cow, counts = diff(old, new)
    assert counts.replace_blocks == cycles
    assert merged_in_stream_order(cow, old, len(new)) == new


def test_priority_unchanged_zero_copy_replace() -> None:
    """COW-154, COW-157: unchanged goes before zero and copy, zero before copy, copy before replace."""
    old = image([0, 1, 2, 2, 0])
    new = image([0, 0, 2, 1, 9])
    cow, counts = diff(old, new)
    parsed = CowFile.parse(cow)
    kinds = dict(zip(parsed.new_block.tolist(), parsed.type.tolist(), strict=True))
    assert kinds == {1: OpType.ZERO, 3: OpType.COPY, 4: OpType.REPLACE}
    assert parsed.type.tolist() == [OpType.COPY, OpType.ZERO, OpType.REPLACE]
    assert counts.unchanged_blocks == 2


@pytest.mark.parametrize("shift", [1, 3, 20])
@pytest.mark.parametrize("up", [True, False])
def test_shifted_content_becomes_copies_in_runs(shift: int, up: bool) -> None:
    """A block range moved by any distance is copied whole, the overlap in the order that keeps it right (COW-77)."""
    body = Random(1).randbytes(60 * BLOCK_SIZE)
    gap = Random(2).randbytes(shift * BLOCK_SIZE)
    old, new = (body + gap, gap + body) if up else (gap + body, body + gap)
    cow, counts = diff(old, new)
    assert counts.copy_blocks + counts.replace_blocks == 60 + shift
    assert counts.replace_blocks <= shift
    parsed = CowFile.parse(cow)
    targets = parsed.new_block[parsed.type == OpType.COPY].tolist()
    steps = sum(abs(after - before) == 1 for before, after in itertools.pairwise(targets))
    assert steps >= len(targets) - 1 - (len(targets) // shift + 1)
    assert merged_in_stream_order(cow, old, len(new)) == new


def test_copies_go_on_where_the_last_one_was() -> None:
    """Of equal source blocks the one that continues the run is taken, not the first (COW-157)."""
    old = image([7, 1, 2, 3, 1, 7, 4, 50, 51, 52, 53, 54])
    new = old[: 7 * BLOCK_SIZE] + image([2, 3, 1, 7, 4])
    parsed = CowFile.parse(diff(old, new)[0])
    assert dict(zip(parsed.new_block.tolist(), parsed.source.tolist(), strict=True)) == {7: 2, 8: 3, 9: 4, 10: 5, 11: 6}


@pytest.mark.parametrize(("old_blocks", "new_blocks"), [(4, 10), (10, 4)])
def test_images_of_different_size(old_blocks: int, new_blocks: int) -> None:
    """What lies behind the base gets an op, zeros too (COW-149); a shorter target is as good."""
    old = image(range(1, old_blocks + 1))
    new = image([3, 9, 0, 0, 0, 0, 1, 2, 3, 0][:new_blocks])
    cow, _ = diff(old, new)
    assert content(cow, old, new_blocks * BLOCK_SIZE) == new
    assert CowFile.parse(cow).header.op_count_max == new_blocks
    behind = set(range(old_blocks, new_blocks))
    assert behind <= set(CowFile.parse(cow).new_block.tolist())


def test_identical_images_give_no_ops() -> None:
    """Nothing to do is a file without ops (COW-212)."""
    old = image(range(20))
    cow, _ = diff(old, old)
    assert CowFile.parse(cow).header.op_count == 0
    assert content(cow, old) == old


def test_equal_hashes_are_not_equal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that is only odd or even the result is still exact: every hit is compared."""
    monkeypatch.setattr("snapd.cow.diff.xxhash.xxh3_64_intdigest", lambda data: data[0] % 2)
    old, new = image([1, 2, 3, 4, 5, 6]), image([4, 3, 8, 1, 2, 5])
    cow, counts = diff(old, new)
    assert content(cow, old) == new
    assert counts.replace_blocks >= 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bytes_whatever_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-110, COW-157: the file does not depend on how many threads compress."""
    random = Random(5)
    old = b"".join(random.choice([block(1), random.randbytes(BLOCK_SIZE)]) for _ in range(700))
    new = b"".join(random.choice([block(2), old[:BLOCK_SIZE], random.randbytes(BLOCK_SIZE)]) for _ in range(1400))
    expected = read_bytes(diff(old, new)[0], 0, diff(old, new)[0].size())
    monkeypatch.setattr("snapd.cow.diff._THREADS", threads)
    cow, _ = diff(old, new)
    assert read_bytes(cow, 0, cow.size()) == expected
    assert content(cow, old, len(new)) == new


def test_runs_are_cut_into_the_largest_units() -> None:
    """COW-113, COW-114: 259 stored blocks at 64 KiB are 16 units of 16, then 2, then 1; one run over two tasks too."""
    random = Random(3)
    old, new = bytes(600 * BLOCK_SIZE), random.randbytes(259 * BLOCK_SIZE) + bytes(341 * BLOCK_SIZE)
    assert CowFile.parse(diff(old, new)[0]).blocks.tolist() == [16] * 16 + [2, 1]


@pytest.mark.parametrize("size", [0, 100, 4095, 4097])
@pytest.mark.parametrize("which", ["source", "target"])
def test_odd_sizes_are_refused(size: int, which: str) -> None:
    """COW-149: image sizes are multiples of 4096 and not zero; the error names the image."""
    good, bad = store(block(1)), store(bytes(size))
    images = (bad, good) if which == "source" else (good, bad)
    with pytest.raises(SnapdError, match=f"{which} of {size} bytes"):
        Diff(*images, lambda _done, _total: None)


def test_progress_only_grows_and_ends_at_the_whole() -> None:
    """Progress is in bytes and never goes back."""
    random = Random(9)
    old, new = random.randbytes(3000 * BLOCK_SIZE), random.randbytes(2500 * BLOCK_SIZE)
    seen: list[tuple[int, int]] = []
    option = CompressOption.parse("lz4")
    difference = Diff(store(old), store(new), lambda done, total: seen.append((done, total)))
    writer = CowWriter(store(), op_count_max=difference.target_blocks, option=option, unit=65536)
    difference.write(writer, option, 65536)
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {2 * len(new)}
    assert seen[-1][0] == 2 * len(new)

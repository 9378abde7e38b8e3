"""The difference of two images: exact, in an order that merges, and the same every time."""

import itertools
import os
import tempfile
from pathlib import Path
from random import Random

import pytest
from cowfiles import block, content, diff, image, merged_in_order, store
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.diff import Diff, DiffCounts
from snapd.cow.diff.xormode import XorMode
from snapd.cow.digests import block_digest
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.parse.mergeorder import order_fault
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import create_writer

_BLOCKS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@st.composite
def all_options(draw: st.DrawFn) -> CreateOptions:
    """Every version, compressor, unit and way to look for XOR sources, on one to three threads."""
    version = draw(st.sampled_from([2, 3]))
    return CreateOptions(
        compression=CompressOption.parse(draw(st.sampled_from(["zstd", "lz4", "gz,1", "brotli,1", "none"]))),
        unit=0 if version == 2 else draw(st.sampled_from([4096, 16 << 10, 64 << 10, 256 << 10])),
        version=version,
        xor=draw(st.sampled_from(list(XorMode))),
        jobs=draw(st.integers(1, 3)),
    )


def image_pair(seed: int) -> tuple[bytes, bytes]:
    """An old image of few kinds of blocks, and a new one of its pieces: moved, shifted by bytes, edited, or new."""
    random = Random(seed)
    kinds = [bytes(BLOCK_SIZE), *(random.randbytes(BLOCK_SIZE) for _ in range(4)), random.randbytes(64) * 64]
    old = b"".join(random.choice([*kinds, random.randbytes(BLOCK_SIZE)]) for _ in range(random.randint(1, 24)))
    new = bytearray()
    while len(new) < random.choice([len(old), 30 * BLOCK_SIZE]):
        unit = random.choice([BLOCK_SIZE, BLOCK_SIZE, 1])
        start = random.randrange(len(old)) // unit * unit
        if random.random() < 0.4:
            start = min(len(new), len(old) - 1)
        piece = bytearray(old[start : start + random.randint(1, 6) * BLOCK_SIZE])
        for _ in range(random.choice([0, 0, 3, 40])):
            piece[random.randrange(len(piece))] ^= 1 + random.randrange(255)
        new += random.choice([bytes(piece)] * 3 + [bytes(len(piece)), random.randbytes(len(piece))])
        if unit == BLOCK_SIZE:
            new += bytes(-len(new) % BLOCK_SIZE)
    return old, bytes(new + bytes(-len(new) % BLOCK_SIZE))


@given(seed=st.integers(0, 1 << 32), options=all_options())
@settings(max_examples=300, deadline=None)
def test_target_comes_back_exactly(seed: int, options: CreateOptions) -> None:
    """Any two images: the view gives the target, and so does an ordered merge on one image (COW-68, COW-70, COW-75)."""
    old, new = image_pair(seed)
    cow, counts = diff(old, new, options)
    parsed = CowFile.parse(cow)
    assert order_fault(parsed) == ""
    assert content(cow, old, len(new)) == new
    assert merged_in_order(cow, old, len(new)) == new
    blocks = (counts.unchanged_blocks, counts.zero_blocks, counts.copy_blocks, counts.xor_blocks, counts.replace_blocks)
    assert sum(blocks) * BLOCK_SIZE == len(new)
    assert counts.xor_blocks == int((parsed.ops.type == OpType.XOR).sum())


@given(source=_BLOCKS, target=_BLOCKS, seed=st.integers(0, 1 << 32), options=all_options())
@settings(max_examples=100, deadline=None)
def test_blocks_that_change_places_come_back_exactly(
    source: list[int], target: list[int], seed: int, options: CreateOptions
) -> None:
    """The same for images of a dozen blocks in any order, full of copies and cycles."""
    noise = [block(0), *(Random(seed + value).randbytes(BLOCK_SIZE) for value in range(12))]
    old, new = (b"".join(noise[value] for value in values) for values in (source, target))
    cow, _ = diff(old, new, options)
    assert order_fault(CowFile.parse(cow)) == ""
    assert content(cow, old, len(new)) == new
    assert merged_in_order(cow, old, len(new)) == new


@given(seed=st.integers(0, 1 << 32), options=all_options())
@settings(max_examples=100, deadline=None)
def test_every_target_block_has_its_digest(seed: int, options: CreateOptions) -> None:
    """COW-216: unchanged and zero blocks, too."""
    old, new = image_pair(seed)
    difference = Diff(store(old), store(new), options, lambda _done, _total: None)
    difference.write(create_writer(None, options.writer_options(difference.target_blocks)))
    blocks = (new[at : at + BLOCK_SIZE] for at in range(0, len(new), BLOCK_SIZE))
    assert difference.target_digests.tolist() == [block_digest(block) for block in blocks]


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
    cow, counts = diff(old, new, CreateOptions(xor=XorMode.NONE))
    assert counts.replace_blocks == cycles
    assert merged_in_order(cow, old, len(new)) == new


@pytest.mark.parametrize("cheap", range(5))
def test_a_cycle_is_broken_at_its_cheapest_block(cheap: int) -> None:
    """COW-157: the one whose payload is smallest is stored, wherever it is in the cycle."""
    random = Random(7)
    blocks = [random.randbytes(2048 + 256 * i) + bytes(2048 - 256 * i) for i in range(5)]
    blocks[0], blocks[cheap] = blocks[cheap], blocks[0]
    old = b"".join(blocks)
    # Block i of the target is block i + 2 of the source; the cheapest content lies at `cheap`.
    new = b"".join(blocks[(i + 2) % 5] for i in range(5))
    ops = CowFile.parse(diff(old, new)[0]).ops
    assert ops.new_block[ops.type == OpType.REPLACE].tolist() == [(cheap - 2) % 5]


def test_what_waits_for_a_cycle_stays_a_copy() -> None:
    """COW-153: one block of the cycle is stored; a chain of copies that reads from it is none of its business."""
    old = image([1, 2, 3, 4, 5, 6])
    new = image([2, 3, 1, 3, 4, 5])
    cow, counts = diff(old, new)
    assert (counts.copy_blocks, counts.replace_blocks) == (5, 1)
    assert merged_in_order(cow, old, len(new)) == new


def test_of_equal_payloads_the_lowest_block_is_stored() -> None:
    """COW-157: ties do not depend on anything but the block."""
    old, new = image([1, 2, 3, 4]), image([2, 3, 4, 1])
    ops = CowFile.parse(diff(old, new, compress="none")[0]).ops
    assert ops.new_block[ops.type == OpType.REPLACE].tolist() == [0]


def test_a_broken_cycle_may_go_on_as_xor() -> None:
    """A block that cannot be a copy is still cheaper as the difference from what was at its own place."""
    random = Random(8)
    one = random.randbytes(BLOCK_SIZE)
    two = one[:100] + b"other" + one[105:]
    cow, counts = diff(one + two, two + one)
    assert (counts.copy_blocks, counts.xor_blocks, counts.replace_blocks) == (1, 1, 0)
    assert merged_in_order(cow, one + two, 2 * BLOCK_SIZE) == two + one


def test_priority_unchanged_zero_copy_xor_replace() -> None:
    """COW-154, COW-157: unchanged before zero and copy, zero before copy, copy before XOR, and XOR before replace."""
    random = Random(9)
    near, far, old_noise, new_noise = (random.randbytes(BLOCK_SIZE) for _ in range(4))
    edited = near[:50] + b"!" + near[51:]
    old = bytes(BLOCK_SIZE) + far + near + near + old_noise + bytes(BLOCK_SIZE)
    new = bytes(BLOCK_SIZE) + bytes(BLOCK_SIZE) + edited + far + new_noise + bytes(BLOCK_SIZE)
    cow, counts = diff(old, new)
    ops = CowFile.parse(cow).ops
    assert ops.type.tolist() == [OpType.COPY, OpType.XOR, OpType.ZERO, OpType.REPLACE]
    assert ops.new_block.tolist() == [3, 2, 1, 4]
    assert counts == DiffCounts(2, 1, 1, 1, 1)


def test_a_copy_that_an_xor_overwrites_comes_first() -> None:
    """COW-75: the XOR of a block with itself goes behind every copy of that block."""
    random = Random(10)
    first, second = random.randbytes(BLOCK_SIZE), random.randbytes(BLOCK_SIZE)
    edited = b"x" + first[1:]
    cow, counts = diff(first + second, edited + first)
    assert (counts.copy_blocks, counts.xor_blocks) == (1, 1)
    assert merged_in_order(cow, first + second, 2 * BLOCK_SIZE) == edited + first


@pytest.mark.parametrize("compress", ["zstd", "lz4", "gz", "brotli,5"])
@pytest.mark.parametrize("version", [2, 3])
def test_files_changed_in_place_cost_less_than_with_copies_alone(compress: str, version: int) -> None:
    """COW-187: an update that edits files in place takes at most 0.85 of the bytes when XOR is used."""
    old = _text(Random(11), 150 * BLOCK_SIZE)
    new = _text(Random(12), 150 * BLOCK_SIZE)
    edited = bytearray(old[: 100 * BLOCK_SIZE] + new[100 * BLOCK_SIZE :])
    for at in range(500, 60 * BLOCK_SIZE, 1500):
        edited[at : at + 5] = Random(at).randbytes(5)
    sizes = {}
    for xor in (XorMode.NONE, XorMode.SAME):
        options = CreateOptions(compression=CompressOption.parse(compress), version=version, xor=xor)
        cow, counts = diff(old, bytes(edited), options)
        assert content(cow, old) == edited
        sizes[xor] = cow.size()
    assert counts.xor_blocks > 50
    assert sizes[XorMode.SAME] <= 0.85 * sizes[XorMode.NONE]


def test_uncompressed_there_is_no_xor() -> None:
    """A raw difference is as long as what it differs from."""
    old = Random(13).randbytes(4 * BLOCK_SIZE)
    new = bytearray(old)
    new[::BLOCK_SIZE] = b"abcd"
    assert diff(old, bytes(new), compress="none")[1].xor_blocks == 0


def test_blocks_that_compress_well_are_not_xored() -> None:
    """COW-157: a unit that is smaller as a whole than in pieces stays whole, however near to the old ones."""
    line = Random(14).randbytes(BLOCK_SIZE)
    old, new = bytearray(line * 16), bytearray((line[:-40] + bytes(40)) * 16)
    for i in range(16):
        old[i * BLOCK_SIZE : i * BLOCK_SIZE + 300] = Random(i).randbytes(300)
    cow, counts = diff(bytes(old), bytes(new))
    assert counts.replace_blocks == 16
    assert CowFile.parse(cow).op_count == 1


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
    ops = CowFile.parse(cow).ops
    targets = ops.new_block[ops.type == OpType.COPY].tolist()
    steps = sum(abs(after - before) == 1 for before, after in itertools.pairwise(targets))
    assert steps >= len(targets) - 1 - (len(targets) // shift + 1)
    assert merged_in_order(cow, old, len(new)) == new


def test_copies_go_on_where_the_last_one_was() -> None:
    """Of equal source blocks the one that continues the run is taken, not the first (COW-150, COW-157)."""
    old = image([7, 1, 2, 3, 1, 7, 4, 50, 51, 52, 53, 54])
    new = old[: 7 * BLOCK_SIZE] + image([2, 3, 1, 7, 4])
    ops = CowFile.parse(diff(old, new)[0]).ops
    assert dict(zip(ops.new_block.tolist(), ops.source.tolist(), strict=True)) == {7: 2, 8: 3, 9: 4, 10: 5, 11: 6}


def test_blocks_are_found_in_every_part_of_a_large_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is looked up part by part gives the same file as one that is looked up at once."""
    random = Random(15)
    blocks = [random.randbytes(BLOCK_SIZE) for _ in range(300)]
    old, new = b"".join(blocks), b"".join(random.sample(blocks, 300))
    whole = diff(old, new, compress="lz4")[0]
    for name, value in (("_INDEX_BLOCKS", 32), ("_PIECE_BLOCKS", 50)):
        monkeypatch.setattr(f"snapd.cow.diff.copyfind.{name}", value)
    parts = diff(old, new, compress="lz4")[0]
    assert read_bytes(parts, 0, parts.size()) == read_bytes(whole, 0, whole.size())


@pytest.mark.parametrize(("old_blocks", "new_blocks"), [(4, 10), (10, 4)])
@pytest.mark.parametrize("version", [2, 3])
def test_images_of_different_size(old_blocks: int, new_blocks: int, version: int) -> None:
    """What lies behind the base gets an op, zeros too (COW-149); a shorter target is as good."""
    old = image(range(1, old_blocks + 1))
    new = image([3, 9, 0, 0, 0, 0, 1, 2, 3, 0][:new_blocks])
    cow, _ = diff(old, new, CreateOptions(version=version))
    assert content(cow, old, new_blocks * BLOCK_SIZE) == new
    parsed = CowFile.parse(cow)
    assert parsed.header.op_count_max == (new_blocks if version == 3 else 0)
    behind = set(range(old_blocks, new_blocks))
    assert behind <= set(parsed.ops.new_block.tolist())


def test_zero_blocks_that_were_zero_give_no_op() -> None:
    """COW-151, COW-185: unchanged goes before zero, and before a copy of an equal block."""
    cow, counts = diff(image([0, 1, 0, 2, 2]), image([0, 0, 0, 2, 2]))
    assert CowFile.parse(cow).ops.new_block.tolist() == [1]
    assert counts == DiffCounts(4, 1, 0, 0, 0)


def test_identical_images_give_no_ops() -> None:
    """Nothing to do is a file without ops (COW-212)."""
    old = image(range(20))
    cow, _ = diff(old, old)
    assert CowFile.parse(cow).op_count == 0
    assert content(cow, old) == old


def test_equal_hashes_are_not_equal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-150: with a hash that is only odd or even the result is still exact, as every hit is compared."""
    monkeypatch.setattr("snapd.cow.diff.blockscan.xxhash.xxh3_64_intdigest", lambda data: data[0] % 2)
    old, new = image([1, 2, 3, 4, 5, 6]), image([4, 3, 8, 1, 2, 5])
    cow, counts = diff(old, new)
    assert content(cow, old) == new
    assert counts.copy_blocks <= 1


@pytest.mark.parametrize("xor", list(XorMode))
@pytest.mark.parametrize("version", [2, 3])
def test_same_bytes_whatever_the_threads(xor: XorMode, version: int) -> None:
    """COW-110, COW-157: the file does not depend on how many threads there are."""
    random = Random(5)
    old = b"".join(random.choice([block(1), random.randbytes(BLOCK_SIZE)]) for _ in range(700))
    pieces = [
        lambda: block(2),
        lambda: old[:BLOCK_SIZE],
        lambda: random.randbytes(BLOCK_SIZE),
        lambda: old[(at := random.randrange(600 * BLOCK_SIZE)) : at + 20 * BLOCK_SIZE],
    ]
    new = bytearray(old[: 100 * BLOCK_SIZE] + b"".join(random.choice(pieces)() for _ in range(300)))
    for at in range(0, len(new), 9000):
        new[at] ^= 255
    files = []
    for jobs in (1, 2, 3):
        cow, counts = diff(old, bytes(new), CreateOptions(version=version, xor=xor, jobs=jobs))
        assert xor is XorMode.NONE or counts.xor_blocks >= 20
        files.append((read_bytes(cow, 0, cow.size()), counts))
    assert files[0] == files[1] == files[2]


def test_runs_are_cut_into_the_largest_units() -> None:
    """COW-113, COW-114: 259 stored blocks at 64 KiB are 16 units of 16, then 2, then 1; one run over two tasks too."""
    random = Random(3)
    old, new = bytes(600 * BLOCK_SIZE), random.randbytes(259 * BLOCK_SIZE) + bytes(341 * BLOCK_SIZE)
    assert CowFile.parse(diff(old, new)[0]).ops.blocks.tolist() == [16] * 16 + [2, 1]


@pytest.mark.parametrize("size", [0, 100, 4095, 4097])
@pytest.mark.parametrize("which", ["source", "target"])
def test_odd_sizes_are_refused(size: int, which: str) -> None:
    """COW-149: image sizes are multiples of 4096 and not zero; the error names the image."""
    good, bad = store(block(1)), store(bytes(size))
    images = (bad, good) if which == "source" else (good, bad)
    with pytest.raises(SnapdError, match=f"{which} of {size} bytes"):
        Diff(*images, CreateOptions(), lambda _done, _total: None)


@pytest.mark.parametrize("sizes", [(3000, 2500), (2500, 3000), (10, 1)])
@pytest.mark.parametrize("xor", list(XorMode))
def test_progress_only_grows_and_ends_at_the_whole(sizes: tuple[int, int], xor: XorMode) -> None:
    """Progress is in bytes, never goes back, always of the same whole, and reaches it."""
    random = Random(9)
    old = random.randbytes(sizes[0] * BLOCK_SIZE)
    new = bytearray((old[5000:] + random.randbytes(600 * BLOCK_SIZE) + bytes(len(old)))[: sizes[1] * BLOCK_SIZE])
    new[::10000] = bytes(len(new[::10000]))
    seen: list[tuple[int, int]] = []
    options = CreateOptions(compression=CompressOption.parse("lz4"), xor=xor)
    difference = Diff(store(old), store(bytes(new)), options, lambda done, total: seen.append((done, total)))
    difference.write(create_writer(None, options.writer_options(difference.target_blocks)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]}


class _Watched(FileStore):
    """A file that notes which bytes are read."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.read_ranges: list[tuple[int, int]] = []

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        self.read_ranges.append((offset, offset + len(buffer)))
        super().read_into(buffer, offset)


@pytest.mark.parametrize("xor", [XorMode.SAME, XorMode.SEARCH])
def test_holes_are_not_read(xor: XorMode) -> None:
    """A large image of little data costs little; what is in a hole is zero."""
    with tempfile.TemporaryDirectory() as folder:
        stores = []
        for name, data in (("old", {40 << 20: b"a", 90 << 20: b"c"}), ("new", {40 << 20: b"b", 60 << 20: b"a"})):
            with open(Path(folder, name), "w+b") as file:
                os.truncate(file.fileno(), 128 << 20)
                for at, letter in data.items():
                    os.pwrite(file.fileno(), letter * BLOCK_SIZE, at)
                stores.append(_Watched(os.dup(file.fileno())))
        source, target = stores
        options = CreateOptions(xor=xor)
        difference = Diff(source, target, options, lambda _done, _total: None)
        counts = difference.write(create_writer(None, options.writer_options(difference.target_blocks)))
        assert counts == DiffCounts((128 << 20) // BLOCK_SIZE - 3, 1, 1, 0, 1)
        for image_store in stores:
            if _has_holes(image_store.fd):
                assert sum(end - start for start, end in image_store.read_ranges) < 4 << 20
            os.close(image_store.fd)


def _has_holes(fd: int) -> bool:
    return os.lseek(fd, 0, os.SEEK_DATA) > 0


def _text(random: Random, size: int) -> bytes:
    """Words in random order: compresses to about a third."""
    words = [random.randbytes(random.randint(3, 12)) for _ in range(2000)]
    return b" ".join(random.choices(words, k=size // 5))[:size]

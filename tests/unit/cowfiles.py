"""Small COW files and images on a simulated disk, for the tests of this folder."""

from collections.abc import Iterable
from random import Random

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.blockmap import BlockMap
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.diff import Diff, DiffCounts
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView
from snapd.cow.writer import CowWriter


def store(content: bytes = b"") -> SimStore:
    """A file of its own."""
    return SimDisk(Random(0)).store("file", content)


def block(value: int) -> bytes:
    """A block of one byte value."""
    return bytes([value]) * BLOCK_SIZE


def image(values: Iterable[int]) -> bytes:
    """One block a value."""
    return b"".join(block(value) for value in values)


def diff(
    source: bytes, target: bytes, *, compress: str = "zstd", unit: int = 64 << 10, scratch: bool = False
) -> tuple[SimStore, DiffCounts]:
    """The finished COW file between two images."""
    cow = store()
    option = CompressOption.parse(compress)
    difference = Diff(store(source), store(target), lambda _done, _total: None)
    writer = CowWriter(cow, op_count_max=difference.target_blocks, option=option, unit=unit, scratch=scratch)
    counts = difference.write(writer, option, unit)
    writer.finalize()
    return cow, counts


def written(
    *ops: tuple[str, int, int] | tuple[str, int, bytes], compress: str = "none", unit: int = 64 << 10
) -> SimStore:
    """A finished COW of these ops: ("copy", block, source), ("zero", block, 0), ("replace", block, content)."""
    cow = store()
    option = CompressOption.parse(compress)
    encoder = Encoder(option)
    writer = CowWriter(cow, op_count_max=len(ops), option=option, unit=unit, scratch=False)
    for kind, first, value in ops:
        if isinstance(value, bytes):
            writer.replace(first, len(value) // BLOCK_SIZE, encoder.encode(value))
        elif kind == "copy":
            writer.copy(first, value)
        else:
            writer.zero(first)
    writer.finalize()
    return cow


def view(cow: SimStore, base: bytes, size: int | None = None) -> CowView:
    """The new image of a COW file over a base."""
    below = store(base)
    return CowView(block_map(cow, base, size), cow, source=below, base=below)


def block_map(cow: SimStore, base: bytes, size: int | None = None) -> BlockMap:
    """The checked map of a COW file over a base."""
    return CowFile.parse(cow).block_map(len(base), size)


def content(cow: SimStore, base: bytes, size: int | None = None) -> bytes:
    """The whole new image."""
    new = view(cow, base, size)
    return read_bytes(new, 0, new.size)


def merged_in_stream_order(cow: SimStore, base: bytes, size: int) -> bytes:
    """What an ordered merge leaves: every op executed in stream order on one image (COW-70)."""
    parsed = CowFile.parse(cow)
    ops = parsed.block_map(len(base), size)
    new = view(cow, base, size)
    device = bytearray(base.ljust(size, b"\xee"))
    for index in range(ops.op_count):
        op = ops.op(index)
        start, length = op.new_block * BLOCK_SIZE, op.blocks * BLOCK_SIZE
        if op.type is OpType.COPY:
            device[start : start + length] = device[op.source * BLOCK_SIZE : op.source * BLOCK_SIZE + length]
        else:
            device[start : start + length] = read_bytes(new, start, length)
    return bytes(device[:size])

"""Small COW files and images on a simulated disk, for the tests of this folder."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.diff import Diff, DiffCounts
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.parse.mergeorder import merge_list
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import WriterOptions, create_writer


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
    source: bytes,
    target: bytes,
    options: CreateOptions | None = None,
    *,
    compress: str = "zstd",
    unit: int = 64 << 10,
    scratch: bool = False,
) -> tuple[SimStore, DiffCounts]:
    """The finished COW file between two images; `options` instead of the next two."""
    cow = store()
    options = options or CreateOptions(compression=CompressOption.parse(compress), unit=unit)
    difference = Diff(store(source), store(target), options, lambda _done, _total: None)
    writer = create_writer(cow, replace(options.writer_options(difference.target_blocks), scratch=scratch))
    counts = difference.write(writer)
    writer.finalize()
    return cow, counts


def written(
    *ops: tuple[str, int, int] | tuple[str, int, bytes] | tuple[str, int, bytes, int],
    compress: str = "none",
    unit: int = 64 << 10,
) -> SimStore:
    """A finished COW of these ops.

    ("copy", block, source), ("zero", block, 0), ("replace", block, content), ("xor", block, data, source byte).
    """
    cow = store()
    options = WriterOptions(
        compression=CompressOption.parse(compress), unit=unit, op_count_max=max(len(ops), 1), scratch=False
    )
    writer = create_writer(cow, options)
    for kind, first, value, *rest in ops:
        if isinstance(value, bytes) and rest:
            writer.xor(first, value, *divmod(rest[0], BLOCK_SIZE))
        elif isinstance(value, bytes):
            writer.raw(first, value)
        elif kind == "copy":
            writer.copy(first, value)
        else:
            writer.zero(first)
    writer.finalize()
    return cow


def view(cow: SimStore, base: bytes, size: int | None = None) -> CowView:
    """The new image of a COW file over a base."""
    below = store(base)
    return CowView(extent_map(cow, base, size), cow, source=below, base=below)


def extent_map(cow: SimStore, base: bytes, size: int | None = None) -> ExtentMap:
    """The checked map of a COW file over a base."""
    return CowFile.parse(cow).extent_map(len(base), size)


def content(cow: SimStore, base: bytes, size: int | None = None) -> bytes:
    """The whole new image."""
    new = view(cow, base, size)
    return read_bytes(new, 0, new.size)


def merged_in_order(cow: SimStore, base: bytes, size: int) -> bytes:
    """What an ordered merge leaves: every op executed in merge order on one image (COW-68, COW-70)."""
    parsed = CowFile.parse(cow)
    ops = parsed.extent_map(len(base), size)
    new = view(cow, base, size)
    device = bytearray(base.ljust(size, b"\xee"))
    for index in merge_list(parsed).tolist():
        op = ops.op(index)
        start, length = op.new_block * BLOCK_SIZE, op.blocks * BLOCK_SIZE
        if op.type is OpType.COPY:
            device[start : start + length] = device[op.source * BLOCK_SIZE : op.source * BLOCK_SIZE + length]
        elif op.type is OpType.XOR:
            # What is to be XORed with the source: its image over the base, without the base's part in it.
            payload = xored(read_bytes(new, start, length), base[op.source : op.source + length])
            device[start : start + length] = xored(payload, bytes(device[op.source : op.source + length]))
        else:
            device[start : start + length] = read_bytes(new, start, length)
    return bytes(device[:size])


def xored(one: bytes, other: bytes) -> bytes:
    """Byte by byte."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")

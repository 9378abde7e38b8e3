"""The data that the figures of COW files are measured on, about 2 GB, made once and kept (`benchcache`)."""

from pathlib import Path
from typing import NamedTuple

import benchcache
import images
import numpy as np

from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.header import Header

OP_COUNT = 1_000_000
CONTENT_BYTES = 256 << 20
_SPAN_BLOCKS = 256
_UNIT_BLOCKS = 16
_SEED = 5


class _Kind(NamedTuple):
    """A kind of op, `exponent` the log2 of its blocks, and its share of the ops."""

    type: OpType
    exponent: int
    payload: bytes
    share: float


class UsedBlocks:
    """The blocks of an image that are not zero, in a row."""

    def __init__(self, image: Path) -> None:
        self._blocks = np.memmap(image, dtype=np.uint64, mode="r").reshape(-1, BLOCK_SIZE // 8)
        self.numbers = np.flatnonzero(self._blocks.any(axis=1))

    def read(self, first: int, count: int) -> bytes:
        """`count` of them from the one with index `first` on."""
        return self._blocks[self.numbers[first : first + count]].tobytes()


class BenchData:
    """Paths of everything, which exist from the start.

    `old` and `new` are two ext4 images; `content` is 256 MiB of the new one's blocks that are not zero, in stretches of
    1 MiB from all over it, and `nothing` an image of one zero block. `ascending` and `shuffled` are version 3 COW files
    of a million ops.
    """

    def __init__(self) -> None:
        self.directory = benchcache.kept("cow", (images.__file__, __file__), _make)
        self.old, self.new = self.directory / "old.img", self.directory / "new.img"
        self.content, self.nothing = self.directory / "content.img", self.directory / "nothing.img"
        self.ascending, self.shuffled = self.directory / "ascending.cow", self.directory / "shuffled.cow"

    def warm(self) -> None:
        """Have all of it in memory."""
        benchcache.warm((self.old, self.new, self.content, self.ascending, self.shuffled))


def _make(directory: Path) -> None:
    _, new = images.build_images(directory)
    (directory / "nothing.img").write_bytes(bytes(BLOCK_SIZE))
    blocks = UsedBlocks(new)
    spans = CONTENT_BYTES // (_SPAN_BLOCKS * BLOCK_SIZE)
    with open(directory / "content.img", "wb") as file:
        for first in np.linspace(0, len(blocks.numbers) - _SPAN_BLOCKS, spans, dtype=np.int64):
            file.write(blocks.read(first, _SPAN_BLOCKS))
    random = np.random.default_rng(_SEED)
    write_ops(directory / "ascending.cow", random, shuffle=False)
    write_ops(directory / "shuffled.cow", random, shuffle=True)


def write_ops(path: Path, random: np.random.Generator, *, shuffle: bool) -> None:
    """A whole COW file of `OP_COUNT` ops of every kind over adjoining target blocks, with tiny zstd payloads.

    The ops are in the order of their target blocks, or in none at all.
    """
    option = CompressOption.parse("zstd")
    header = Header(
        op_count=OP_COUNT,
        op_count_max=OP_COUNT,
        compression=option.algorithm,
        max_compression_size=_UNIT_BLOCKS * BLOCK_SIZE,
    )
    encoder = Encoder(option, version=3, max_unit=header.max_unit)
    block, unit = (encoder.encode(b"snapd" * blocks * 819 + b"." * blocks) for blocks in (1, _UNIT_BLOCKS))
    kinds = (
        _Kind(OpType.COPY, 0, b"", 0.35),
        _Kind(OpType.ZERO, 0, b"", 0.15),
        _Kind(OpType.REPLACE, 0, block, 0.35),
        _Kind(OpType.REPLACE, _UNIT_BLOCKS.bit_length() - 1, unit, 0.1),
        _Kind(OpType.XOR, 0, block, 0.05),
    )
    chosen = random.choice(len(kinds), OP_COUNT, p=[kind.share for kind in kinds])
    exponent = np.array([kind.exponent for kind in kinds], dtype=np.uint64)[chosen]
    blocks = np.uint64(1) << exponent
    start = np.cumsum(blocks) - blocks
    if shuffle:
        order = random.permutation(OP_COUNT)
        chosen, exponent, start = chosen[order], exponent[order], start[order]
    type_code = np.array([kind.type for kind in kinds], dtype=np.uint64)[chosen]
    length = np.array([len(kind.payload) for kind in kinds], dtype=np.uint64)[chosen]
    source = np.cumsum(length) - length + np.uint64(header.data_start)
    copy, xor = type_code == OpType.COPY, type_code == OpType.XOR
    source[type_code == OpType.ZERO] = 0
    source[copy] = random.integers(0, OP_COUNT, int(copy.sum()))
    source[xor] = random.integers(0, OP_COUNT * BLOCK_SIZE, int(xor.sum()))
    records = np.empty((OP_COUNT, 2), dtype="<u8")
    records[:, 0] = length | start << np.uint64(32)
    records[:, 1] = type_code << np.uint64(60) | exponent << np.uint64(57) | source
    with open(path, "wb") as file:
        file.write(header.pack())
        file.seek(header.ops_start)
        file.write(records.tobytes())
        file.write(b"".join([kinds[i].payload for i in chosen.tolist()]))

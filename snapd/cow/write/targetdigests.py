"""The digests of target blocks, worked out while their ops are written (COW-216).

Data that is replaced is at hand; what copies and XOR ops make, and what stays unchanged, is read from the source. So a
table vouches for the image that the caller meant, not for what a reader later makes of the file.
"""

import errno
from collections.abc import Iterator

from snapd.block.extent import Extent
from snapd.block.store import Buffer, Readable
from snapd.cow.digests import DigestLog, block_digest
from snapd.cow.errors import CowError
from snapd.cow.image.xor import xor_into
from snapd.cow.write.mappedblocks import MappedBlocks

_PIECE_BLOCKS = 256


class TargetDigests:
    """Tells a log of every op; `source_blocks` and `target_blocks` are the sizes of the old and the new image.

    Errors: V30 (EINVAL) for an op that leaves an image; what reading the source and writing the log raise.
    """

    def __init__(self, log: DigestLog, source: Readable, source_blocks: int, target_blocks: int) -> None:
        self._log = log
        self._source = source
        self._source_blocks = source_blocks
        self._target_blocks = target_blocks
        self._block_size = log.block_size
        self._zero_digest = block_digest(bytes(self._block_size))

    @property
    def block_size(self) -> int:
        """Bytes of a block, here and in the COW."""
        return self._block_size

    def check_target(self, start: int, count: int) -> None:
        """Refuse target blocks that the new image does not have."""
        if start + count > self._target_blocks:
            raise _outside(f"target block {start + count - 1}, the target has {self._target_blocks} blocks", "V30")

    def check_source(self, offset: int, length: int) -> None:
        """Refuse source bytes that the old image does not have."""
        if offset + length > self._source_blocks * self._block_size:
            raise _outside(f"source byte {offset + length - 1}, the source has {self._source_blocks} blocks", "V30")

    def check_complete(self, mapped: MappedBlocks) -> None:
        """Refuse to finish while a target block that the source cannot give has no op (UNDO-23)."""
        for gap in mapped.gaps(self._target_blocks):
            if gap.end > self._source_blocks:
                block = max(gap.start, self._source_blocks)
                raise _outside(f"target block {block} lies behind the source and has no op", "UNDO-23")

    def copy(self, new_block: int, source_block: int, count: int) -> None:
        """Blocks copied from the source."""
        for first, data in self._read(Extent(source_block, count)):
            self.replace(new_block + first - source_block, data)

    def zero(self, new_block: int, count: int) -> None:
        """Blocks of zeros."""
        for done in range(0, count, _PIECE_BLOCKS):
            self._log.put(new_block + done, [self._zero_digest] * min(_PIECE_BLOCKS, count - done))

    def replace(self, new_block: int, data: Buffer) -> None:
        """Blocks whose content is `data`."""
        view, size = memoryview(data), self._block_size
        self._log.put(new_block, [block_digest(view[at : at + size]) for at in range(0, len(view), size)])

    def xor(self, new_block: int, data: Buffer, offset: int) -> None:
        """Blocks that are `data` XOR the source from byte `offset` on."""
        view, step = memoryview(data), _PIECE_BLOCKS * self._block_size
        for at in range(0, len(view), step):
            piece = bytearray(min(step, len(view) - at))
            self._source.read_into(piece, offset + at)
            xor_into(memoryview(piece), view[at : at + step])
            self.replace(new_block + at // self._block_size, piece)

    def commit(self, *, op_count: int, ops_digest: int, label: int) -> None:
        """Durably close the state of a label."""
        self._log.commit(op_count=op_count, ops_digest=ops_digest, label=label)

    def finish(self, mapped: MappedBlocks, *, op_count: int, ops_digest: int) -> None:
        """Add the unchanged blocks, and durably close the state of the end."""
        for gap in mapped.gaps(self._target_blocks):
            self.copy(gap.start, gap.start, gap.length)
        self._log.finish(op_count=op_count, ops_digest=ops_digest, target_blocks=self._target_blocks)

    def _read(self, extent: Extent) -> Iterator[tuple[int, bytearray]]:
        """The source blocks of an extent in pieces, each with its first block."""
        for first in range(extent.start, extent.end, _PIECE_BLOCKS):
            piece = bytearray(min(_PIECE_BLOCKS, extent.end - first) * self._block_size)
            self._source.read_into(piece, first * self._block_size)
            yield first, piece


def _outside(message: str, statement: str) -> CowError:
    return CowError(message, statement=statement, number=errno.EINVAL)

"""The block map: which op serves a target block, in a form any process can map and index.

A worker answers a block request by one array index and one record unpack, and must not import numpy to get
there. So the control plane parses and checks a COW once, saves the result as a file, and workers map it.

File layout (little-endian, all of it derived from the COW, never a source of truth):

    0   8  magic "SNAPDMAP"          32  4  compression code
    8   4  version, 1                36  4  largest unit, bytes
    12  4  block size, bytes         40  8  bytes 0..7 of the COW's op digest (xxh3-64)
    16  8  target blocks (B)         48  4  crc32 of everything from byte 64 on
    24  8  ops (N)                   52  4  crc32 of bytes 0..51
    56  8  zero
    64        4*B bytes: int32 per target block, the op's index or -1 (read the base)
    64+4*B   16*N bytes: the op records as in the COW
"""

import errno
import mmap
import os
import struct
import zlib
from collections.abc import Iterator

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.format import OP, OP_SIZE, Compression, Op

_MAGIC = b"SNAPDMAP"
_HEAD = struct.Struct("<8sIIQQIIQ")
_CRCS = struct.Struct("<II")
_HEAD_SIZE = 64
NO_OP = -1


class BlockMap:
    """A parsed COW: `op_of_block[b]` is the index of the op serving target block b, or `NO_OP`."""

    def __init__(
        self,
        *,
        block_size: int,
        compression: Compression,
        max_unit: int,
        ops_digest: int,
        op_of_block: memoryview,
        ops: bytes | bytearray | memoryview,
    ) -> None:
        self.block_size = block_size
        self.compression = compression
        self.max_unit = max_unit
        self.ops_digest = ops_digest
        self.op_of_block = op_of_block
        self.ops = ops

    @property
    def block_count(self) -> int:
        """Target blocks."""
        return len(self.op_of_block)

    @property
    def op_count(self) -> int:
        """Op records."""
        return len(self.ops) // OP_SIZE

    def op(self, index: int) -> Op:
        """The op with this index."""
        return Op.unpack(self.ops, index * OP_SIZE)

    def changed_extents(self, start: int, end: int) -> Iterator[Extent]:
        """The runs of blocks in [start, end) that have an op, ascending."""
        table = self.op_of_block
        block = start
        while block < end:
            while block < end and table[block] < 0:
                block += 1
            first = block
            while block < end and table[block] >= 0:
                block += 1
            if first < block:
                yield Extent(first, block - first)

    def save(self, fd: int) -> None:
        """Write the file form to an empty file; not flushed, since it can always be made again."""
        table = self.op_of_block.cast("B")
        crc = zlib.crc32(self.ops, zlib.crc32(table))
        head = _HEAD.pack(
            _MAGIC,
            1,
            self.block_size,
            self.block_count,
            self.op_count,
            self.compression,
            self.max_unit,
            self.ops_digest,
        )
        head += struct.pack("<I", crc)
        head += struct.pack("<I", zlib.crc32(head))
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(head.ljust(_HEAD_SIZE, b"\0"))
            file.write(table)
            file.write(self.ops)

    @classmethod
    def load(cls, fd: int) -> "BlockMap":
        """Map the file form; EBADMSG when it is not whole."""
        size = os.fstat(fd).st_size
        if size < _HEAD_SIZE:
            raise SnapdError(errno.EBADMSG, f"block map: only {size} bytes long")
        view = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
        magic, version, block_size, blocks, ops, compression, max_unit, digest = _HEAD.unpack_from(view)
        crc, head_crc = _CRCS.unpack_from(view, _HEAD.size)
        if (
            (magic, version) != (_MAGIC, 1)
            or head_crc != zlib.crc32(view[: _HEAD.size + 4])
            or size != _HEAD_SIZE + 4 * blocks + OP.size * ops
            or crc != zlib.crc32(view[_HEAD_SIZE:])
        ):
            raise SnapdError(errno.EBADMSG, "block map: damaged or not a block map")
        table_end = _HEAD_SIZE + 4 * blocks
        return cls(
            block_size=block_size,
            compression=Compression(compression),
            max_unit=max_unit,
            ops_digest=digest,
            op_of_block=view[_HEAD_SIZE:table_end].cast("i"),
            ops=view[table_end:],
        )

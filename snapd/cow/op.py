"""Op records: the 16 bytes of version 3, which are also the form in memory, and the 20 bytes of versions 1 and 2."""

import errno
from typing import NamedTuple

from snapd.cow.errors import CowError
from snapd.cow.format import MAX_UNIT_BLOCKS, OP_V2, OP_V3, SOURCE_BITS, SOURCE_LIMIT, Compression, OpType

# Looked up once a block read: calling the enum costs several times as much.
_OP_TYPES = {int(kind): kind for kind in OpType}
_SOURCE_MASK = SOURCE_LIMIT - 1


class Op(NamedTuple):
    """A data op (section 3.3): `blocks` target blocks from `new_block`.

    `source` is a source block (copy), the payload's byte offset in the COW (replace), a byte offset in the source
    image (XOR) or 0 (zero); `data_length` is the payload's bytes on disk.
    """

    type: OpType
    new_block: int
    blocks: int
    source: int
    data_length: int

    def pack(self) -> bytes:
        """The 16 bytes of version 3; ERANGE for a field that does not fit (COW-21, COW-23)."""
        self._check_range()
        if not 1 <= self.blocks <= MAX_UNIT_BLOCKS or self.blocks & (self.blocks - 1):
            raise CowError(
                f"{self.blocks} blocks are no power of two up to {MAX_UNIT_BLOCKS}",
                statement="COW-21",
                number=errno.ERANGE,
            )
        factor = self.blocks.bit_length() - 1
        return OP_V3.pack(self.data_length, self.new_block, self.type << 60 | factor << 57 | self.source)

    def pack_v2(self, compression: Compression) -> bytes:
        """The 20 bytes of version 2 (section 3.1); ERANGE for a field that does not fit (COW-19, COW-111)."""
        self._check_range()
        if self.blocks != 1 or self.data_length >> 16:
            raise CowError(
                f"{self.blocks} blocks in {self.data_length} bytes: version 2 has one block an op, in 16 bits",
                statement="COW-111",
                number=errno.ERANGE,
            )
        code = compression if self.type in (OpType.REPLACE, OpType.XOR) else Compression.NONE
        return OP_V2.pack(self.type, code, self.data_length, self.new_block, self.source)

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview, offset: int) -> "Op":
        """The version 3 record at `offset` of `raw`, which the reader has checked before."""
        data_length, new_block, info = OP_V3.unpack_from(raw, offset)
        return cls(_OP_TYPES[info >> 60], new_block, 1 << (info >> 57 & 7), info & _SOURCE_MASK, data_length)

    def _check_range(self) -> None:
        if self.new_block >> 32:
            raise CowError(
                f"target block {self.new_block} needs more than 32 bits", statement="COW-23", number=errno.ERANGE
            )
        if self.source >> SOURCE_BITS:
            raise CowError(f"source {self.source} needs more than 48 bits", statement="COW-23", number=errno.ERANGE)

"""The data ops of a parsed COW as arrays, the same for every version.

Invariant: a table keeps the records in version 3 form and the offsets of the payloads, 24 bytes an op, and nothing
else; the other columns are computed where they are asked for.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from snapd.cow.format import OP_SIZE_V3, SOURCE_LIMIT
from snapd.cow.op import Op

_Bytes = npt.NDArray[np.uint8]


class OpTable:
    """Ops in stream order; each column has one entry an op.

    `records` holds 16 bytes an op (section 3.3); `payload` is the byte offset of an op's payload in the file, for an op
    without one the place where it would be. Both are read-only views.
    """

    def __init__(self, records: memoryview, payload: npt.NDArray[np.uint64]) -> None:
        self.records = records
        self.payload = payload
        self._bytes: _Bytes = np.frombuffer(records, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.payload)

    def op(self, index: int) -> Op:
        """The op with this index."""
        return Op.unpack(self.records, index * OP_SIZE_V3)

    def part(self, start: int, end: int) -> "OpTable":
        """The table of the ops [start, end), over the same memory."""
        return OpTable(self.records[start * OP_SIZE_V3 : end * OP_SIZE_V3], self.payload[start:end])

    def parts(self, length: int) -> Iterator[tuple[int, "OpTable"]]:
        """The table in pieces of at most `length` ops, each with the index of its first op."""
        for start in range(0, len(self), length):
            yield start, self.part(start, min(start + length, len(self)))

    @property
    def data_length(self) -> npt.NDArray[np.uint32]:
        """Payload bytes on disk."""
        return self._bytes.view("<u4")[0::4]

    @property
    def new_block(self) -> npt.NDArray[np.uint32]:
        """First target block. Adding to it in 32 bits may wrap: see `end`."""
        return self._bytes.view("<u4")[1::4]

    @property
    def type(self) -> _Bytes:
        """The code of the `OpType`."""
        return self._bytes[15::16] >> np.uint8(4)

    @property
    def exponent(self) -> _Bytes:
        """log2 of the blocks covered."""
        return self._bytes[15::16] >> np.uint8(1) & np.uint8(7)

    @property
    def reserved(self) -> npt.NDArray[np.uint16]:
        """The nine bits between exponent and source, zero in a good file."""
        return self._bytes.view("<u2")[7::8] & np.uint16(0x1FF)

    @property
    def blocks(self) -> _Bytes:
        """Target blocks covered."""
        return np.uint8(1) << self.exponent

    @property
    def source(self) -> npt.NDArray[np.uint64]:
        """Source block, payload offset or byte offset in the source image, as the type says."""
        return self._bytes.view("<u8")[1::2] & np.uint64(SOURCE_LIMIT - 1)

    @property
    def end(self) -> npt.NDArray[np.uint64]:
        """The target block behind the op."""
        return self.new_block.astype(np.uint64) + self.blocks

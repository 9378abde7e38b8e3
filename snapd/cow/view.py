"""The read path: what a COW over a base reads as.

Invariant: a block either reads as the exact content of the image or raises; nothing that failed to decode or to
verify is ever copied out. The view keeps no state but a bounded cache of decoded units, so any number of them may
read the same files.
"""

import errno
from collections import OrderedDict
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, WritableBuffer
from snapd.cow.blockmap import BlockMap
from snapd.cow.compress import Decoder
from snapd.cow.format import Op, OpType

_CACHE_BYTES = 4 << 20
_ZEROS = bytes(1 << 20)

UnitCheck = Callable[[int, bytes], None]
"""Called with (op index, decoded unit) before a unit is used; raises to refuse it."""


class CowView:
    """The image that `block_map` describes (COW-52, COW-53, COW-57, COW-63).

    `payloads` is the COW file, `source` what copies read from (the old image), `base` what unchanged blocks are read
    from. Not for use by two threads at once.
    """

    def __init__(
        self,
        block_map: BlockMap,
        payloads: Readable,
        *,
        source: Readable,
        base: Readable,
        check_unit: UnitCheck | None = None,
    ) -> None:
        self._map = block_map
        self._payloads = payloads
        self._source = source
        self._base = base
        self._check_unit = check_unit
        self._decoder = Decoder(block_map.compression)
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cache_units = max(1, _CACHE_BYTES // block_map.max_unit)

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self._map.block_count * self._map.block_size

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill `buffer` from byte `offset`; any offset and length inside the image.

        Errors: EIO behind the end; EBADMSG for a damaged unit; else what a store raises.
        """
        out = memoryview(buffer)
        end = offset + len(out)
        if offset < 0 or end > self.size:
            raise SnapdError(errno.EIO, f"read of bytes {offset} to {end} of an image of {self.size}")
        start = offset
        while offset < end:
            offset += self._read_run(out[offset - start :], offset, end)

    def _read_run(self, out: memoryview, offset: int, end: int) -> int:
        """Read the longest piece from `offset` that one source serves; returns its bytes."""
        block_size = self._map.block_size
        table = self._map.op_of_block
        block, skip = divmod(offset, block_size)
        last = (end - 1) // block_size
        index = table[block]
        if index < 0:
            while block < last and table[block + 1] < 0:
                block += 1
            length = min((block + 1) * block_size, end) - offset
            self._base.read_into(out[:length], offset)
            return length
        op = self._map.op(index)
        if op.type is OpType.REPLACE:
            within = offset - op.new_block * block_size
            length = min(op.blocks * block_size - within, end - offset)
            unit = self._unit(index, op)
            out[:length] = unit if length == len(unit) else memoryview(unit)[within : within + length]
            return length
        if op.type is OpType.COPY:
            blocks = self._copy_run(block, last, op.source)
            length = min((block + blocks) * block_size, end) - offset
            self._source.read_into(out[:length], op.source * block_size + skip)
            return length
        length = min((block + 1) * block_size, end) - offset
        out[:length] = _ZEROS[:length]
        return length

    def _copy_run(self, block: int, last: int, source: int) -> int:
        """How many blocks from `block` on are copies of consecutive source blocks."""
        blocks = 1
        while block + blocks <= last:
            index = self._map.op_of_block[block + blocks]
            if index < 0:
                break
            op = self._map.op(index)
            if op.type is not OpType.COPY or op.source != source + blocks:
                break
            blocks += 1
        return blocks

    def _unit(self, index: int, op: Op) -> bytes:
        unit = self._cache.get(index)
        if unit is not None:
            self._cache.move_to_end(index)
            return unit
        payload = bytearray(op.data_length)
        self._payloads.read_into(payload, op.source)
        unit = self._decoder.decode(payload, op.blocks * self._map.block_size, op_index=index)
        if self._check_unit is not None:
            self._check_unit(index, unit)
        self._cache[index] = unit
        if len(self._cache) > self._cache_units:
            self._cache.popitem(last=False)
        return unit

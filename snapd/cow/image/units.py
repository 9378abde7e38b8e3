"""Units: what one payload of a COW file stores, decoded, checked and cached.

Invariant: a unit that did not decode, or does not match the digests that are known, is never handed out. Workers read
units: nothing here imports numpy.
"""

from collections import OrderedDict
from collections.abc import Callable

from snapd.block.store import Buffer, Readable
from snapd.cow.compress import Decoder
from snapd.cow.op import Op

_CACHE_BYTES = 4 << 20

UnitCheck = Callable[[int, Buffer], None]
"""Called with (op index, decoded unit) before a unit is used; raises to refuse it."""


class UnitReader:
    """Reads units of one file; `max_unit` bytes is the largest. Not for use by two threads at once."""

    def __init__(
        self, payloads: Readable, decoder: Decoder, *, block_size: int, max_unit: int, check: UnitCheck | None = None
    ) -> None:
        self._payloads = payloads
        self._decoder = decoder
        self._block_size = block_size
        self._check = check
        self._cache: OrderedDict[int, Buffer] = OrderedDict()
        self._cache_units = max(1, _CACHE_BYTES // max_unit)

    def cached(self, index: int) -> Buffer | None:
        """The unit of op `index` if it was read a short while ago."""
        unit = self._cache.get(index)
        if unit is not None:
            self._cache.move_to_end(index)
        return unit

    def read(self, index: int, op: Op, payload_offset: int) -> Buffer:
        """The unit of op `index`, whose payload lies at `payload_offset`; `CowError` (EBADMSG) when it is damaged."""
        payload = bytearray(op.data_length)
        self._payloads.read_into(payload, payload_offset)
        unit = self._decoder.decode(payload, op.blocks * self._block_size, op_index=index)
        if self._check is not None:
            self._check(index, unit)
        self._cache[index] = unit
        if len(self._cache) > self._cache_units:
            self._cache.popitem(last=False)
        return unit

"""The read path: what a COW over a base reads as.

Invariant: a block either reads as the exact content of the image or raises, also where something failed to decode or
to match a digest that is known. The view keeps no state but a bounded cache of decoded units, so any number of them
may read the same files; views of one COW that different threads read may share the cache.
"""

import errno
from collections.abc import Iterator

from xxhash import xxh3_64_intdigest

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, WritableBuffer
from snapd.cow.compress import Decoder
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.cow.image.units import UnitCache, UnitReader
from snapd.cow.image.xor import xor_into

_ZEROS = memoryview(bytes(1 << 20))
_BATCH_BYTES = 1 << 20

# The comparisons of the hot path, once and for all: an enum's attribute costs more than the comparison.
_COPY, _REPLACE, _ZERO, _XOR = int(OpType.COPY), int(OpType.REPLACE), int(OpType.ZERO), int(OpType.XOR)


class CowView:
    """The image that `extent_map` describes (COW-52 to COW-54, COW-57, COW-63).

    `payloads` is the COW file, `source` what copies and XOR read from (the old image), `base` what unchanged blocks are
    read from, `units` the cache to use instead of an own one. Every block is compared with its digest where the map has
    one (COW-216). Not for use by two threads at once.
    """

    def __init__(
        self,
        extent_map: ExtentMap,
        payloads: Readable,
        *,
        source: Readable,
        base: Readable,
        units: UnitCache | None = None,
    ) -> None:
        self._map = extent_map
        self._block_size = extent_map.block_size
        self._payloads = payloads
        self._source = source
        self._base = base
        self._digests = extent_map.digests
        self._size = extent_map.block_count * extent_map.block_size
        self._decoder = Decoder(extent_map.compression, version=extent_map.version)
        self._units = UnitReader(payloads, self._decoder, cache=units)
        self._room = memoryview(bytearray(extent_map.block_size))
        # Bound once: the hot path looks up as little as it can.
        self._cached = self._units.cached
        self._enter(0)

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self._size

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill `buffer` from byte `offset`; any offset and length inside the image.

        Errors, after which the buffer's content means nothing: EIO behind the end; `CowError` (EBADMSG) for a
        damaged unit, or a block that is not what its digest says; else what a store raises.
        """
        end = offset + len(buffer)
        # Most reads stay in the run of the last one, and in one unit, which the cache has.
        if self._start <= offset and end <= self._end and self._unit_bytes:
            ordinal, within = divmod(offset - self._origin, self._unit_bytes)
            stop = within + end - offset
            if stop <= self._unit_bytes and (unit := self._cached(self._value + ordinal)) is not None:
                if self._digests is not None:
                    self._check_part(unit, within, stop, offset)
                buffer[:] = unit[within:stop]
                return
        if offset < 0 or end > self._size:
            raise SnapdError(errno.EIO, f"read of bytes {offset} to {end} of an image of {self._size}")
        out = memoryview(buffer)
        at = offset
        while at < end:
            if not self._start <= at < self._end:
                self._enter(at // self._block_size)
            stop = min(self._end, end)
            self._read_run(out[at - offset : stop - offset], at)
            at = stop

    def _enter(self, block: int) -> None:
        """Make the run that has the block the one that reads look at first."""
        size = self._block_size
        start, length, self._kind, unit_blocks, self._value = self._map.run(self._map.run_of(block))
        self._start = start * size
        self._end = self._start + length * size
        if self._kind == _REPLACE:
            self._unit_bytes = unit_blocks * size
            # A unit may begin before its run, where another op serves its first blocks.
            self._origin = self._map.new_blocks[self._value] * size
        else:
            self._unit_bytes = 0

    def _read_run(self, out: memoryview, offset: int) -> None:
        """Fill `out` with what the run that was entered has from byte `offset` of the image."""
        kind = self._kind
        if kind == _REPLACE:
            self._read_units(out, offset)
        elif self._digests is not None or kind == _XOR:
            self._read_blocks(out, offset)
        elif kind == UNCHANGED:
            self._base.read_into(out, offset)
        elif kind == _COPY:
            self._source.read_into(out, offset + self._value * self._block_size - self._start)
        else:
            _fill_zeros(out)

    def _read_blocks(self, out: memoryview, offset: int) -> None:
        """The same for what can be had in whole blocks only, through a bounce buffer where that is needed."""
        size, kind = self._block_size, self._kind
        block, skip = divmod(offset, size)
        length = -(-(skip + len(out)) // size) * size
        whole = out if length == len(out) else memoryview(bytearray(length))
        at = offset - skip
        if kind == UNCHANGED:
            self._base.read_into(whole, at)
        elif kind == _COPY:
            self._source.read_into(whole, at + self._value * size - self._start)
        elif kind == _ZERO:
            _fill_zeros(whole)
        else:
            self._read_xor(self._value + (at - self._start) // size, whole)
        if self._digests is not None:
            self._check(block, whole)
        if whole is not out:
            out[:] = whole[skip : skip + len(out)]

    def _read_xor(self, index: int, out: memoryview) -> None:
        """Whole XOR blocks, whose first op has this index (COW-54)."""
        size = self._block_size
        content = memoryview(bytearray(len(out)))
        self._decode(index, size, out)
        sources = self._map.sources(index, index + len(out) // size)
        first = 0
        for i in range(1, len(sources) + 1):
            if i == len(sources) or sources[i] != sources[i - 1] + size:
                self._source.read_into(content[first * size : i * size], sources[first])
                first = i
        xor_into(out, content)

    def _read_units(self, out: memoryview, offset: int) -> None:
        """Replaced blocks: units that are wanted whole are read and decoded in a row, others through the cache."""
        unit_bytes = self._unit_bytes
        at = 0
        while at < len(out):
            ordinal, within = divmod(offset + at - self._origin, unit_bytes)
            index = self._value + ordinal
            unit = self._cached(index)
            if unit is None and not within and (whole := (len(out) - at) // unit_bytes):
                end = at + whole * unit_bytes
                self._decode(index, unit_bytes, out[at:end])
                if self._digests is not None:
                    self._check((offset + at) // self._block_size, out[at:end])
            else:
                if unit is None:
                    payload, length = self._map.payloads[index], self._map.payload_lengths[index]
                    unit = self._units.read(index, payload, length, unit_bytes)
                stop = min(unit_bytes, within + len(out) - at)
                if self._digests is not None:
                    self._check_part(unit, within, stop, offset + at)
                end = at + stop - within
                out[at:end] = unit[within:stop]
            at = end

    def _decode(self, index: int, unit_bytes: int, out: memoryview) -> None:
        """Fill `out` with whole units from op `index` on; payloads that lie together are read together (COW-123)."""
        if len(out) == unit_bytes:
            length = self._map.payload_lengths[index]
            # A raw one is read to where it belongs.
            payload = out if length == unit_bytes else self._scratch(length)
            self._payloads.read_into(payload, self._map.payloads[index])
            unit = self._decoder.decode(payload, unit_bytes, op_index=index)
            if unit is not out:
                out[:] = unit
            return
        decode = self._decoder.decode
        last = index + len(out) // unit_bytes
        starts = self._map.payloads[index:last].tolist()
        lengths = self._map.payload_lengths[index:last].tolist()
        at = 0
        for first, stop in _together(starts, lengths):
            begin = starts[first]
            raw = self._scratch(starts[stop - 1] + lengths[stop - 1] - begin)
            self._payloads.read_into(raw, begin)
            for i in range(first, stop):
                taken = starts[i] - begin
                out[at : at + unit_bytes] = decode(raw[taken : taken + lengths[i]], unit_bytes, op_index=index + i)
                at += unit_bytes

    def _scratch(self, length: int) -> memoryview:
        """Room for payloads, the same every time; at most a batch, or the largest payload there is."""
        if len(self._room) < length:
            self._room = memoryview(bytearray(length))
        return self._room[:length]

    def _check_part(self, unit: memoryview, within: int, stop: int, offset: int) -> None:
        """Check the blocks that bytes [within, stop) of a unit touch; the first of these is byte `offset` of the image.

        What is served, not the unit: a bit that changed in a raw unit costs one block.
        """
        size = self._block_size
        self._check(offset // size, unit[within - within % size : -(-stop // size) * size])

    def _check(self, block: int, content: memoryview) -> None:
        """`CowError` naming the first of these whole blocks that is not what its digest says; 0 is not known."""
        assert self._digests is not None
        size = self._block_size
        if len(content) == size and xxh3_64_intdigest(content) == self._digests[block]:
            return
        found = [xxh3_64_intdigest(content[at : at + size]) for at in range(0, len(content), size)]
        wanted = self._digests[block : block + len(found)].tolist()
        if found == wanted:
            return
        for number, (one, other) in enumerate(zip(found, wanted, strict=True), start=block):
            # What hashes to 0 has 1: 0 stands for "not known".
            if other and (one or 1) != other:
                raise CowError(f"block {number} of the image does not match its digest", statement="COW-216")


def _together(starts: list[int], lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Index ranges of payloads that lie one behind the other, of at most `_BATCH_BYTES` each, or of one payload."""
    first = 0
    begin = end = starts[0]
    for i, start in enumerate(starts):
        if start != end or (i > first and end + lengths[i] - begin > _BATCH_BYTES):
            yield first, i
            first, begin, end = i, start, start
        end += lengths[i]
    yield first, len(starts)


def _fill_zeros(out: memoryview) -> None:
    for at in range(0, len(out), len(_ZEROS)):
        piece = out[at : at + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]

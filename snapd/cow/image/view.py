"""The read path: what a COW over a base reads as.

Invariant: a block either reads as the exact content of the image or raises, also where something failed to decode or
to match a digest that is known. The view keeps no state but a bounded cache of decoded units, so any number of them
may read the same files.
"""

import errno
from collections.abc import Iterator

from xxhash import xxh3_64_intdigest

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, WritableBuffer
from snapd.cow.compress import Decoder
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap, Run
from snapd.cow.image.units import UnitReader
from snapd.cow.image.xor import xor_into

_ZEROS = bytes(1 << 20)
_BATCH_BYTES = 1 << 20

# The comparisons of the hot path, once and for all: an enum's attribute costs more than the comparison.
_COPY, _REPLACE, _ZERO = int(OpType.COPY), int(OpType.REPLACE), int(OpType.ZERO)


class CowView:
    """The image that `extent_map` describes (COW-52 to COW-54, COW-57, COW-63).

    `payloads` is the COW file, `source` what copies and XOR read from (the old image), `base` what unchanged blocks are
    read from. Every block is compared with its digest where the map has one (COW-216). Not for use by two threads at
    once.
    """

    def __init__(self, extent_map: ExtentMap, payloads: Readable, *, source: Readable, base: Readable) -> None:
        self._map = extent_map
        self._block_size = extent_map.block_size
        self._payloads = payloads
        self._source = source
        self._base = base
        self._digests = extent_map.digests
        self._size = extent_map.block_count * extent_map.block_size
        self._index, self._run = 0, extent_map.run(0)
        self._decoder = Decoder(extent_map.compression, version=extent_map.version)
        self._units = UnitReader(
            payloads, self._decoder, block_size=extent_map.block_size, max_unit=extent_map.max_unit
        )

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self._size

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill `buffer` from byte `offset`; any offset and length inside the image.

        Errors, after which the buffer's content means nothing: EIO behind the end; `CowError` (EBADMSG) for a
        damaged unit, or a block that is not what its digest says; else what a store raises.
        """
        out = memoryview(buffer)
        end = offset + len(out)
        if offset < 0 or end > self._size:
            raise SnapdError(errno.EIO, f"read of bytes {offset} to {end} of an image of {self._size}")
        if offset == end:
            return
        at = offset
        index = self._map.run_of(at // self._block_size)
        while at < end:
            # Most reads stay in the run of the last one.
            if index != self._index:
                self._index, self._run = index, self._map.run(index)
            run = self._run
            stop = min(run.end * self._block_size, end)
            self._read_run(run, out[at - offset : stop - offset], at)
            at = stop
            index += 1

    def _read_run(self, run: Run, out: memoryview, offset: int) -> None:
        """Fill `out` with what `run` has from byte `offset` of the image."""
        if run.kind == _REPLACE:
            self._read_units(run, out, offset)
        elif run.kind == _ZERO and self._digests is None:
            _fill_zeros(out)
        elif run.kind in (UNCHANGED, _COPY) and self._digests is None:
            image, at = self._image_of(run, offset)
            image.read_into(out, at)
        else:
            self._read_blocks(run, out, offset)

    def _read_blocks(self, run: Run, out: memoryview, offset: int) -> None:
        """The same for what can be had in whole blocks only, through a bounce buffer where that is needed."""
        size = self._block_size
        skip = offset % size
        length = -(-(skip + len(out)) // size) * size
        whole = out if length == len(out) else memoryview(bytearray(length))
        block = offset // size
        if run.kind in (UNCHANGED, _COPY):
            image, at = self._image_of(run, block * size)
            image.read_into(whole, at)
        elif run.kind == _ZERO:
            _fill_zeros(whole)
        else:
            self._read_xor(run.value + block - run.start, whole)
        if self._digests is not None:
            self._check(block, whole)
        if whole is not out:
            out[:] = whole[skip : skip + len(out)]

    def _image_of(self, run: Run, offset: int) -> tuple[Readable, int]:
        """Who has byte `offset` of the image, and where."""
        if run.kind == UNCHANGED:
            return self._base, offset
        return self._source, offset + (run.value - run.start) * self._block_size

    def _read_xor(self, index: int, out: memoryview) -> None:
        """Whole XOR blocks, whose first op has this index (COW-54)."""
        size = self._block_size
        content = memoryview(bytearray(len(out)))
        self._decode(index, 1, out)
        sources = self._map.sources(index, index + len(out) // size)
        first = 0
        for i in range(1, len(sources) + 1):
            if i == len(sources) or sources[i] != sources[i - 1] + size:
                self._source.read_into(content[first * size : i * size], sources[first])
                first = i
        xor_into(out, content)

    def _read_units(self, run: Run, out: memoryview, offset: int) -> None:
        """Replaced blocks: units that are wanted whole are read and decoded in a row, others through the cache."""
        unit_bytes = run.unit_blocks * self._block_size
        first = run.start * self._block_size
        at = 0
        while at < len(out):
            ordinal, within = divmod(offset + at - first, unit_bytes)
            whole = 0 if within else (len(out) - at) // unit_bytes
            if whole > 1:
                end = at + whole * unit_bytes
                self._decode(run.value + ordinal, run.unit_blocks, out[at:end])
                if self._digests is not None:
                    self._check((offset + at) // self._block_size, out[at:end])
                at = end
            else:
                at += self._copy_unit(run.value + ordinal, out[at:], offset + at, unit_bytes - within)

    def _copy_unit(self, index: int, out: memoryview, offset: int, limit: int) -> int:
        """What one unit has from byte `offset` of the image on, at most `limit` bytes; returns how much."""
        unit = self._units.cached(index)
        if unit is None:
            unit = self._units.read(index, self._map.op(index), self._map.payloads[index])
        size, new_block = self._block_size, self._map.new_blocks[index]
        within = offset - new_block * size
        length = min(limit, len(out), len(unit) - within)
        if self._digests is not None:
            # What is served, not the unit: a bit that changed in a raw unit costs one block.
            first, end = within // size, -(-(within + length) // size)
            self._check(new_block + first, memoryview(unit)[first * size : end * size])
        out[:length] = unit if length == len(unit) else memoryview(unit)[within : within + length]
        return length

    def _decode(self, index: int, unit_blocks: int, out: memoryview) -> None:
        """Fill `out` with whole units from op `index` on; payloads that lie together are read together (COW-123)."""
        size, decode = unit_blocks * self._block_size, self._decoder.decode
        last = index + len(out) // size
        starts = self._map.payloads[index:last].tolist()
        lengths = self._map.payload_lengths[index:last].tolist()
        at = 0
        for first, stop in _together(starts, lengths):
            begin = starts[first]
            raw = memoryview(bytearray(starts[stop - 1] + lengths[stop - 1] - begin))
            self._payloads.read_into(raw, begin)
            for i in range(first, stop):
                taken = starts[i] - begin
                out[at : at + size] = decode(raw[taken : taken + lengths[i]], size, op_index=index + i)
                at += size

    def _check(self, block: int, content: memoryview) -> None:
        """`CowError` naming the first of these whole blocks that is not what its digest says; 0 is not known."""
        assert self._digests is not None
        size = self._block_size
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

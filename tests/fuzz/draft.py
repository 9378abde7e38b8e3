"""COW files that are not bytes yet: put together with the layout's tables, so that what was changed hangs together."""

from dataclasses import dataclass, field, replace

from rawcow import NONE, REPLACE, Rec, op, raw_cow, raw_stream

_SOURCE_MASK = (1 << 48) - 1
_ALL_BITS = (1 << 64) - 1


@dataclass(slots=True)
class DraftOp:
    """One record and its payload; a source of None is where the payload lies, a length of None the payload's."""

    kind: int
    block: int = 0
    source: int | None = None
    payload: bytes = b""
    exponent: int = 0
    reserved: int = 0
    code: int | None = None
    length: int | None = None


@dataclass(slots=True)
class Draft:
    """A COW before it is bytes; `slots` are unused op slots of version 3, `points` its resume points."""

    version: int
    compression: int = NONE
    block_size: int = 512
    ops: list[DraftOp] = field(default_factory=list)
    cluster_ops: int = 0
    sequence: list[int] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    slots: int = 0
    unit: int = 32768
    scratch: int = 0
    state: int = 0
    merged: int = 0
    finish: bool = True

    def copy(self) -> "Draft":
        """One that can be changed by itself."""
        ops = [replace(one) for one in self.ops]
        return replace(self, ops=ops, sequence=list(self.sequence), points=list(self.points))

    def build(self) -> bytes:
        """The file."""
        raw = self._regions() if self.version == 3 else self._stream()
        if self.scratch and self.version > 1:
            state = 78 if self.version == 3 else 38
            raw = raw[:state] + bytes([self.state & 255]) + raw[state + 1 :]
        return raw

    def _regions(self) -> bytes:
        records, data = [], b""
        slots = len(self.ops) + self.slots
        start = 78 + self.scratch + 4 * len(self.sequence) + 64 + 16 * slots
        for one in self.ops:
            length = len(one.payload) if one.length is None else one.length
            source = (start + len(data) if one.kind == REPLACE else 0) if one.source is None else one.source
            fields = (one.kind & 15, one.block & 0xFFFFFFFF, source & _SOURCE_MASK, length & 0xFFFFFFFF)
            records.append(op(*fields, one.exponent & 7, one.reserved & 511))
            data += one.payload
        return raw_cow(
            records,
            data,
            tuple(block & 0xFFFFFFFF for block in self.sequence),
            tuple(self.points[:4]),
            op_count_max=slots,
            block_size=self.block_size,
            buffer_size=self.scratch,
            num_merge_ops=self.merged,
            compression=self.compression,
            max_compression_size=self.unit,
        )

    def _stream(self) -> bytes:
        records = [
            Rec(
                one.kind & 255,
                one.block & _ALL_BITS,
                None if one.source is None else one.source & _ALL_BITS,
                one.payload,
                one.code,
                (len(one.payload) if one.length is None else one.length) & 0xFFFF,
            )
            for one in self.ops
        ]
        return raw_stream(
            records,
            self.version,
            cluster_ops=self.cluster_ops,
            compression=self.compression,
            finish=self.finish,
            block_size=self.block_size,
            buffer_size=self.scratch,
            num_merge_ops=self.merged,
        ).raw


@dataclass(frozen=True, slots=True)
class Seed:
    """One file of the corpus; without a draft it can be changed as bytes only."""

    name: str
    raw: bytes
    draft: Draft | None = None
    digests: bytes | None = None

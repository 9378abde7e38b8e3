"""What a COW file says, as the second reader has it (`modelread`): ops, image and merge order in plain loops.

Written from the tables of the format alone; shared with the code under test are only the codecs' libraries.
"""

import struct
from dataclasses import dataclass, field

import xxhash
from modelcodecs import Damaged, decode_brotli, decode_gz, decode_lz4, decode_zstd

COPY, REPLACE, ZERO, LABEL, CLUSTER, XOR, SEQUENCE, FOOTER = 1, 2, 3, 4, 5, 6, 7, 255
NONE, GZ, BROTLI, LZ4, ZSTD = range(5)


@dataclass(slots=True)
class Op:
    """A data op and where its payload lies."""

    kind: int
    block: int
    blocks: int
    source: int
    length: int
    payload: int
    info: int
    """The last eight bytes of the record in version 3 form."""


@dataclass(slots=True)
class Reading:
    """What a file says."""

    data: bytes
    version: int
    block_size: int
    compression: int = NONE
    header_size: int = 0
    unit: int = 0
    merged_ops: int = 0
    op_total: int | None = None
    window_done: bool = False
    ops: list[Op] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    """All labels that it has, also those that cannot be used."""
    tolerated: bool = False

    @property
    def is_merged(self) -> bool:
        return 0 < self.merged_ops == self.op_total and not self.window_done

    @property
    def has_begun(self) -> bool:
        return (self.merged_ops > 0 or self.window_done) and not self.is_merged

    @property
    def ops_digest(self) -> int:
        records = [struct.pack("<IIQ", op.length, op.block, op.info) for op in self.ops]
        return xxhash.xxh3_64_intdigest(b"".join(records))

    @property
    def end_block(self) -> int:
        """The block behind the last one that is written."""
        return max((op.block + op.blocks for op in self.ops), default=0)

    def fits(self, base_blocks: int, target_blocks: int) -> bool:
        """Whether the ops stay inside the images and cover what the base lacks (V30, UNDO-23)."""
        size = self.block_size
        for op in self.ops:
            if op.kind == COPY and op.source >= base_blocks:
                return False
            if op.kind == XOR and op.source + size > base_blocks * size:
                return False
            if op.block + op.blocks > target_blocks:
                return False
        behind = {b for op in self.ops for b in range(op.block, op.block + op.blocks) if b >= base_blocks}
        return len(behind) >= target_blocks - base_blocks

    def owners(self) -> dict[int, int]:
        """The index of the op that serves a block; the last one wins (COW-209)."""
        owner: dict[int, int] = {}
        for index, op in enumerate(self.ops):
            for block in range(op.block, op.block + op.blocks):
                owner[block] = index
        return owner

    def content(self, op: Op, base: bytes) -> bytes:
        """All bytes that an op writes (COW-52 to COW-54, COW-57); `Damaged` where they cannot be had."""
        size = self.block_size
        if op.kind == ZERO:
            return bytes(size)
        at = op.source * size if op.kind == COPY else op.source
        source = base[at : at + size]
        if op.kind in (COPY, XOR) and len(source) < size:
            raise Damaged("behind the base")
        if op.kind == COPY:
            return source
        unit = self.decoded(op)
        if op.kind == REPLACE:
            return unit
        return (int.from_bytes(unit, "little") ^ int.from_bytes(source, "little")).to_bytes(size, "little")

    def decoded(self, op: Op) -> bytes:
        """The decoded payload of an op (COW-108); `Damaged` where it cannot be had."""
        payload, size = self.data[op.payload : op.payload + op.length], op.blocks * self.block_size
        may_be_raw = self.version == 3 or self.compression in (NONE, LZ4, ZSTD)
        if may_be_raw and len(payload) == size:
            return payload
        decode = {GZ: decode_gz, BROTLI: decode_brotli, LZ4: decode_lz4, ZSTD: decode_zstd}
        if self.compression not in decode:
            raise Damaged("not raw")
        unit = decode[self.compression](payload, size)
        if len(unit) != size:
            raise Damaged("another size")
        return unit

    def merge_order(self) -> list[int]:
        """Indices of the ops in merge order (COW-67 to COW-71)."""
        at = {op.block: index for index, op in reversed(list(enumerate(self.ops)))}
        indices = range(len(self.ops))
        if self.sequence:
            first = [at[block] for block in self.sequence if block in at]
        elif self.version == 3:
            return list(indices)
        else:
            first = [i for i in indices if self.ops[i].kind in (COPY, XOR)]
        rest = [i for i in indices if i not in set(first)]
        return first + sorted(rest, key=lambda i: self.ops[i].block)

    def order_holds(self) -> bool:
        """Whether an ordered merge may take the ops in merge order (COW-74 to COW-76)."""
        written: set[int] = set()
        unordered = False
        for index in self.merge_order():
            op = self.ops[index]
            if op.kind not in (COPY, XOR):
                unordered = True
                continue
            if unordered:
                return False
            reads = {op.source}
            if op.kind == XOR:
                reads = {op.source // self.block_size, (op.source + self.block_size - 1) // self.block_size}
            if reads & written:
                return False
            written.add(op.block)
        return True

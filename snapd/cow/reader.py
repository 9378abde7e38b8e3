"""The checked parse of a COW v3 file (section 9, the "Ours" column).

Invariant: `CowFile.parse` returns a file of which every rule that needs no other file holds, or raises a
`CowError` that names the rule. Nothing partly parsed is handed out. The parse is vectorised: one read and a few
array comparisons, whatever the number of ops.
"""

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, Store, read_bytes
from snapd.cow.blockmap import NO_OP, BlockMap
from snapd.cow.errors import CowError
from snapd.cow.format import HEADER_SIZE, MAX_UNIT_BLOCKS, OP_SIZE, SOURCE_LIMIT, Compression, Header, OpType

_RECORD = np.dtype([("data_length", "<u4"), ("new_block", "<u4"), ("info", "<u8")])
_Int = npt.NDArray[np.int64]
_SCRATCH_DONE = 2
_MAX_INDEX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class CowFile:
    """A parsed COW: the header, and one array entry an op (`type`, `new_block`, `blocks`, `source`, `data_length`).

    `sequence` are the target blocks whose ops an ordered merge takes first, in that order.
    """

    header: Header
    size: int
    ops: bytes
    type: _Int
    new_block: _Int
    blocks: _Int
    source: _Int
    data_length: _Int
    sequence: _Int

    @classmethod
    def parse(cls, store: Store) -> "CowFile":
        """Read and check a whole file."""
        size = store.size()
        header = Header.unpack(read_bytes(store, 0, min(size, HEADER_SIZE)))
        if HEADER_SIZE + header.buffer_size > size:
            raise CowError(
                f"{header.buffer_size} bytes of scratch leave the file of {size}", statement="COW-41", offset=34
            )
        ops_end = header.ops_start + header.op_count * OP_SIZE
        if header.op_count and ops_end > size:
            raise CowError(
                f"the op region ends at byte {ops_end}, the file has {size}", statement="V11", offset=header.ops_start
            )
        raw = read_bytes(store, header.ops_start, header.op_count * OP_SIZE) if header.op_count else b""
        record = np.frombuffer(raw, dtype=_RECORD)
        info = record["info"]
        cow = cls(
            header=header,
            size=size,
            ops=raw,
            type=(info >> np.uint64(60)).astype(np.int64),
            new_block=record["new_block"].astype(np.int64),
            blocks=np.int64(1) << (info >> np.uint64(57) & np.uint64(7)).astype(np.int64),
            source=(info & np.uint64(SOURCE_LIMIT - 1)).astype(np.int64),
            data_length=record["data_length"].astype(np.int64),
            sequence=_read_sequence(store, header, size),
        )
        cow._check_supported()
        cow._check_types(reserved=(info >> np.uint64(48) & np.uint64(0x1FF)).astype(np.int64))
        cow._check_units()
        cow._check_payloads()
        cow._check_overlap()
        cow._check_sequence()
        cow._check_progress(store)
        return cow

    @property
    def is_merged(self) -> bool:
        """All ops are in some base already (COW-145); `snapd.cow.history` tells whether they are in a given one."""
        return 0 < self.header.op_count == self.header.num_merge_ops

    @property
    def ops_digest(self) -> int:
        """xxh3-64 of the op records."""
        return xxhash.xxh3_64_intdigest(self.ops)

    @property
    def highest_target_block(self) -> int:
        """The last target block any op writes; -1 without ops."""
        return int((self.new_block + self.blocks).max()) - 1 if len(self.type) else -1

    def target_size(self, base_size: int) -> int:
        """Bytes of the new image (COW-213): the base's size, or the end of the last op behind it."""
        return max(base_size, (self.highest_target_block + 1) * self.header.block_size)

    def block_map(self, base_size: int, target_size: int | None = None, *, merged: bool = False) -> BlockMap:
        """The map of this COW over a base of `base_size` bytes; one without ops if the base is known to be `merged`.

        Errors: EINVAL for sizes that are no multiple of the block size;
        V30 for a source or target outside the images; UNDO-23 when the part behind the base is not covered by ops;
        EBUSY for a COW that another merge has begun (COW-65).
        """
        block_size = self.header.block_size
        target_size = self.target_size(base_size) if target_size is None else target_size
        for name, value in (("base", base_size), ("target", target_size)):
            if value % block_size:
                raise SnapdError(
                    errno.EINVAL, f"{name} of {value} bytes: not a multiple of the block size {block_size}"
                )
        if target_size <= 0:
            raise SnapdError(errno.EINVAL, f"target of {target_size} bytes: an image has at least one block")
        base_blocks, target_blocks = base_size // block_size, target_size // block_size
        if self.header.num_merge_ops and not self.is_merged:
            raise CowError(
                f"ordered merge begun, {self.header.num_merge_ops} of {self.header.op_count} ops: finish it first",
                statement="UNDO-28",
                number=errno.EBUSY,
            )
        if self.header.op_count > _MAX_INDEX:
            raise CowError(f"{self.header.op_count} ops, at most {_MAX_INDEX} are supported", statement="V21")
        if not merged:
            self._check_sizes(base_blocks, target_blocks)
        table = np.full(target_blocks, NO_OP, dtype=np.int32)
        if not merged:
            owner = np.repeat(np.arange(len(self.type), dtype=np.int32), self.blocks)
            first = np.repeat(self.new_block - (np.cumsum(self.blocks) - self.blocks), self.blocks)
            table[first + np.arange(len(owner))] = owner
        return BlockMap(
            block_size=block_size,
            compression=Compression(self.header.compression),
            max_unit=self.header.max_compression_size,
            ops_digest=self.ops_digest,
            op_of_block=table.data,
            ops=self.ops,
        )

    def _fail(self, bad: npt.NDArray[np.bool_], statement: str, message: str) -> None:
        """Raise for the first op that is `bad`; `message` may name any of the op's fields."""
        if not bad.any():
            return
        i = int(bad.argmax())
        fields = {
            name: int(getattr(self, name)[i]) for name in ("type", "new_block", "blocks", "source", "data_length")
        }
        raise CowError(
            message.format(**fields), statement=statement, op_index=i, offset=self.header.ops_start + i * OP_SIZE
        )

    def _check_supported(self) -> None:
        if self.header.compression not in (Compression.NONE, Compression.LZ4, Compression.ZSTD):
            raise CowError(
                f"compression {Compression(self.header.compression).name.lower()} is not supported",
                statement="COW-108",
                offset=70,
                number=errno.EOPNOTSUPP,
            )

    def _check_types(self, reserved: _Int) -> None:
        known = np.isin(self.type, [OpType.COPY, OpType.REPLACE, OpType.ZERO, OpType.XOR])
        self._fail(~known, "V22", "unknown op type {type}")
        if (self.type == OpType.XOR).any():
            raise CowError(
                "XOR ops are not supported",
                statement="COW-54",
                op_index=int((self.type == OpType.XOR).argmax()),
                number=errno.EOPNOTSUPP,
            )
        self._fail(reserved != 0, "V28", "reserved bits are set")
        payload_free = self.type != OpType.REPLACE
        self._fail(
            payload_free & (self.data_length != 0), "V28", "payload of {data_length} bytes on an op without data"
        )
        self._fail((self.type == OpType.ZERO) & (self.source != 0), "V28", "source {source} on a zero op")

    def _check_units(self) -> None:
        unit = self.blocks * self.header.block_size
        replace = self.type == OpType.REPLACE
        too_long = replace & ((self.blocks > MAX_UNIT_BLOCKS) | (unit > self.header.max_compression_size))
        self._fail(
            too_long, "V23", f"{{blocks}} blocks are more than the unit of {self.header.max_compression_size} bytes"
        )
        self._fail(~replace & (self.blocks != 1), "V23", "{blocks} blocks on an op that covers one")
        self._fail(replace & (self.data_length == 0), "COW-109", "a replace op without payload")
        self._fail(replace & (self.data_length > unit), "COW-109", "payload of {data_length} bytes for {blocks} blocks")
        if self.header.compression == Compression.NONE:
            self._fail(replace & (self.data_length != unit), "COW-107", "payload of {data_length} bytes is not raw")
        self._fail(self.new_block + self.blocks > 1 << 32, "V16", "target blocks from {new_block} leave 32 bits")

    def _check_payloads(self) -> None:
        end = self.header.data_start + np.cumsum(self.data_length)
        replace = self.type == OpType.REPLACE
        self._fail(
            replace & (self.source != end - self.data_length),
            "V18",
            "payload at byte {source} is not where it must be",
        )
        self._fail(replace & (end > self.size), "V20", "payload of {data_length} bytes at {source} leaves the file")

    def _check_overlap(self) -> None:
        order = np.argsort(self.new_block, kind="stable")
        start = self.new_block[order]
        overlap = start[1:] < (start + self.blocks[order])[:-1]
        if overlap.any():
            i = int(overlap.argmax())
            one, two = sorted((int(order[i]), int(order[i + 1])))
            raise CowError(
                f"target block {int(start[i + 1])} is already written by op {one}",
                statement="V27",
                op_index=two,
                offset=self.header.ops_start + two * OP_SIZE,
            )

    def _check_sequence(self) -> None:
        start = HEADER_SIZE + self.header.buffer_size
        missing = ~np.isin(self.sequence, self.new_block)
        if missing.any():
            i = int(missing.argmax())
            raise CowError(
                f"the sequence names block {self.sequence[i]}, which has no op", statement="V19", offset=start + 4 * i
            )
        order = np.argsort(self.sequence, kind="stable")
        again = self.sequence[order][1:] == self.sequence[order][:-1]
        if again.any():
            i = int(order[int(again.argmax()) + 1])
            raise CowError(
                f"the sequence names block {self.sequence[i]} twice", statement="COW-67", offset=start + 4 * i
            )

    def _check_progress(self, store: Readable) -> None:
        if self.header.num_merge_ops > self.header.op_count:
            raise CowError(
                f"{self.header.num_merge_ops} ops merged of {self.header.op_count}", statement="V25", offset=26
            )
        # A scratch window that is "done" holds blocks that may be nowhere else any more (COW-142).
        if self.header.buffer_size and read_bytes(store, HEADER_SIZE, 1)[0] == _SCRATCH_DONE:
            raise CowError(
                "an ordered merge stopped inside a window: finish it first",
                statement="UNDO-28",
                offset=HEADER_SIZE,
                number=errno.EBUSY,
            )

    def _check_sizes(self, base_blocks: int, target_blocks: int) -> None:
        self._fail(
            (self.type == OpType.COPY) & (self.source >= base_blocks),
            "V30",
            f"copies from block {{source}}, the base has {base_blocks}",
        )
        end = self.new_block + self.blocks
        self._fail(
            end > target_blocks, "V30", f"writes {{blocks}} blocks from {{new_block}}, the target has {target_blocks}"
        )
        covered = int((end - np.maximum(self.new_block, base_blocks)).clip(min=0).sum())
        if covered < target_blocks - base_blocks:
            raise CowError(
                f"{target_blocks - base_blocks} target blocks lie behind the base, ops cover only {covered}",
                statement="UNDO-23",
            )


def _read_sequence(store: Readable, header: Header, size: int) -> _Int:
    start, count = HEADER_SIZE + header.buffer_size, header.sequence_data_count
    if start + 4 * count > size and count:
        raise CowError(f"a sequence of {count} blocks leaves the file of {size} bytes", statement="V11", offset=start)
    raw = read_bytes(store, start, 4 * count) if count else b""
    return np.frombuffer(raw, dtype="<u4").astype(np.int64)

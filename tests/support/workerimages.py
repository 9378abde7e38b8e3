"""Images for a worker: a base, a COW of every kind of op with its digests beside it, and what the two read as."""

import os
from pathlib import Path
from random import Random

from snapd.block.file import FileStore
from snapd.cow.compress import CompressOption
from snapd.cow.digests import DigestLog, block_digest, table_path
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import create_writer
from snapd.cow.write.writeroptions import WriterOptions

UNIT_BYTES = 64 << 10
_KINDS = ("unchanged", "packed", "raw", "xor", "copy", "zero")
_RUN_BLOCKS = (1, 2, 3, 4, 8, 16, 33)


class WorkerImages:
    """`old` under a COW reads as `new`; both in bytes, the files at `base` and `cow`; `runs` is (kind, first, blocks).

    The last blocks are unchanged: there is something behind the last op.
    """

    def __init__(self, directory: Path, seed: int, *, blocks: int = 1024, digests: bool = False) -> None:
        random = Random(seed)
        self.base, self.cow = directory / "base.img", directory / "update.cow"
        self.old = random.randbytes(blocks * BLOCK_SIZE)
        self.runs: list[tuple[str, int, int]] = []
        new = bytearray(self.old)
        self.base.write_bytes(self.old)
        fd = os.open(self.cow, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        options = WriterOptions(
            compression=CompressOption.parse("zstd"), op_count_max=blocks, unit=UNIT_BYTES, scratch=False
        )
        writer = create_writer(FileStore(fd), options)
        block = 0
        while block < blocks - 40:
            kind, count = random.choice(_KINDS), random.choice(_RUN_BLOCKS)
            self.runs.append((kind, block, count))
            at, length = block * BLOCK_SIZE, count * BLOCK_SIZE
            if kind == "packed":
                new[at : at + length] = (random.randbytes(BLOCK_SIZE // 2) * 2) * count
                writer.raw(block, new[at : at + length])
            elif kind == "raw":
                new[at : at + length] = random.randbytes(length)
                writer.raw(block, new[at : at + length])
            elif kind == "xor":
                source = random.randrange(len(self.old) - length)
                difference = random.choice([random.randbytes(length), bytes(length - 1) + b"\1"])
                mixed = int.from_bytes(difference, "big") ^ int.from_bytes(self.old[source : source + length], "big")
                new[at : at + length] = mixed.to_bytes(length, "big")
                writer.xor(block, difference, *divmod(source, BLOCK_SIZE))
            elif kind == "copy":
                source = random.randrange(blocks - count)
                new[at : at + length] = self.old[source * BLOCK_SIZE : (source + count) * BLOCK_SIZE]
                for i in range(count):
                    writer.copy(block + i, source + i)
            elif kind == "zero":
                new[at : at + length] = bytes(length)
                for i in range(count):
                    writer.zero(block + i)
            block += count
        self.runs.append(("unchanged", block, blocks - block))
        writer.finalize()
        self.new = bytes(new)
        if digests:
            self._write_digests(fd, blocks)
        os.close(fd)

    def extent_map(self) -> ExtentMap:
        """The map of the COW as it is now."""
        fd = os.open(self.cow, os.O_RDONLY)
        try:
            return CowFile.parse(FileStore(fd)).extent_map(len(self.old))
        finally:
            os.close(fd)

    def damage(self, op_index: int) -> range:
        """Spoil the middle of an op's payload, for any codec to notice; returns the blocks that it was for."""
        op_map = self.extent_map()
        op, payload = op_map.op(op_index), op_map.payloads[op_index]
        with open(self.cow, "r+b") as file:
            file.seek(payload)
            file.write(bytes(byte ^ 0xFF for byte in self.cow.read_bytes()[payload : payload + op.data_length]))
        return range(op.new_block, op.new_block + op.blocks)

    def packed_op(self, blocks: int, *, behind: int = 0, inside: int = 1 << 32) -> int:
        """The index of a compressed unit of so many blocks, behind a block, that crosses no multiple of `inside`."""
        op_map = self.extent_map()
        for index in range(op_map.op_count):
            op = op_map.op(index)
            is_packed = op.type is OpType.REPLACE and op.blocks == blocks and op.data_length < blocks * BLOCK_SIZE
            crosses = op.new_block // inside != (op.new_block + blocks - 1) // inside
            if is_packed and op.new_block >= behind and not crosses:
                return index
        raise AssertionError(f"no compressed unit of {blocks} blocks behind block {behind}")

    def _write_digests(self, cow_fd: int, blocks: int) -> None:
        cow = CowFile.parse(FileStore(cow_fd))
        fd = os.open(table_path(self.cow), os.O_RDWR | os.O_CREAT)
        log = DigestLog.create(FileStore(fd), block_size=BLOCK_SIZE)
        pieces = (self.new[at : at + BLOCK_SIZE] for at in range(0, len(self.new), BLOCK_SIZE))
        log.put(0, [block_digest(piece) for piece in pieces])
        log.finish(op_count=cow.op_count, ops_digest=cow.ops_digest, target_blocks=blocks)
        os.close(fd)

"""Random scripts for the COW writers, and an independent model of what their files must be read as.

Everything follows from one `Random`, so a seed replays a script. Nothing here knows how a file is laid out.
"""

from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import Store, read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.digests import DigestLog, DigestTable, block_digest
from snapd.cow.format import DEFAULT_CLUSTER_OPS, OpType
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.targetdigests import TargetDigests
from snapd.cow.write.writer import CowWriter, WriterOptions, append_writer, create_writer


@dataclass(frozen=True, slots=True)
class Copy:
    new_block: int
    source_block: int
    count: int

    def do(self, writer: CowWriter) -> None:
        writer.copy(self.new_block, self.source_block, self.count)


@dataclass(frozen=True, slots=True)
class Zero:
    new_block: int
    count: int

    def do(self, writer: CowWriter) -> None:
        writer.zero(self.new_block, self.count)


@dataclass(frozen=True, slots=True)
class Raw:
    new_block: int
    data: bytes = field(repr=False)

    def do(self, writer: CowWriter) -> None:
        writer.raw(self.new_block, self.data)


@dataclass(frozen=True, slots=True)
class Xor:
    new_block: int
    data: bytes = field(repr=False)
    old_block: int
    offset: int

    def do(self, writer: CowWriter) -> None:
        writer.xor(self.new_block, self.data, self.old_block, self.offset)


@dataclass(frozen=True, slots=True)
class Label:
    number: int


@dataclass(frozen=True, slots=True)
class Finalize:
    pass


@dataclass(frozen=True, slots=True)
class Append:
    """Close the file, and go on with it behind the label."""

    label: int


DataStep = Copy | Zero | Raw | Xor
Step = DataStep | Label | Finalize | Append


class SeenOp(NamedTuple):
    """An op as a reader must see it: `content` is the target's, `source` is 0 where it says nothing about that."""

    type: OpType
    new_block: int
    blocks: int
    source: int
    content: bytes


class Model:
    """What a file holds: its ops in stream order, and how many of them lie before each label."""

    def __init__(self, base: bytes, options: WriterOptions) -> None:
        self.base = base
        self.options = options
        self.block_size = options.block_size
        self.ops: list[SeenOp] = []
        self.labels: list[tuple[int, int]] = []
        self.sequence: list[int] = []

    def apply(self, step: Step) -> None:
        size = self.block_size
        if isinstance(step, Label):
            self.labels.append((step.number, len(self.ops)))
            if self.options.version == 3:
                self.labels = self.labels[-4:]
        elif isinstance(step, Append):
            self._apply_append(step)
        elif isinstance(step, Copy):
            for i in range(step.count):
                source = step.source_block + i
                content = self.base[source * size : (source + 1) * size]
                self.ops.append(SeenOp(OpType.COPY, step.new_block + i, 1, source, content))
        elif isinstance(step, Zero):
            for i in range(step.count):
                self.ops.append(SeenOp(OpType.ZERO, step.new_block + i, 1, 0, bytes(size)))
        elif isinstance(step, Raw):
            self._apply_raw(step)
        elif isinstance(step, Xor):
            for i in range(len(step.data) // size):
                source = (step.old_block + i) * size + step.offset
                content = xored(step.data[i * size : (i + 1) * size], self.base[source : source + size])
                self.ops.append(SeenOp(OpType.XOR, step.new_block + i, 1, source, content))

    def _apply_append(self, step: Append) -> None:
        at = [number for number, _ in self.labels].index(step.label)
        self.labels = self.labels[: at + 1]
        del self.ops[self.labels[at][1] :]
        if self.options.version == 3:
            # The batch is the one thing that a file does not say.
            self.options = replace(self.options, cluster_ops=DEFAULT_CLUSTER_OPS)

    def _apply_raw(self, step: Raw) -> None:
        options, size = self.options, self.block_size
        block, left = 0, len(step.data) // size
        batch_left = max(options.cluster_ops, 1)
        while left:
            unit = 1
            while options.version == 3 and 2 * unit <= min(left, batch_left, 64) and 2 * unit * size <= options.unit:
                unit *= 2
            content = step.data[block * size : (block + unit) * size]
            self.ops.append(SeenOp(OpType.REPLACE, step.new_block + block, unit, 0, content))
            block, left, batch_left = block + unit, left - unit, batch_left - unit
            batch_left = batch_left or max(options.cluster_ops, 1)

    def image(self, op_count: int) -> bytes:
        """The target that the first ops make of the base, as large as the base."""
        image = bytearray(self.base)
        for op in self.ops[:op_count]:
            start = op.new_block * self.block_size
            image[start : start + len(op.content)] = op.content
        return bytes(image)

    def mapped(self, op_count: int) -> set[int]:
        """The target blocks of the first ops."""
        return {op.new_block + i for op in self.ops[:op_count] for i in range(op.blocks)}

    def check(self, cow: CowFile, store: Store, op_count: int) -> None:
        """A parsed file has the first ops and the image that they make."""
        assert cow.op_count == op_count
        for i, expected in enumerate(self.ops[:op_count]):
            op = cow.ops.op(i)
            source = 0 if op.type is OpType.REPLACE else op.source
            assert (op.type, op.new_block, op.blocks, source) == expected[:4], f"op {i}"
        below = SimDisk(Random(0)).store("base", self.base)
        view = CowView(cow.extent_map(len(self.base)), store, source=below, base=below)
        assert read_bytes(view, 0, len(self.base)) == self.image(op_count)

    def check_digests(self, table: DigestTable, op_count: int) -> None:
        """A table knows all blocks that the first ops make, all others too at the end, and none wrongly."""
        image, size = self.image(op_count), self.block_size
        blocks = len(image) // size
        mapped = self.mapped(op_count)
        for block, digest in enumerate(table.dense(blocks).tolist()):
            if digest or block in mapped or table.is_final:
                assert digest == block_digest(image[block * size : (block + 1) * size]), f"block {block}"


class ScriptMaker:
    """Draws scripts whose every step is allowed where it stands."""

    def __init__(self, random: Random, options: WriterOptions, blocks: int) -> None:
        self.random = random
        self.options = options
        self.blocks = blocks
        self.base = b"".join(self._content(1) for _ in range(blocks))
        self._label = 0

    def model(self) -> Model:
        """The model of an empty file."""
        return Model(self.base, self.options)

    def sequence(self) -> list[int]:
        """A list for the file, or none; only some files have a place for one."""
        has_place = self.options.version == 3 or self.options.cluster_ops
        count = self.random.choice([0, 0, 1, 5, self.blocks]) if has_place else 0
        return self.random.sample(range(self.blocks), count)

    def step(self, model: Model) -> Step:
        """The next step for a file that is as `model` says."""
        kind = self.random.randrange(20)
        if kind < 17 and (step := self.data(model)) is not None:
            return step
        if kind == 18:
            return Finalize()
        if kind == 19 and model.labels:
            return Append(self.random.choice(model.labels[-4:])[0])
        return self.label()

    def label(self) -> Label:
        """A label above all others, some of them by far."""
        self._label += self.random.choice([1, 1, 7, 1 << 15, 1 << 33])
        return Label(self._label)

    def data(self, model: Model) -> DataStep | None:
        """Ops for blocks that have none yet; None without such blocks, or slots."""
        random, size = self.random, self.options.block_size
        kind = random.randrange(17)
        free = sorted(set(range(self.blocks)) - model.mapped(len(model.ops)))
        slots = self.options.op_count_max - len(model.ops) if self.options.version == 3 else len(free)
        if not free or slots <= 0:
            return None
        start = random.choice(free)
        count = 1
        limit = min(random.choice([1, 2, 3, 9, 40]), slots)
        while count < limit and start + count in free:
            count += 1
        if kind < 4:
            return Copy(start, random.randint(0, self.blocks - count), count)
        if kind < 7:
            return Zero(start, count)
        if kind < 13:
            return Raw(start, self._content(count))
        offset = random.choice([0, 1, size // 2, size - 1])
        old_block = random.randint(0, self.blocks - count - bool(offset)) if count < self.blocks else 0
        if old_block < 0 or count + bool(offset) > self.blocks:
            return Zero(start, count)
        return Xor(start, self._content(count), old_block, offset)

    def _content(self, blocks: int) -> bytes:
        size = self.options.block_size
        return b"".join(
            self.random.choice(
                (
                    self.random.randbytes(size),
                    bytes(size),
                    self.random.randbytes(4) * (size // 4),
                    self.random.randbytes(size // 2).ljust(size, b"x"),
                )
            )
            for _ in range(blocks)
        )


def random_options(random: Random, *, version: int, blocks: int) -> WriterOptions:
    """Any kind of file that `blocks` target blocks fit into."""
    return WriterOptions(
        version=version,
        compression=CompressOption.parse(random.choice(["none", "gz", "brotli,3", "lz4", "zstd"])),
        block_size=random.choice([512, 1024, 4096]),
        unit=random.choice([4096, 8192, 16384, 65536, 262144]) if version == 3 else 4096,
        max_blocks=blocks,
        cluster_ops=random.choice([0, 2, 3, 5, 8, 1024]),
        scratch=False,
        op_count_max=blocks,
        threads=random.choice([1, 1, 2]),
    )


def open_writer(store: SimStore, table: SimStore | None, model: Model, step: Append | None) -> CowWriter:
    """A writer of a new file, or one that goes on behind a label; with digests where there is a `table`."""
    source = SimDisk(Random(0)).store("source", model.base)
    blocks = len(model.base) // model.block_size
    options = model.options
    if step is None:
        log = None if table is None else DigestLog.create(table, block_size=model.block_size)
        digests = None if log is None else TargetDigests(log, source, blocks, blocks)
        return create_writer(store, options, digests)
    cow = CowFile.parse(store, label=step.label)
    log = None if table is None else DigestLog.reopen(table, op_count=cow.op_count, ops_digest=cow.ops_digest)
    digests = None if log is None else TargetDigests(log, source, blocks, blocks)
    return append_writer(store, cow, options.compression, threads=options.threads, digests=digests)


def xored(one: bytes, other: bytes) -> bytes:
    """Byte by byte."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")

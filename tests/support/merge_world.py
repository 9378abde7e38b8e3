"""Small random worlds for the reversible merge: an old image, a COW, a simulated disk, and stops of both kinds.

Everything follows from one seed, so that a failure replays: `SNAPD_CRASH_SEED=n` runs that seed alone,
`SNAPD_CRASH_SCALE=x` multiplies the number of histories.
"""

import copy
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from zeromap import has_op

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk, SimStore, Stop
from snapd.block.store import Readable, Store, read_bytes
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.digests import DigestLog, DigestTable, block_digest
from snapd.cow.format import Compression, OpType
from snapd.cow.header import Header
from snapd.cow.image.view import CowView
from snapd.cow.op import Op
from snapd.cow.parse.reader import CowFile
from snapd.merge.engine import Merge
from snapd.merge.oldview import OldImage
from snapd.merge.sharedmap import MERGED, UNTOUCHED, SharedMap
from snapd.merge.statefile import Phase, ReadBack, State, read_state
from snapd.merge.undostore import UndoStore
from snapd.merge.views import open_views, restore_shared_map
from snapd.merge.work import Hooks

SNAPSHOT = uuid.UUID("4f6a7c1e-8b1d-4f0e-9a55-6f1c0e3d2b7a")
UNDO, TABLE, STATE = "undo.cow", "undo.cow.digests", "state"

Ops = dict[int, tuple[Op, bytes]]


def seeds(count: int) -> list[int]:
    """`count` seeds, scaled by the environment, or the one it names."""
    if "SNAPD_CRASH_SEED" in os.environ:
        return [int(os.environ["SNAPD_CRASH_SEED"])]
    return list(range(max(1, int(count * float(os.environ.get("SNAPD_CRASH_SCALE", "1"))))))


class SimFiles:
    """An undo directory on a simulated disk, whose entries are lost or kept by chance until `sync`."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._durable: dict[str, SimStore | None] = {UNDO: None, TABLE: None}
        disk.store(STATE)

    @property
    def state(self) -> Store:
        return self._disk.store(STATE)

    def create_undo(self) -> tuple[Store, Store]:
        self._disk.remove(UNDO)
        self._disk.remove(TABLE)
        return self._disk.store(UNDO), self._disk.store(TABLE)

    def open_undo(self) -> tuple[Store, Store]:
        if not {UNDO, TABLE} <= self._disk.files.keys():
            raise SnapdError(errno.EBADMSG, "undo files are missing")
        return self._disk.files[UNDO], self._disk.files[TABLE]

    def sync(self) -> None:
        self._disk.step("sync directory")
        for name in self._durable:
            self._durable[name] = self._disk.files.get(name)

    def lose_unsynced(self) -> None:
        """After a power cut, chance decides about every entry that changed since the last `sync`."""
        for name, store in self._durable.items():
            if self._disk.files.get(name) is not store and self._disk.random.random() < 0.5:
                if store is None:
                    del self._disk.files[name]
                else:
                    self._disk.files[name] = store
            self._durable[name] = self._disk.files.get(name)


class World:
    """One old image O, one COW C, the new image N by an independent model, and the disk they are on."""

    def __init__(
        self,
        seed: int,
        *,
        old_blocks: int | None = None,
        block_size: int | None = None,
        ops: Callable[["World"], Ops] | None = None,
    ) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.disk = SimDisk(random)
        self.block_size = block_size or random.choice([512, 1024, 1024, 2048, 4096])
        count = old_blocks or random.randint(2, 14)
        self.pool = [bytes(self.block_size), *(random.randbytes(self.block_size) for _ in range(3))]
        self.pool.append(random.randbytes(4) * (self.block_size // 4))
        self.old = [self.content() for _ in range(count)]
        self.ops = self._random_ops() if ops is None else ops(self)
        self.new = self._model()
        self.base = self.disk.store("base", b"".join(self.old))
        self.cow = self.disk.store("cow", self._cow_bytes())
        self.files = SimFiles(self.disk)
        parsed = CowFile.parse(self.cow)
        self.extent_map = parsed.extent_map(
            len(self.old) * self.block_size, len(self.new) * self.block_size, digests=self._digests(parsed)
        )
        self.shared: SharedMap | None = None
        self.promised: State | None = None
        self.log: list[str] = []
        self.span_blocks = random.choice([1, 2, 3, 5, 64])
        self.piece_blocks = random.choice([1, 2, 4, 64])

    # Making images

    def content(self) -> bytes:
        """A block from a small pool, so that equal blocks are frequent."""
        return self.random.choice(self.pool) if self.random.random() < 0.7 else self.random.randbytes(self.block_size)

    def replace(self, block: int, contents: list[bytes]) -> tuple[Op, bytes]:
        """A replace op of a power of two blocks; `_cow_bytes` places its payload."""
        return Op(OpType.REPLACE, block, len(contents), 0, 0), b"".join(contents)

    def xor(self, block: int, source: int) -> tuple[Op, bytes]:
        """An XOR op that reads from byte `source` of O; its payload leaves equal and different bytes (COW-54)."""
        payload = bytes(self.block_size // 2) + self.random.randbytes(self.block_size // 2)
        return Op(OpType.XOR, block, 1, source, 0), payload

    def _random_ops(self) -> Ops:
        random, old = self.random, self.old
        blocks = max(1, len(old) + random.choice([0, 0, 0, 2, 3, -1]))
        ops: Ops = {}
        block = 0
        while block < blocks:
            kind = random.random()
            if kind < 0.2 and block < len(old):
                block += 1
            elif kind < 0.5:
                unit = max(u for u in (1, 2, 4) if u <= min(blocks - block, random.choice([1, 2, 4])))
                content = [
                    old[block + i] if block + i < len(old) and random.random() < 0.3 else self.content()
                    for i in range(unit)
                ]
                ops[block] = self.replace(block, content)
                block += unit
            elif kind < 0.6:
                ops[block] = Op(OpType.ZERO, block, 1, 0, 0), b""
                block += 1
            elif kind < 0.75:
                ops[block] = self.xor(block, random.randint(0, (len(old) - 1) * self.block_size))
                block += 1
            else:
                ops[block] = Op(OpType.COPY, block, 1, random.randrange(len(old)), 0), b""
                block += 1
        self.blocks = blocks
        return ops

    def _model(self) -> list[bytes]:
        """N, computed op by op from O."""
        blocks = getattr(self, "blocks", None) or max(
            [len(self.old), *(b + op.blocks for b, (op, _) in self.ops.items())]
        )
        new = (self.old + [b"?"] * blocks)[:blocks]
        for block, (op, content) in self.ops.items():
            if op.type is OpType.REPLACE:
                for i in range(op.blocks):
                    new[block + i] = content[i * self.block_size : (i + 1) * self.block_size]
            elif op.type is OpType.XOR:
                below = b"".join(self.old)[op.source : op.source + self.block_size]
                new[block] = bytes(one ^ other for one, other in zip(content, below, strict=True))
            else:
                new[block] = self.old[op.source] if op.type is OpType.COPY else bytes(self.block_size)
        return new

    def _digests(self, cow: CowFile) -> DigestTable | None:
        """Half of the COW files have a table of digests beside them (COW-216)."""
        if self.random.random() < 0.5:
            return None
        store = SimDisk(self.random).store("digests")
        log = DigestLog.create(store, block_size=self.block_size)
        log.put(0, [block_digest(block) for block in self.new])
        log.finish(op_count=cow.op_count, ops_digest=cow.ops_digest, target_blocks=len(self.new))
        return DigestTable.load(store, op_count=cow.op_count, ops_digest=cow.ops_digest)

    def _cow_bytes(self) -> bytes:
        """C as a v3 file, ops in any order (UNDO-6)."""
        option = CompressOption(self.random.choice(list(Compression)), 1)
        encoder = Encoder(option, version=3, max_unit=16 << 10)
        ops = list(self.ops.values())
        self.random.shuffle(ops)
        header = Header(
            block_size=self.block_size,
            buffer_size=0,
            op_count=len(ops),
            op_count_max=len(ops) + 1,
            compression=option.algorithm,
            max_compression_size=16 << 10,
        )
        records, payloads = b"", b""
        for op, content in ops:
            if op.type in (OpType.REPLACE, OpType.XOR):
                payload = encoder.encode(content)
                source = op.source if op.type is OpType.XOR else header.data_start + len(payloads)
                op = Op(op.type, op.new_block, op.blocks, source, len(payload))
                payloads += payload
            records += op.pack()
        return (header.pack().ljust(header.ops_start, b"\0") + records).ljust(header.data_start, b"\0") + payloads

    # Running

    def engine(self, shared: SharedMap | None = None, **hooks: Any) -> Merge:
        """A new process; the shared map is the one that readers have, if any are left."""
        if shared is not None:
            self.shared = shared
        elif self.shared is None or self.phase in (None, Phase.ROLLED_BACK):
            self.shared = self.restored_map()
        return Merge(
            snapshot=SNAPSHOT,
            extent_map=self.extent_map,
            cow=self.cow,
            base=self.base,
            files=self.files,
            shared=self.shared,
            hooks=Hooks(**hooks),
            span_bytes=self.span_blocks * self.block_size,
            piece_bytes=self.piece_blocks * self.block_size,
        )

    def attempt(
        self, action: str, stop_after: int | None = None, *, shared: SharedMap | None = None, **hooks: Any
    ) -> bool:
        """Run `merge`, `rollback` or `confirm` in a new process; False when it was stopped at that operation."""
        self.log.append(f"{action} stop_after={stop_after}")
        self.promised = None
        engine = self.engine(shared, **hooks)
        self.disk.stop_at = None if stop_after is None else self.disk.operations + stop_after
        try:
            {"merge": engine.run, "rollback": engine.rollback, "confirm": engine.confirm}[action]()
        except Stop as stop:
            self.log.append(f"stopped at {stop}")
            return False
        finally:
            self.disk.stop_at = None
        self.promised = self.state()
        return True

    def random_step(self, **hooks: Any) -> None:
        """One run in some direction, to its end or a stop or where it was asked to stop; then maybe a stop; look."""
        random = self.random
        action = random.choice(["merge", "merge", "rollback"])
        if action == "rollback" and self.phase is None:
            return
        polite = random.random() < 0.3
        finished = self.attempt(action, None if polite else random.randint(0, 60), should_stop=lambda: polite, **hooks)
        if not finished or random.random() < 0.3:
            self.stop()
        self.check()

    def power_cut(self) -> None:
        self.log.append("power cut")
        self.shared = None
        self.disk.power_cut()
        self.files.lose_unsynced()
        assert self.promised in (None, self.state()), self.report(f"promised, and lost: {self.promised}")

    def kill(self) -> None:
        """The process died; whoever reads beside it goes on with the shared map as it was left."""
        self.log.append("kill")
        self.check_live_readers()
        self.disk.kill()

    def stop(self) -> None:
        """Either kind, by chance."""
        if self.random.random() < 0.5:
            self.kill()
        else:
            self.power_cut()

    def fork(self) -> "World":
        """An independent copy, to try another future."""
        twin = copy.copy(self)
        twin.disk, twin.files, twin.random = copy.deepcopy((self.disk, self.files, self.random))
        twin.disk.random = twin.random
        twin.base, twin.cow = twin.disk.files["base"], twin.disk.files["cow"]
        twin.log = list(self.log)
        twin.shared = None
        return twin

    # Looking

    def state(self) -> State | None:
        return read_state(self.files.state)

    @property
    def phase(self) -> Phase | None:
        state = self.state()
        return None if state is None else state.phase

    def check(self) -> None:
        """Both views, read in full through fresh readers, are exact; so is everything a device may be told."""
        state = self.state()
        views = open_views(state, self.extent_map, self.cow, self.base, self.files)
        self._equal(views.new, self.new, "new view")
        if state is not None and state.phase is Phase.CONFIRMED:
            self._equal(self.base, self.new, "confirmed base")
            return
        self._equal(views.old, self.old, "old view")
        if views.undo is not None:
            plain = CowFile.parse(self.disk.files[UNDO]).extent_map(len(self.old) * self.block_size)
            # The base may have grown: as a COW, U describes the part that O has.
            self._equal(
                CowView(plain, self.disk.files[UNDO], source=self.base, base=self.base), self.old, "U over base"
            )
        if state is not None and state.phase is Phase.ROLLED_BACK:
            self._equal(self.base, self.old, "rolled back base")
        if state is not None and state.phase is Phase.MERGED and state.read_back is ReadBack.OK:
            self._equal(self.base, self.new, "merged base")
        self.check_marks(self.restored_map())

    def restored_map(self) -> SharedMap:
        """A shared map made anew, as after a reboot."""
        with memory_file() as fd:
            shared = SharedMap.create(fd, self.extent_map, SNAPSHOT, 1)
        restore_shared_map(shared, self.extent_map, self.files)
        return shared

    def check_live_readers(self) -> None:
        """What readers beside the merger see this instant through its shared map."""
        if self.shared is None or self.phase in (None, Phase.CONFIRMED, Phase.ROLLED_BACK):
            return
        self.check_marks(self.shared)
        shared = self.shared
        old = OldImage(
            self.base, lambda: shared.undo_op_count, lambda: UndoStore(*self.files.open_undo(), self.extent_map)
        )
        self._equal(old, self.old, "old view beside the merger")
        new = CowView(self.extent_map, self.cow, source=old, base=self.base)
        self._equal(new, self.new, "new view beside the merger")

    def check_marks(self, shared: SharedMap) -> None:
        """Every block that may be read from the base in the new view has N there (UNDO-26)."""
        for block, content in enumerate(self.new):
            with_op = has_op(self.extent_map, block)
            state = shared.state(block)
            assert (state == UNTOUCHED) == (not with_op), self.report(f"block {block} marked {state}")
            if state in (MERGED, UNTOUCHED):
                found = read_bytes(self.base, block * self.block_size, self.block_size)
                assert found == content, self.report(f"block {block} may be read from the base, and is not N")

    def _equal(self, view: Readable, wanted: Iterable[bytes], what: str) -> None:
        content = b"".join(wanted)
        try:
            found = read_bytes(view, 0, len(content))
        except SnapdError as error:
            raise AssertionError(self.report(f"{what}: {error}")) from error
        if found != content:
            wrong = [
                at // self.block_size
                for at in range(0, len(content), self.block_size)
                if found[at : at + self.block_size] != content[at : at + self.block_size]
            ]
            raise AssertionError(self.report(f"{what}: blocks {wrong} differ"))

    def report(self, what: str) -> str:
        """What went wrong, and how to see it again."""
        return f"{what} (SNAPD_CRASH_SEED={self.seed}; {self.state()}; {'; '.join(self.log)})"


@contextmanager
def memory_file() -> Iterator[int]:
    """An anonymous file for the length of a `with` block."""
    fd = os.memfd_create("world")
    try:
        yield fd
    finally:
        os.close(fd)

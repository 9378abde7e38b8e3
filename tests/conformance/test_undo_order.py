"""Sections 2 to 4 of the specification of the reversible merge: states, order of writes, sizes."""

import errno
import os
import re
from dataclasses import replace
from random import Random

import pytest
from merge_world import SNAPSHOT, TABLE, UNDO, World, memory_file
from zeromap import zero_map

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore, FileStore
from snapd.block.simdisk import SimStore, Stop
from snapd.block.store import Buffer, Store, read_bytes
from snapd.cow.format import OpType
from snapd.cow.header import Header
from snapd.cow.op import Op
from snapd.merge.engine import Merge
from snapd.merge.sharedmap import MERGED
from snapd.merge.statefile import Phase, ReadBack, write_state
from snapd.merge.undostore import UndoStore
from snapd.merge.views import open_views

SEEDS = range(30)


def traced(world: World, action: str) -> list[str]:
    steps: list[str] = []
    assert world.attempt(action, trace=steps.append)
    return steps


def mostly_changed(seed: int) -> World:
    """A world in which a merge has something to save."""
    while True:
        world = World(seed)
        if sum(a != b for a, b in zip(world.old, world.new, strict=False)) >= 2:
            return world
        seed += 1000


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_8_every_arrow_of_the_state_machine(seed: int) -> None:
    """UNDO-8: merge, undo, merge again, confirm; each state durable when the call returned; refusals change nothing."""
    world = World(seed)
    for action, wanted in (
        ("merge", Phase.MERGED),
        ("rollback", Phase.ROLLED_BACK),
        ("rollback", Phase.ROLLED_BACK),
        ("merge", Phase.MERGED),
        ("confirm", Phase.CONFIRMED),
        ("confirm", Phase.CONFIRMED),
        ("merge", Phase.CONFIRMED),
    ):
        assert world.attempt(action)
        world.power_cut()
        assert world.phase is wanted
        world.check()
    with pytest.raises(SnapdError) as caught:
        world.attempt("rollback")
    assert caught.value.errno == errno.EBUSY


def test_undo_8_nothing_to_undo_and_nothing_to_confirm() -> None:
    """UNDO-8: a rollback before any merge is EINVAL, a confirm EBUSY."""
    for action, number in (("rollback", errno.EINVAL), ("confirm", errno.EBUSY)):
        with pytest.raises(SnapdError) as caught:
            World(1).attempt(action)
        assert caught.value.errno == number


def test_undo_9_confirm_needs_a_read_back_of_this_generation() -> None:
    """UNDO-9: a base that lost what was written is found, not confirmed, not passed down; merging again repairs it."""
    world = mostly_changed(1)
    changed = next(b for b in range(len(world.old)) if world.old[b] != world.new[b])

    def lose(step: str) -> None:
        if step == "read back":
            world.base.write(world.old[changed], changed * world.block_size)
            world.base.flush()

    with pytest.raises(SnapdError, match=f"block {changed} of the base") as caught:
        world.attempt("merge", trace=lose)
    assert caught.value.errno == errno.EIO
    state = world.state()
    assert state is not None
    assert (state.phase, state.read_back) == (Phase.MERGED, ReadBack.FAILED)
    assert world.shared is not None
    assert MERGED not in [world.shared.state(b) for b in range(len(world.new))]
    world.check()
    with pytest.raises(SnapdError, match="read back"):
        world.attempt("confirm")
    assert world.attempt("merge")
    again = world.state()
    assert again is not None
    assert (again.generation, again.read_back) == (state.generation + 1, ReadBack.OK)
    world.check()
    assert world.attempt("confirm")


def test_undo_9_the_read_back_follows_the_last_flush() -> None:
    """UNDO-9: it starts after the last flush of the base, and nothing is written to the base behind it."""
    world = mostly_changed(2)
    at_read_back: list[int] = []

    def trace(step: str) -> None:
        if step == "read back":
            at_read_back.append(len(world.disk.trace))
            assert world.base.unflushed_sectors() == 0

    assert world.attempt("merge", trace=trace)
    assert not [op for op in world.disk.trace[at_read_back[0] :] if op.startswith("write base")]


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_10_the_undo_store_is_durable_before_the_state_says_merging(seed: int) -> None:
    """UNDO-10: U and table written and flushed, directory flushed, then the state; only then the base."""
    world = World(seed)
    assert world.attempt("merge")
    trace = world.disk.trace
    state = next(i for i, op in enumerate(trace) if op.startswith("write state"))
    directory = trace.index("sync directory")
    for name in (UNDO, TABLE):
        flushed = [i for i in range(directory) if trace[i] == f"flush {name}"]
        written = [i for i in range(directory) if trace[i].startswith(f"write {name} ")]
        assert written
        assert flushed
        assert written[-1] < flushed[-1] < directory < state
    assert all(i > state for i, op in enumerate(trace) if op.startswith("write base"))


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_12_the_steps_of_every_span(seed: int) -> None:
    """UNDO-12: a, then b, c and c' if anything is to be saved, then d, e, f; span after span."""
    world = World(seed)
    steps = " ".join(traced(world, "merge"))
    assert re.fullmatch(r"take over begin merging (grow )?(a (b c c' )?d e f )*merged read back read back ok", steps)
    steps = " ".join(traced(world, "rollback"))
    assert re.fullmatch(r"take over turn ((d )*e f )+read back rolled back", steps)


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_12a_a_turn_is_durable_before_its_first_base_write(seed: int) -> None:
    """UNDO-12a: a new generation, the new direction and block 0, before anything is written in that direction."""
    world = mostly_changed(seed)
    generation = 1
    assert world.attempt("merge")
    for action, first_step, phase in (
        ("rollback", "d", Phase.ROLLING_BACK),
        ("merge", "a", Phase.MERGING),
        ("rollback", "d", Phase.ROLLING_BACK),
    ):
        generation += 1
        start = len(world.disk.trace)

        def stop_there(step: str, wanted: str = first_step) -> None:
            if step == wanted:
                raise Stop

        assert not world.attempt(action, trace=stop_there)
        assert not [op for op in world.disk.trace[start:] if op.startswith("write base")]
        world.power_cut()
        state = world.state()
        assert state is not None
        assert (state.generation, state.phase, state.next_block) == (generation, phase, 0)


def test_undo_12a_an_undo_store_with_too_few_ops_is_damage() -> None:
    """UNDO-12a: never "U lacks b"; either direction and both views refuse, and nothing is written."""
    world = mostly_changed(4)
    assert world.attempt("merge")
    store = world.disk.files[UNDO]
    header = Header.unpack(read_bytes(store, 0, 78))
    store.write(header.with_ops(header.op_count - 1).pack(), 0)
    store.flush()
    content = read_bytes(world.base, 0, world.base.size())
    for action in ("merge", "rollback", "confirm"):
        with pytest.raises(SnapdError, match="were durable") as caught:
            world.attempt(action)
        assert caught.value.errno == errno.EBADMSG
    with pytest.raises(SnapdError, match="were durable"):
        open_views(world.state(), world.extent_map, world.cow, world.base, world.files)
    assert read_bytes(world.base, 0, world.base.size()) == content


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_13_no_flush_is_saved_between_saving_and_overwriting(seed: int) -> None:
    """UNDO-13: payloads and entries are flushed before the header counts them, and it before the base is written."""
    world = World(seed)
    assert world.attempt("merge")
    unflushed: set[str] = set()
    for operation in world.disk.trace[world.disk.trace.index("sync directory") :]:
        verb, name = operation.split()[:2]
        if verb == "flush":
            unflushed.discard(name)
        elif verb == "write":
            if operation == f"write {UNDO} 0+78":
                assert not unflushed & {UNDO, TABLE}
            if name == "base":
                assert not unflushed & {UNDO, TABLE, "state"}
            unflushed.add(name)


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_14_a_leftover_undo_store_of_another_generation_is_not_used(seed: int) -> None:
    """UNDO-14: merging after a rollback makes a new store; the old one put back in its place is refused."""
    world = World(seed)
    assert world.attempt("merge")
    assert world.attempt("rollback")
    assert read_bytes(world.base, 0, len(world.old) * world.block_size) == b"".join(world.old)
    leftover = {name: world.disk.files[name] for name in (UNDO, TABLE)}
    assert world.attempt("merge")
    world.check()
    assert world.disk.files[UNDO] is not leftover[UNDO]
    world.disk.files.update(leftover)
    with pytest.raises(SnapdError, match="generation") as caught:
        world.attempt("rollback")
    assert caught.value.errno == errno.EBADMSG


def test_undo_14_a_map_of_the_earlier_merge_is_not_used_again() -> None:
    """UNDO-14: its readers know the ops of the store that is gone; a merge after a rollback needs a fresh one."""
    world = mostly_changed(6)
    assert world.attempt("merge")
    assert world.attempt("rollback")
    with pytest.raises(SnapdError, match="earlier merge") as caught:
        world.attempt("merge", shared=world.shared)
    assert caught.value.errno == errno.EBUSY
    assert world.phase is Phase.ROLLED_BACK
    assert world.attempt("merge")
    world.check()


@pytest.mark.parametrize("name", [UNDO, TABLE])
def test_undo_15_a_missing_store_or_table_is_damage(name: str) -> None:
    """UNDO-15: after state merging, gone is not empty: either direction stops before it writes."""
    world = mostly_changed(5)
    assert world.attempt("merge")
    content = read_bytes(world.base, 0, world.base.size())
    del world.disk.files[name]
    for action in ("merge", "rollback", "confirm"):
        with pytest.raises(SnapdError) as caught:
            world.attempt(action)
        assert caught.value.errno == errno.EBADMSG
    assert read_bytes(world.base, 0, world.base.size()) == content


class FullStore:
    """A store on a disk that is full behind `limit` bytes."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self.limit = limit
        self.size = store.size
        self.read_into = store.read_into
        self.flush = store.flush
        self.discard = store.discard
        self.zero = store.zero
        self.truncate = store.truncate

    def write(self, data: Buffer, offset: int) -> None:
        if offset + len(data) > self.limit:
            raise SnapdError(errno.ENOSPC, "no space left")
        self._store.write(data, offset)


@pytest.mark.parametrize("seed", range(15))
def test_undo_17_a_full_disk_stops_the_merge_and_both_views_stay_exact(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNDO-17: ENOSPC stops at the last span; it goes on when space is back, or rolls back; never by itself."""
    world = mostly_changed(seed)
    create = world.files.create_undo

    def create_on_full_disk() -> tuple[Store, Store]:
        store, table = create()
        return FullStore(store, 300), table

    monkeypatch.setattr(world.files, "create_undo", create_on_full_disk)
    with pytest.raises(SnapdError) as caught:
        world.attempt("merge")
    assert caught.value.errno == errno.ENOSPC
    assert world.phase is Phase.MERGING
    world.stop()
    world.check()
    action = Random(seed).choice(["merge", "rollback"])
    assert world.attempt(action)
    world.check()


@pytest.mark.parametrize("seed", range(10))
def test_undo_23_sizes_are_durable_before_the_base_grows(seed: int) -> None:
    """UNDO-23: the base grows after the state has both sizes; the old view keeps O's size, N is whole."""

    def longer(world: World) -> dict[int, tuple[Op, bytes]]:
        first = len(world.old)
        return {first + i: world.replace(first + i, [world.content()]) for i in range(3)} | {
            0: (Op(OpType.COPY, 0, 1, first - 1, 0), b"")
        }

    world = World(seed, ops=longer)
    grown: list[tuple[int, int]] = []

    def trace(step: str) -> None:
        state = world.state()
        if step == "grow":
            assert state is not None
            assert not world.disk.files["state"].unflushed_sectors()
            grown.append((state.old_size_bytes, state.new_size_bytes))

    assert world.attempt("merge", trace=trace)
    assert grown == [(len(world.old) * world.block_size, len(world.new) * world.block_size)]
    world.check()
    assert world.attempt("rollback")
    assert world.base.size() == len(world.new) * world.block_size, "nobody cuts a base here"
    assert world.attempt("merge")
    state = world.state()
    assert state is not None
    assert state.old_size_bytes == len(world.old) * world.block_size, "O's size is the one from before it grew"
    world.check()


def test_undo_23_blocks_behind_o_need_ops_and_copies_must_not_read_there() -> None:
    """UNDO-23: refused before anything is made."""
    world = World(2, old_blocks=4, block_size=512, ops=lambda w: {4: w.replace(4, [w.content()])})
    world.extent_map = zero_map({0}, 5, block_size=512)
    with pytest.raises(SnapdError, match="no op"):
        world.attempt("merge")
    world = World(2, old_blocks=4, block_size=512, ops=lambda _: {0: (Op(OpType.COPY, 0, 1, 3, 0), b"")})
    shorter = world.disk.store("shorter", b"".join(world.old[:3]))
    world.base = shorter
    with pytest.raises(SnapdError, match="reads block 3"):
        world.attempt("merge")
    assert world.state() is None
    assert UNDO not in world.disk.files


def test_undo_23_a_device_that_is_too_small_is_refused() -> None:
    """UNDO-23: a device cannot grow; refused before anything is made."""

    class Device(BlockDeviceStore):
        def size(self) -> int:
            return FileStore.size(self)

    world = World(2, old_blocks=4, block_size=512, ops=lambda w: {4: w.replace(4, [w.content()])})
    with memory_file() as fd:
        os.pwrite(fd, b"".join(world.old), 0)
        with pytest.raises(SnapdError) as caught:
            Merge(
                snapshot=SNAPSHOT,
                extent_map=world.extent_map,
                cow=world.cow,
                base=Device(fd),
                files=world.files,
                shared=world.restored_map(),
            ).run()
    assert caught.value.errno == errno.ENOSPC
    assert world.state() is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("action", ["merge", "rollback", "confirm"])
def test_undo_24_a_start_flushes_everything_before_it_writes(seed: int, action: str) -> None:
    """UNDO-24: U, its table, C, the base and the state are flushed before the first write to any of them."""
    world = World(seed)
    if not world.attempt("merge", 25):
        world.disk.kill()
    state = world.state()
    if state is None or not state.needs_undo:
        return
    start = len(world.disk.trace)
    try:
        world.attempt(action)
    except SnapdError as error:
        if action != "confirm" or error.errno != errno.EBUSY:
            raise
    flushed = set()
    for operation in world.disk.trace[start:]:
        verb, name = operation.split()[:2]
        if verb == "flush":
            flushed.add(name)
        # The two records that are rewritten as they are, so that a flush that failed before is not trusted.
        elif operation not in (f"write {UNDO} 0+78", "write state 0+512") and verb == "write":
            break
    assert {UNDO, TABLE, "cow", "base", "state"} <= flushed


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_26_pass_down_is_withdrawn_before_a_rollback_writes(seed: int) -> None:
    """UNDO-26: merged marks come after step f only, and go before the first base write of a rollback."""
    world = World(seed)
    marked: list[int] = []

    def merging(_step: str) -> None:
        state = world.state()
        if state is not None and state.phase is Phase.MERGING:
            assert world.shared is not None
            for block in range(state.next_block, len(world.new)):
                assert world.shared.state(block) != MERGED

    def rolling_back(step: str) -> None:
        if step == "d":
            assert world.shared is not None
            marked.extend(b for b in range(len(world.new)) if world.shared.state(b) == MERGED)

    assert world.attempt("merge", trace=merging)
    assert world.attempt("rollback", trace=rolling_back)
    assert marked == []


class Dropping:
    """Flushes one of which fails, as a kernel does it: the pages are clean then, and were never written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
        self.left = failing
        self.lost: dict[tuple[str, int], bytes] = {}
        flush, put, lose = SimStore.flush, SimStore._put, SimStore.lose_unflushed

        def failing_flush(store: SimStore) -> None:
            self.left -= 1
            if self.left != -1:
                flush(store)
                return
            for sector, versions in store._versions.items():
                self.lost.setdefault((store.name, sector), versions[0])
            store._versions.clear()
            raise SnapdError(errno.EIO, f"flush {store.name}")

        def dirtying_put(store: SimStore, data: bytes, offset: int) -> None:
            put(store, data, offset)
            for sector, versions in store._versions.items():
                if (store.name, sector) in self.lost:
                    versions[0] = self.lost.pop((store.name, sector))

        def lose_all(store: SimStore) -> None:
            lose(store)
            for name, sector in [key for key in self.lost if key[0] == store.name]:
                old = self.lost.pop((name, sector))
                store._cache[sector * 512 : sector * 512 + 512] = old[: max(0, len(store._cache) - sector * 512)]

        monkeypatch.setattr(SimStore, "flush", failing_flush)
        monkeypatch.setattr(SimStore, "_put", dirtying_put)
        monkeypatch.setattr(SimStore, "lose_unflushed", lose_all)


@pytest.mark.parametrize("seed", range(12))
def test_undo_30_a_failed_flush_ends_the_run_and_the_next_start_writes_anew(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNDO-30: whichever flush fails and drops its pages, the next run puts everything back before it goes on."""
    failing = 0
    while True:
        with monkeypatch.context() as patch:
            world = World(seed)
            dropping = Dropping(patch, failing)
            try:
                world.attempt("merge")
            except SnapdError as error:
                if error.errno != errno.EIO:
                    raise
                world.promised = None
            if dropping.left >= 0:
                break
            world.check_live_readers()
            again = world.random.choice(["merge", "rollback"])
            if world.phase is not None:
                world.attempt(again, world.random.choice([8, 12, 20, None]))
                world.power_cut()
                world.check()
            assert world.attempt("merge")
            world.power_cut()
            assert world.phase is Phase.MERGED
            world.check()
        failing += 1
    assert failing > 5


def test_undo_29_a_state_of_another_snapshot_is_refused() -> None:
    """UNDO-29: the state file says whose it is."""
    world = mostly_changed(1)
    assert world.attempt("merge")
    state = world.state()
    assert state is not None
    write_state(world.files.state, replace(state, snapshot=type(state.snapshot)(int=1)))
    with pytest.raises(SnapdError, match="belongs to snapshot"):
        world.attempt("merge")


def test_undo_27_what_must_be_atomic_lies_in_one_sector() -> None:
    """UNDO-27: U's header at byte 0, the state record, and the table's identity each within one sector."""
    world = mostly_changed(1)
    assert world.attempt("merge")
    assert {op for op in world.disk.trace if op.startswith(f"write {UNDO} 0+")} == {f"write {UNDO} 0+78"}
    assert {op for op in world.disk.trace if op.startswith("write state")} == {"write state 0+512"}
    assert f"write {TABLE} 0+64" in world.disk.trace


def test_undo_18_u_never_holds_a_block_twice() -> None:
    """UNDO-18: over stops, repeats and turns, ops only ever add blocks that U lacks."""
    for seed in range(60):
        world = World(seed)
        for _ in range(4):
            world.random_step()
        if world.phase in (Phase.MERGING, Phase.MERGED, Phase.ROLLING_BACK):
            undo = UndoStore(*world.files.open_undo())
            undo.load(undo.header.op_count)
            assert undo.damaged_ops == 0, "ops out of order or twice count as damaged"
            assert undo.header.num_merge_ops == 0

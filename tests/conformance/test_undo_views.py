"""Section 1 of the specification of the reversible merge: the two views."""

from collections.abc import Callable
from itertools import count

import pytest
from merge_world import World

from snapd.block.simdisk import Stop
from snapd.block.store import Readable, WritableBuffer, read_bytes
from snapd.cow.format import OpType
from snapd.cow.op import Op
from snapd.cow.parse.reader import CowFile
from snapd.merge.oldview import OldImage
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase
from snapd.merge.undostore import UndoStore
from snapd.merge.views import open_views

SEEDS = range(40)


def merged(seed: int) -> World:
    world = World(seed)
    assert world.attempt("merge")
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_1_u_holds_absolute_ops_with_the_content_of_o(seed: int) -> None:
    """UNDO-1: U is a COW v3 file of replace and zero ops, and every unit is O's."""
    world = merged(seed)
    cow = CowFile.parse(world.disk.files["undo.cow"])
    assert set(cow.ops.type.tolist()) <= {OpType.REPLACE, OpType.ZERO}
    undo = open_views(world.state(), world.extent_map, world.cow, world.base, world.files).undo
    assert undo is not None
    for block in range(len(world.old)):
        if undo.next_saved(block, block + 1) == block:
            assert read_bytes(undo, block * world.block_size, world.block_size) == world.old[block]


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_2_only_changed_blocks_are_saved_and_written(seed: int) -> None:
    """UNDO-2: a block whose new content is its old content is neither saved nor written."""
    world = merged(seed)
    undo = open_views(world.state(), world.extent_map, world.cow, world.base, world.files).undo
    assert undo is not None
    both = min(len(world.old), len(world.new))
    changed = {b for b in range(both) if world.old[b] != world.new[b]}
    assert {b for b in range(both) if undo.next_saved(b, b + 1) == b} == changed
    written = set()
    for operation in world.disk.trace:
        if operation.startswith("write base"):
            start, length = map(int, operation.split()[2].split("+"))
            written |= set(range(start // world.block_size, (start + length) // world.block_size))
    assert {b for b in written if b < both} == changed


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_3_and_4_and_5_views_do_not_depend_on_progress(seed: int) -> None:
    """UNDO-3, UNDO-4, UNDO-5: O and N read in full before, after every span of either direction, and at the end."""
    world = World(seed)
    world.check()
    for action, end in (("merge", Phase.MERGED), ("rollback", Phase.ROLLED_BACK)):
        while world.phase is not end:
            world.attempt(action, should_stop=lambda: True)
            world.check_live_readers()
            world.check()


def test_undo_6_ops_need_no_order() -> None:
    """UNDO-6: a cycle of copies, which no ordered merge can do without scratch space, merges and is undone."""

    def ring(world: World) -> dict[int, tuple[Op, bytes]]:
        world.old = [world.random.randbytes(world.block_size) for _ in range(5)]
        return {b: (Op(OpType.COPY, b, 1, (b + 1) % 5, 0), b"") for b in range(5)}

    for seed in range(10):
        world = World(seed, old_blocks=5, ops=ring)
        assert world.attempt("merge")
        world.check()
        assert world.attempt("rollback")
        world.check()


def test_undo_6_a_repeated_merge_writes_nothing_more() -> None:
    """UNDO-6: idempotent; what is merged and read back is not touched again."""
    world = merged(3)
    before = len(world.disk.trace)
    assert world.attempt("merge")
    assert not [op for op in world.disk.trace[before:] if op.startswith("write base")]
    world.check()


class Interrupted:
    """A base in the middle of whose every read something else happens."""

    def __init__(self, base: Readable, event: Callable[[], None], share: float) -> None:
        self._base = base
        self._event = event
        self._share = share

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        first = int(len(buffer) * self._share)
        view = memoryview(buffer)
        self._base.read_into(view[:first], offset)
        self._event()
        self._base.read_into(view[first:], offset + first)


def run_to(world: World, point: int, shared: SharedMap) -> bool:
    """Run the merger to its `point`-th step and leave it there; False when it ended before."""
    steps = 0

    def trace(_name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == point:
            raise Stop

    return not world.attempt("merge", shared=shared, trace=trace)


class Reader:
    """A reader of the old view whose map was made before the merge began, and a merger that cuts in once."""

    def __init__(self, seed: int, point: int, share: float) -> None:
        self.world = World(seed)
        self.world.span_blocks = self.world.piece_blocks = 2
        self.shared = self.world.restored_map()
        self.point = point
        self.merger_stopped: bool | None = None
        base = Interrupted(self.world.base, self.cut_in, share)
        self.view = OldImage(base, lambda: self.shared.undo_op_count, self.open_undo)

    def cut_in(self) -> None:
        if self.merger_stopped is None:
            self.merger_stopped = run_to(self.world, self.point, self.shared)

    def open_undo(self) -> UndoStore:
        return UndoStore(*self.world.files.open_undo(), self.world.extent_map)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_undo_25_a_read_that_a_merger_overtakes_is_still_exact(seed: int, share: float) -> None:
    """UNDO-25: the merger runs to any of its steps before, inside or after the reader's read of the base."""
    for point in count(1):
        reader = Reader(seed, point, share)
        wanted = b"".join(reader.world.old)
        for _ in range(2):
            assert read_bytes(reader.view, 0, len(wanted)) == wanted, reader.world.report(f"merger at step {point}")
        if not reader.merger_stopped:
            break


def test_undo_25_the_base_is_read_once() -> None:
    """UNDO-25: a count that changed costs one more lookup, never another read of the base."""
    reader = Reader(1, 1000, 0.5)
    reads: list[int] = []
    cut_in = reader.cut_in

    def counted() -> None:
        reads.append(reader.shared.undo_op_count)
        cut_in()

    reader.view = OldImage(
        Interrupted(reader.world.base, counted, 0.5), lambda: reader.shared.undo_op_count, reader.open_undo
    )
    size = len(reader.world.old) * reader.world.block_size
    assert read_bytes(reader.view, 0, size) == b"".join(reader.world.old)
    assert reader.shared.undo_op_count > 0
    assert reads == [0]

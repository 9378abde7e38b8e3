"""The crash tests can fail: a merge that leaves out one barrier loses data within a few hundred histories.

Each barrier of the engine is taken away by itself: a flush that does nothing at one step, progress that survives a
change of direction, an undo count that is published too late.

Some flushes of a take-over are not here because the order of writes makes them redundant: the table's (its entries
count only behind a flush) and the base's (whoever writes to it next writes all that could be lost).
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from merge_world import World

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimStore
from snapd.merge.engine import Merge
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, State, write_state

HISTORIES = 1000


def is_caught(trace: Callable[[str], None] = lambda _name: None) -> bool:
    """Whether any of the histories shows a wrong view, or a store that does not fit its state."""
    for seed in range(HISTORIES):
        world = World(seed)
        try:
            for _ in range(6):
                world.random_step(trace=trace)
            world.attempt("merge", trace=trace)
            world.power_cut()
            world.check()
        except (AssertionError, SnapdError):
            return True
    return False


@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("begin", "undo.cow"),
        ("begin", "undo.cow.digests"),
        ("take over", "undo.cow"),
        ("take over", "state"),
        ("merging", "state"),
        ("b", "undo.cow"),
        ("b", "undo.cow.digests"),
        ("c", "undo.cow"),
        ("e", "base"),
        ("f", "state"),
        ("turn", "state"),
        ("rolled back", "state"),
        ("read back ok", "state"),
    ],
)
def test_every_flush_is_needed(step: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """UNDO-12, UNDO-12a, UNDO-13, UNDO-24: a flush that is not done at one step is found."""
    reached = ""

    def trace(name: str) -> None:
        nonlocal reached
        reached = name

    flush = SimStore.flush

    def forgetful_flush(store: SimStore) -> None:
        if (reached, store.name) != (step, file):
            flush(store)

    monkeypatch.setattr(SimStore, "flush", forgetful_flush)
    assert is_caught(trace), f"nobody noticed that {file} is not flushed at step {step}"


def test_progress_must_not_survive_a_change_of_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNDO-12a: kept progress skips blocks that the other direction has overwritten."""
    turn = Merge._turn

    def turn_and_keep(merge: Merge, state: State, phase: Phase) -> State:
        kept = replace(turn(merge, state, phase), next_block=state.next_block)
        write_state(merge._work._state_store, kept)
        return kept

    monkeypatch.setattr(Merge, "_turn", turn_and_keep)
    assert is_caught()


def test_publishing_must_come_before_the_base_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNDO-12 c', UNDO-25: readers beside a merger that publishes after its base writes see a mixed old view."""
    late: dict[int, int] = {}
    publish, mark_merged = SharedMap.publish, SharedMap.mark_merged

    def hold_back(shared: SharedMap, undo_op_count: int) -> None:
        late[id(shared)] = undo_op_count

    def let_go(shared: SharedMap, start: int, blocks: int) -> None:
        publish(shared, late.pop(id(shared), shared.undo_op_count))
        mark_merged(shared, start, blocks)

    monkeypatch.setattr(SharedMap, "publish", hold_back)
    monkeypatch.setattr(SharedMap, "mark_merged", let_go)
    assert is_caught()


def test_the_unbroken_engine_passes() -> None:
    """What catches the broken ones does not complain without cause."""
    assert not is_caught()

"""The crash tests of the writers can fail: without one of the barriers, one of a few short scripts loses something.

Not here, because the order of writes makes them redundant: the flush of a new header in version 2, where the first
label flushes all that it promises; that of a file that was cut to nothing, a change that is whole or not there; and
that of a table of digests that was cut, for nobody looks for its later states.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial

import pytest
from writer_world import World, beyond_the_points

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimStore
from snapd.cow.write.basewriter import CowWriter
from snapd.cow.write.resumepoints import ResumePoints
from snapd.cow.write.writer_v2 import WriterV2
from snapd.cow.write.writer_v3 import WriterV3

SEEDS = 60


def explore(make_world: Callable[[], World], script: str) -> None:
    """Play a script `before|stopped|behind a kill`: its second part is stopped everywhere, and so is the third then."""
    before, first, second = script.split("|")

    def stopped_world(stop_at: int) -> tuple[World, bool]:
        world = make_world()
        assert not world.attempt_all(world.play(before))
        return world, world.attempt_all(world.play(first), stop_at=world.disk.operations + stop_at)

    stop_at, stopped = 0, True
    while stopped:
        world, stopped = stopped_world(stop_at)
        world.check_power_cuts(6)
        again, stopped_again = 0, bool(second)
        while stopped_again:
            world, _ = stopped_world(stop_at)
            world.stop(power_cut=False)
            stopped_again = world.attempt_all(world.play(second), stop_at=world.disk.operations + again)
            world.check_power_cuts(3)
            again += 1
        stop_at += 1


def is_caught(history: Callable[[int], None]) -> bool:
    """Whether any of the histories loses or shows what it must not."""
    for seed in range(SEEDS):
        try:
            history(seed)
        except (AssertionError, SnapdError):
            return True
    return False


def forget_flush(monkeypatch: pytest.MonkeyPatch, place: Callable[..., object], which: int) -> None:
    """From now on one flush in the source of a function, counted from 0, does nothing."""
    source, first_line = inspect.getsourcelines(place)
    lines = [first_line + i for i, line in enumerate(source) if "flush()" in line]
    code = inspect.unwrap(place).__code__
    flush = SimStore.flush

    def forgetful_flush(store: SimStore) -> None:
        frame = sys._getframe(1)
        if frame.f_code is CowWriter._flush.__code__ and frame.f_back is not None:
            frame = frame.f_back
        if (frame.f_code, frame.f_lineno) != (code, lines[which]):
            flush(store)

    monkeypatch.setattr(SimStore, "flush", forgetful_flush)


@pytest.mark.parametrize(
    ("version", "place", "which", "script"),
    [
        (3, WriterV3._commit, 0, "cdd|ddlddf|"),
        (3, WriterV3._write_header, 0, "cdl|dldfgdl|"),
        (3, CowWriter._resume, 0, "sldldldl|dl|g"),
        (3, CowWriter._begin_file, 2, "|cdl|"),
        (2, WriterV2._mark, 0, "c|ddddlddddl|"),
        (2, WriterV2._mark, 1, "cd|dl|"),
        (2, WriterV2._finish, 0, "c|ddddf|"),
        (2, WriterV2._finish, 1, "cd|df|"),
        (2, WriterV2._remove_footer, 0, "cdlddf|gddlf|"),
        (2, CowWriter._resume, 0, "cd|dl|gdd"),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_every_flush_is_needed(
    version: int, place: Callable[..., object], which: int, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COW-91, COW-95, COW-96, COW-216, UNDO-24: a flush that is not done at one step is found."""
    blocks = 140 if "s" in script else 0
    for seed in range(3):
        explore(partial(World, seed, version, blocks=blocks), script)
    forget_flush(monkeypatch, place, which)
    assert is_caught(lambda seed: explore(partial(World, seed, version, blocks=blocks), script))


@pytest.mark.parametrize("version", [2, 3])
def test_digests_are_needed_before_the_ops(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-216: a table that is never flushed is missed at a label or at the end."""
    flush = SimStore.flush

    def flush_others(store: SimStore) -> None:
        if store.name != "table":
            flush(store)

    monkeypatch.setattr(SimStore, "flush", flush_others)
    assert is_caught(lambda seed: explore(partial(World, seed, version), "cd|dldf|"))


@pytest.mark.parametrize("which", [0, 1])
def test_an_old_stream_on_a_device_dies_in_order(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-90, COW-124: first its header goes, then all of it, and only then the new header comes."""
    forget_flush(monkeypatch, CowWriter._begin_file, which)
    assert is_caught(lambda seed: explore(partial(World, seed, 2, on_device=True, scratch=True), "cddddf|g|"))


def on_a_border(seed: int) -> None:
    """More labels than there are resume points, the third of which a sector border cuts."""
    stop_at, stopped = 0, True
    while stopped:
        world = World(seed, 3, blocks=140)
        stopped = world.attempt_all(beyond_the_points(world, 97 + seed % 4), stop_at=stop_at)
        world.check_power_cuts(4)
        stop_at += 1


def test_points_on_a_border_are_written_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-83, COW-84: at once they would lose labels, or give them the ops of others."""
    on_a_border(0)
    monkeypatch.setattr(ResumePoints, "writes", lambda points: [points._region])
    assert is_caught(on_a_border)


def test_every_step_on_a_border_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-83, COW-96: without it the steps are one."""
    forget_flush(monkeypatch, WriterV3._commit, 1)
    assert is_caught(on_a_border)


def test_the_last_label_is_never_moved_onto_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-83, COW-84: one more of the old labels goes instead."""
    add = ResumePoints.add

    def add_anywhere(points: ResumePoints, label: int, op_count: int) -> None:
        border, points._border = points._border, 0
        add(points, label, op_count)
        points._border = border

    monkeypatch.setattr(ResumePoints, "add", add_anywhere)
    assert is_caught(on_a_border)

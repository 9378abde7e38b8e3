"""A merge and its undoing, stopped everywhere and turned round at will: both views stay exact (UNDO-19, UNDO-20).

A failure names its seed: `SNAPD_CRASH_SEED=n pytest tests/crash` replays it; `SNAPD_CRASH_SCALE=20` is the long run.
"""

from random import Random
from typing import TYPE_CHECKING, TypeVar

import pytest
from merge_world import World, seeds

from snapd.merge.statefile import Phase

if TYPE_CHECKING:
    from _typeshed import SupportsLenAndGetItem

T = TypeVar("T")
PARTS = 6
"""The random histories are cut into so many tests, so that two cores share them."""


def operations(world: World, action: str) -> int:
    """How many store operations an undisturbed run takes."""
    twin = world.fork()
    before = twin.disk.operations
    assert twin.attempt(action)
    return twin.disk.operations - before


def finish(world: World, action: str) -> None:
    """Go to the end in one direction, and look."""
    if action == "rollback" and world.phase is None:
        action = "merge"
    assert world.attempt(action), world.report("a run that nothing stops ends")
    wanted = Phase.MERGED if action == "merge" else Phase.ROLLED_BACK
    assert world.phase is wanted, world.report(f"{action} ended as {world.phase}")
    world.check()


def stop_everywhere(world: World, action: str) -> None:
    """Stop `action` at every operation in both ways; look, continue either way with one more stop, look."""
    for stop_after in range(operations(world, action)):
        for kind in ("kill", "power_cut"):
            twin = world.fork()
            twin.random.seed(f"{world.seed} {action} {stop_after} {kind}")
            assert not twin.attempt(action, stop_after)
            getattr(twin, kind)()
            twin.check()
            turn = twin.random.choice(["merge", "rollback"])
            if twin.phase is not None and not twin.attempt(turn, twin.random.randint(0, 25)):
                twin.stop()
            twin.check()
            finish(twin, twin.random.choice(["merge", "rollback"]))


def test_a_merge_stopped_at_every_operation() -> None:
    """UNDO-19: every stop of a merge, by kill and by power cut, leaves both views exact and either way open."""
    for seed in seeds(90):
        stop_everywhere(World(seed), "merge")


def test_a_rollback_stopped_at_every_operation() -> None:
    """UNDO-14, UNDO-19: the same for a rollback, from a merged and from a half-merged base."""
    for seed in seeds(90):
        world = World(seed)
        if seed % 2:
            world.attempt("merge")
        elif not world.attempt("merge", world.random.randint(10, 40)):
            world.stop()
        if world.phase in (Phase.MERGING, Phase.MERGED):
            stop_everywhere(world, "rollback")


def test_a_merge_after_a_rollback_stopped_at_every_operation() -> None:
    """UNDO-14, UNDO-20: merging again makes a new undo store; the one left over is never reused."""
    for seed in seeds(12):
        world = World(seed)
        assert world.attempt("merge")
        assert world.attempt("rollback")
        stop_everywhere(world, "merge")


class Odometer(Random):
    """Chance that takes every way in turn: each choice is a digit, `advance` counts."""

    def __init__(self) -> None:
        super().__init__(0)
        self._digits: list[list[int]] = []
        self._at = 0

    def choice(self, seq: "SupportsLenAndGetItem[T]") -> T:
        return seq[self._digit(len(seq))]

    def random(self) -> float:
        return (0.25, 0.75)[self._digit(2)]

    def ways(self) -> int:
        """How many ways there are, as far as the last run has shown."""
        product = 1
        for _, radix in self._digits:
            product *= radix
        return product

    def advance(self) -> bool:
        """Set the next way; False after the last."""
        self._at = 0
        while self._digits:
            self._digits[-1][0] += 1
            if self._digits[-1][0] < self._digits[-1][1]:
                return True
            self._digits.pop()
        return False

    def _digit(self, radix: int) -> int:
        if self._at == len(self._digits):
            self._digits.append([0, radix])
        self._at += 1
        return self._digits[self._at - 1][0]


def test_every_subset_of_lost_sectors() -> None:
    """UNDO-19: at a power cut every combination of lost, old and new sectors is tried, sampled above 2^10."""
    for seed in seeds(12):
        world = World(seed, old_blocks=3, block_size=512)
        world.span_blocks = 2
        for stop_after in range(operations(world, "merge")):
            stopped = world.fork()
            assert not stopped.attempt("merge", stop_after)
            odometer = Odometer()
            more = True
            while more:
                twin = stopped.fork()
                twin.disk.random = odometer
                twin.power_cut()
                twin.disk.random = twin.random
                twin.check()
                if odometer.ways() > 1 << 10:
                    break
                more = odometer.advance()
            else:
                continue
            for way in range(64):
                twin = stopped.fork()
                twin.disk.random.seed(way)
                twin.power_cut()
                twin.check()


def history(seed: int) -> World:
    """Merges, rollbacks and stops in any order, looked at after each; then to one end."""
    world = World(seed)
    for _ in range(world.random.randint(1, 7)):
        world.random_step()
    finish(world, world.random.choice(["merge", "rollback"]))
    return world


@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories_of_merges_rollbacks_and_stops(part: int) -> None:
    """UNDO-19, UNDO-20: any mixture of runs in both directions and stops of both kinds converges."""
    for seed in seeds(12000)[part::PARTS]:
        history(seed)


def test_confirm_stopped_at_every_operation() -> None:
    """UNDO-8, UNDO-10: a confirm that was stopped is either not made, and can be made, or made for good."""
    for seed in seeds(30):
        world = World(seed)
        assert world.attempt("merge")
        for stop_after in range(operations(world, "confirm")):
            for kind in ("kill", "power_cut"):
                twin = world.fork()
                assert not twin.attempt("confirm", stop_after)
                getattr(twin, kind)()
                twin.check()
                assert twin.attempt("confirm")
                twin.power_cut()
                assert twin.phase is Phase.CONFIRMED, twin.report("confirm was acknowledged, and lost")
                twin.check()


def test_a_merge_again_and_a_confirm_after_stops() -> None:
    """UNDO-20: merge, stop, rollback, stop, merge again, confirm."""
    for seed in seeds(450):
        world = World(seed)
        for action in ("merge", "rollback"):
            if world.phase is None and action == "rollback":
                break
            if not world.attempt(action, world.random.randint(0, 50)):
                world.stop()
            world.check()
        finish(world, "merge")
        assert world.attempt("confirm")
        world.power_cut()
        world.check()
        assert world.phase is Phase.CONFIRMED

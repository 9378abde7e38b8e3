"""A stop at every operation of the COW writers: labels that were given stay, and nothing is ever half.

A failure names its seed: `SNAPD_CRASH_SEED=n pytest tests/crash` replays it; `SNAPD_CRASH_SCALE=20` is the long run.
"""

import pytest
from writer_world import World, beyond_the_points, seeds

KINDS = [(2, False), (3, False), (2, True), (3, True)]
NAMES = ["v2", "v3", "v2 on a device", "v3 on a device"]


@pytest.mark.parametrize(("version", "on_device"), KINDS, ids=NAMES)
def test_stop_anywhere(version: int, on_device: bool) -> None:
    """COW-87, COW-91, COW-94 to COW-96, COW-216: every operation of a script is once the first that does not happen."""
    for seed in seeds(4):
        stop_at, stopped = 0, True
        while stopped:
            # The same seed gives the same script, up to the stop.
            world = World(seed, version, on_device=on_device)
            stopped = world.attempt(stop_at=stop_at, steps=14)
            world.check_power_cuts(3)
            world.stop(power_cut=bool(stop_at % 2))
            world.attempt(steps=5)
            world.check()
            stop_at += 1


@pytest.mark.parametrize(("version", "on_device"), KINDS, ids=NAMES)
def test_many_stops_in_one_history(version: int, on_device: bool) -> None:
    """COW-82, COW-88, COW-90, COW-94 to COW-96, COW-216, UNDO-24: stops while going on, power cuts after kills."""
    for seed in seeds(80):
        world = World(seed, version, on_device=on_device)
        random = world.random
        for _ in range(6):
            stop_at = world.disk.operations + random.randrange(40)
            stopped = world.attempt(stop_at=stop_at, steps=random.randrange(1, 12))
            if stopped and random.random() < 0.5:
                world.stop(power_cut=False)
                if random.random() < 0.5:
                    world.stop(power_cut=True)
            elif stopped or random.random() < 0.5:
                world.stop(power_cut=True)
            else:
                world.check()


@pytest.mark.parametrize("entries", range(92, 110))
def test_the_last_label_survives_a_border_in_the_points(entries: int) -> None:
    """COW-83, COW-84, COW-96: a sector border runs through the resume points, and through each of the slots once."""
    for seed in seeds(1):
        stop_at, stopped = 0, True
        while stopped:
            world = World(seed, 3, blocks=140)
            stopped = world.attempt_all(beyond_the_points(world, entries), stop_at=stop_at)
            world.check_power_cuts(3)
            stop_at += 1

"""A stop at every operation of the COW writers: labels that were given stay, and nothing is ever half.

A failure names its seed: `SNAPD_CRASH_SEED=n pytest tests/crash` replays it; `SNAPD_CRASH_SCALE=20` is the long run.
"""

import pytest
from writer_world import World, seeds

from snapd.block.simdisk import Stop


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("power_cut", [True, False], ids=["power-cut", "kill"])
def test_stop_anywhere(version: int, power_cut: bool) -> None:
    """COW-87, COW-91, COW-94 to COW-96, COW-216: every operation of a script is the last one once."""
    for seed in seeds(6):
        operations = 0
        while True:
            world = World(seed, version)
            # The script is the same up to the stop: chance is asked for nothing else before.
            stopped = world.attempt(stop_at=operations, steps=14)
            world.stop(power_cut=power_cut)
            if not stopped:
                break
            world.attempt(steps=5)
            world.check()
            operations += 1
        assert operations > 10


@pytest.mark.parametrize("version", [2, 3])
def test_many_stops_in_one_history(version: int) -> None:
    """COW-82, COW-88, COW-94 to COW-96, COW-216, UNDO-24: a kill before a power cut, stops while going on, and all over."""
    for seed in seeds(250):
        world = World(seed, version)
        random = world.random
        for _ in range(6):
            if world.attempt(stop_at=world.disk.operations + random.randrange(40), steps=random.randrange(1, 12)):
                if random.random() < 0.5:
                    world.stop(power_cut=False)
                    if random.random() < 0.5:
                        world.stop(power_cut=True)
                else:
                    world.stop(power_cut=True)
            elif random.random() < 0.5:
                world.stop(power_cut=True)
            else:
                world.check()

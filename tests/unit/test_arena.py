"""The arena's ring: nothing overlaps, nothing is handed out twice, all room comes back."""

import os
import random

import pytest

from snapd.dmuser.arena import ARENA_BYTES, Arena, Region, create_arena, map_arena

FIRST, END = 100, 1100
SIZE = END - FIRST


class Model:
    """The arena under test, with every byte that is out marked by its region."""

    def __init__(self) -> None:
        self.arena = Arena(memoryview(bytearray(END)), FIRST, END)
        self.out: list[Region] = []

    def allocate(self, length: int) -> Region | None:
        region = self.arena.allocate(length)
        if region is None:
            return None
        assert FIRST <= region.start < region.end <= END
        assert region.end - region.start == length
        for other in self.out:
            assert region.end <= other.start or other.end <= region.start, "two regions share memory"
        self.out.append(region)
        return region

    def free(self, index: int) -> None:
        self.out.pop(index).free()


@pytest.mark.parametrize("seed", range(40))
def test_random_use(seed: int) -> None:
    """A long life in any order of frees, against a list of what is out."""
    print(f"seed {seed}")
    choice = random.Random(seed)
    model = Model()
    longest = choice.choice([20, 300, SIZE])
    refusals = 0
    for _ in range(3000):
        room = model.arena.room()
        kind = choice.randrange(10)
        if kind < 6:
            length = choice.randint(1, longest)
            region = model.allocate(length)
            # What room says is what one region can have, no more and no less.
            assert (region is not None) == (length <= room)
            refusals += region is None
            if region is not None and kind == 0:
                region.shrink(choice.randint(region.start + 1, region.end))
        elif model.out:
            # The oldest, the newest, or any.
            model.free(choice.choice([0, -1, choice.randrange(len(model.out))]))
    assert refusals
    choice.shuffle(model.out)
    while model.out:
        model.free(0)
    assert model.arena.room() == SIZE
    assert model.allocate(SIZE) is not None


@pytest.mark.parametrize("seed", range(10))
def test_content_stays(seed: int) -> None:
    """Whoever has a region finds in it what it wrote, whatever others do."""
    choice = random.Random(seed)
    arena = Arena(memoryview(bytearray(END)), FIRST, END)
    held: list[tuple[Region, bytes]] = []
    for _ in range(1000):
        region = arena.allocate(choice.randint(1, 200))
        if region is not None:
            content = choice.randbytes(region.end - region.start)
            arena.memory[region.start : region.end] = content
            held.append((region, content))
        if region is None or choice.random() < 0.4:
            region, content = held.pop(choice.randrange(len(held)))
            assert arena.memory[region.start : region.end] == content
            region.free()


def test_a_full_ring_hands_out_nothing() -> None:
    arena = Arena(memoryview(bytearray(END)), FIRST, END)
    regions = [arena.allocate(SIZE // 4) for _ in range(4)]
    assert arena.room() == 0
    assert arena.allocate(1) is None
    # Out of the middle: not before what is older.
    second = regions[1]
    assert second is not None
    second.free()
    assert arena.allocate(1) is None
    first = regions[0]
    assert first is not None
    first.free()
    assert arena.room() == SIZE // 2
    assert arena.allocate(SIZE // 2 + 1) is None
    assert arena.allocate(SIZE // 2) is not None
    assert arena.room() == 0


def test_what_was_taken_last_comes_back_at_once() -> None:
    """A region that turned out not to be needed costs no room, although an older one is still out."""
    arena = Arena(memoryview(bytearray(END)), FIRST, END)
    assert arena.allocate(10) is not None
    for _ in range(100):
        region = arena.allocate(500)
        assert region is not None
        region.free()
    assert arena.room() == SIZE - 10


def test_shrinking_gives_back_the_end() -> None:
    arena = Arena(memoryview(bytearray(END)), FIRST, END)
    region = arena.allocate(SIZE)
    assert region is not None
    region.shrink(region.start + 10)
    assert arena.room() == SIZE - 10
    following = arena.allocate(SIZE - 10)
    assert following is not None
    assert following.start == region.end


def test_too_large_is_refused_for_ever() -> None:
    arena = Arena(memoryview(bytearray(END)), FIRST, END)
    assert arena.allocate(SIZE + 1) is None
    assert arena.room() == SIZE


def test_both_ends_see_one_memory() -> None:
    """The memory outlives whoever mapped it first, and is not handed down by accident."""
    fd = create_arena()
    try:
        assert os.fstat(fd).st_size == ARENA_BYTES
        assert not os.get_inheritable(fd)
        one, other = map_arena(fd), map_arena(fd)
        one[ARENA_BYTES - 3 :] = b"end"
        assert bytes(other[ARENA_BYTES - 3 :]) == b"end"
    finally:
        os.close(fd)

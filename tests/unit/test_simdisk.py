"""The simulated disk itself: what it forgets, tears and reorders, and that a seed replays it."""

from random import Random

import pytest

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk, SimStore, Stop
from snapd.block.store import read_bytes

SEEDS = range(200)


def content(store: SimStore) -> bytes:
    return read_bytes(store, 0, store.size())


def survivors(sectors: int, *, flushed: bool = False) -> set[bytes]:
    """All that a power cut leaves, over many seeds, of one write of `sectors` sectors over zeros."""
    found = set()
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", bytes(512 * sectors))
        store.write(b"x" * (512 * sectors), 0)
        if flushed:
            store.flush()
        disk.power_cut()
        found.add(content(store))
    return found


def test_a_write_without_a_flush_is_lost_or_kept() -> None:
    """UNDO-27: one sector is whole or not there at all."""
    assert survivors(1) == {bytes(512), b"x" * 512}


def test_unflushed_sectors_tear_and_reorder() -> None:
    """UNDO-27: every combination of old and new sectors occurs, also the last without the first."""
    combinations = {tuple(found[at] for at in (0, 512, 1024)) for found in survivors(3)}
    assert len(combinations) == 8


def test_a_flush_makes_durable() -> None:
    """What was flushed survives every power cut."""
    assert survivors(3, flushed=True) == {b"x" * 1536}


def test_a_flush_is_of_one_file() -> None:
    """Flushing one file says nothing about another."""
    lost = False
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        one, two = disk.store("one", bytes(512)), disk.store("two", bytes(512))
        one.write(b"1" * 512, 0)
        two.write(b"2" * 512, 0)
        one.flush()
        disk.power_cut()
        assert content(one) == b"1" * 512
        lost |= content(two) == bytes(512)
    assert lost


def test_any_version_since_the_flush_may_survive() -> None:
    """A sector written twice may come back as it was before, between, or after."""
    found = set()
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", b"a" * 512)
        store.write(b"b" * 512, 0)
        store.write(b"c" * 512, 0)
        disk.power_cut()
        found.add(content(store)[:1])
    assert found == {b"a", b"b", b"c"}


def test_a_killed_process_leaves_its_bytes_readable_and_not_durable() -> None:
    """UNDO-24: after a kill the cache has them; a later power cut may still take them."""
    lost = False
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", bytes(512))
        store.write(b"x" * 512, 0)
        disk.kill()
        assert content(store) == b"x" * 512
        assert store.unflushed_sectors() == 1
        disk.power_cut()
        lost |= content(store) == bytes(512)
    assert lost


def test_a_grown_file_may_lose_its_growth() -> None:
    """The size is durable only after a flush, too."""
    sizes = set()
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", bytes(512))
        store.write(b"x" * 512, 1024)
        disk.power_cut()
        sizes.add(store.size())
    assert sizes == {512, 1536}


def after_a_cut(seed: int, *, flushed: bool = False) -> bytes:
    """What a power cut leaves of 1024 bytes that were cut to 300."""
    disk = SimDisk(Random(seed))
    store = disk.store("f", b"a" * 1024)
    store.truncate(300)
    assert content(store) == b"a" * 300
    if flushed:
        store.flush()
    disk.power_cut()
    return content(store)


def test_a_cut_file_may_get_its_end_back() -> None:
    """Before the flush the old size may survive, and with it what was cut off."""
    assert {after_a_cut(seed) for seed in SEEDS} == {b"a" * 300, b"a" * 1024}
    assert {after_a_cut(seed, flushed=True) for seed in SEEDS} == {b"a" * 300}


def test_what_is_written_behind_a_cut_needs_the_cut() -> None:
    """Old bytes never show beside those that were written where they had been cut off."""
    found = set()
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", b"a" * 2048)
        store.write(b"b" * 512, 0)
        store.truncate(600)
        store.write(b"c" * 512, 1024)
        disk.power_cut()
        found.add(content(store))
    uncut = {start + b"a" * 1536 for start in (b"a" * 512, b"b" * 512)}
    cut = {start + b"a" * 88 for start in (b"a" * 512, b"b" * 512)}
    grown = {short + bytes(424) + end for short in cut for end in (bytes(512), b"c" * 512)}
    assert found == uncut | cut | grown


def test_what_was_cut_off_is_zeros_when_the_file_grows_again() -> None:
    """As long as nobody pulls the plug, no old byte shows behind the cut."""
    store = SimDisk(Random(0)).store("f", b"a" * 1024)
    store.truncate(300)
    store.write(b"b", 1023)
    assert content(store) == b"a" * 300 + bytes(723) + b"b"
    store.truncate(2048)
    assert content(store)[1024:] == bytes(1024)


def test_a_stop_does_nothing_of_its_operation() -> None:
    """Operation number `stop_at` does not happen, and none behind it."""
    disk = SimDisk(Random(1))
    store = disk.store("f", bytes(512))
    store.write(b"x" * 512, 0)
    disk.stop_at = disk.operations
    with pytest.raises(Stop):
        store.flush()
    with pytest.raises(Stop):
        store.flush()
    assert store.unflushed_sectors() == 1
    assert disk.operations == 1


def test_a_stopped_write_leaves_a_prefix_of_its_sectors() -> None:
    """A process that dies in a write has put some of it into the cache, in order."""
    lengths = set()
    for seed in SEEDS:
        disk = SimDisk(Random(seed))
        store = disk.store("f", bytes(2048))
        disk.stop_at = 0
        with pytest.raises(Stop):
            store.write(b"x" * 2048, 0)
        disk.kill()
        length = len(content(store).rstrip(b"\0"))
        assert content(store)[:length] == b"x" * length
        lengths.add(length)
    assert lengths == {0, 512, 1024, 1536, 2048}


def test_a_seed_replays_a_history() -> None:
    """The same seed gives the same survivors and the same operations."""

    def run(seed: int) -> tuple[bytes, list[str]]:
        disk = SimDisk(Random(seed))
        store = disk.store("f", bytes(4096))
        for i in range(8):
            store.write(bytes([i + 1]) * 1024, i * 512)
        disk.power_cut()
        return content(store), disk.trace

    assert run(7) == run(7)
    assert len({run(seed)[0] for seed in range(10)}) > 1


def test_a_read_behind_the_end_is_an_error() -> None:
    """Never short, never padded."""
    store = SimDisk(Random(0)).store("f", bytes(512))
    with pytest.raises(SnapdError):
        store.read_into(bytearray(513), 0)

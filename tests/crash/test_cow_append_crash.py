"""A stop at every store operation of an append: what is left is told for what it is, and the same append finishes it.

Only a version 2 file that has no label cannot be gone on with: then there is no file, never a wrong one.
"""

import os
from random import Random

import pytest
from offline import BLOCK, Call, blocks, write_calls

from snapd.block.errors import SnapdError
from snapd.block.simdisk import SimDisk, Stop
from snapd.block.store import read_bytes
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.verbs.append import append_to

SEEDS = range(2 * int(os.environ.get("SNAPD_CRASH_SCALE", "1")))
LABEL = 7
OLD = blocks(60, 1)
# Blocks 4 to 7 moved, 8 and 9 zero, 10 to 29 new, 40 and 41 changed in a byte each; 70 blocks in all.
NEW = bytearray(OLD + blocks(8, 3) + bytes(2 * BLOCK))
NEW[4 * BLOCK : 8 * BLOCK] = OLD[30 * BLOCK : 34 * BLOCK]
NEW[8 * BLOCK : 10 * BLOCK] = bytes(2 * BLOCK)
NEW[10 * BLOCK : 30 * BLOCK] = blocks(20, 2)
NEW[40 * BLOCK + 5] ^= 1
NEW[41 * BLOCK + 5] ^= 1
# The target that the COW was first made for.
OTHER = bytearray(NEW)
OTHER[8 * BLOCK : 30 * BLOCK] = OLD[8 * BLOCK : 30 * BLOCK]
OTHER[50 * BLOCK : 52 * BLOCK] = blocks(2, 4)
KEPT: tuple[Call, ...] = (("copy", 4, 4, 30), ("xor", 40, 2, 40 * BLOCK))
DROPPED: tuple[Call, ...] = (("raw", 50, 2, 0), ("raw", 60, 10, 0))


class Machine:
    """A COW with its digests on a simulated disk, and the images."""

    def __init__(self, seed: int, version: int, *calls: Call, target: bytes) -> None:
        self.disk = SimDisk(Random(seed))
        self.cow, self.table = self.disk.store("cow"), self.disk.store("digests")
        self.old, self.new = self.disk.store("old", OLD), self.disk.store("new", bytes(NEW))
        write_calls(self.cow, self.table, OLD, target, *calls, version=version)
        self.disk.operations = 0

    def append(self, label: int | None) -> None:
        """The verb, on these files."""
        append_to(
            *(self.cow, self.table, self.old, self.new, lambda _done, _total: None),
            label=label,
            compression=None,
            threads=1,
        )

    def image(self, label: int | None = None) -> bytes:
        """What the COW over the old image reads as, checked by the digests; an error where it cannot be had."""
        cow = CowFile.parse(self.cow, label=label)
        digests = DigestTable.load(self.table, op_count=cow.op_count, ops_digest=cow.ops_digest)
        view = CowView(cow.extent_map(len(OLD), digests=digests), self.cow, source=self.old, base=self.old)
        return read_bytes(view, 0, view.size)


def stopped(seed: int, stop_at: int, power_cut: bool, version: int, label: int | None, *calls: Call) -> Machine:
    """The machine after a stop at this operation of the append."""
    # The kept ops make what the new target has, with or without those that are dropped.
    target = OTHER if label is not None else NEW
    machine = Machine(1000 * seed + stop_at, version, *calls, target=bytes(target))
    machine.disk.stop_at = stop_at
    with pytest.raises(Stop):
        machine.append(label)
    if power_cut:
        machine.disk.power_cut()
    else:
        machine.disk.kill()
    return machine


def operations(version: int, label: int | None, *calls: Call) -> int:
    """How many an append takes."""
    machine = Machine(0, version, *calls, target=bytes(OTHER if label is not None else NEW))
    machine.append(label)
    assert machine.image() == NEW
    return machine.disk.operations


@pytest.mark.parametrize("power_cut", [True, False], ids=["power-cut", "kill"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_stop_anywhere_behind_a_label(seed: int, version: int, power_cut: bool) -> None:
    """COW-94 to COW-96, COW-216: up to the label it can be read at any time, with digests; called again it ends."""
    calls = (*KEPT, ("label", LABEL, 0, 0), *DROPPED)
    up_to_label = OLD[: 4 * BLOCK] + NEW[4 * BLOCK : 8 * BLOCK] + OLD[8 * BLOCK : 40 * BLOCK]
    up_to_label += NEW[40 * BLOCK : 42 * BLOCK] + OLD[42 * BLOCK :]
    total = operations(version, LABEL, *calls)
    seen = set[bytes]()
    for stop_at in range(total):
        machine = stopped(seed, stop_at, power_cut, version, LABEL, *calls)
        where = f"seed {seed}, stop {stop_at} of {total}"
        assert machine.image(LABEL) == up_to_label, where
        try:
            image = machine.image()
        except CowError:
            image = b""
        assert image in (b"", OTHER, NEW, up_to_label), where
        seen.add(image)
        machine.append(LABEL)
        assert machine.image() == NEW, where
    assert bytes(OTHER) in seen, f"seed {seed}: nothing was unchanged"


@pytest.mark.parametrize("power_cut", [True, False], ids=["power-cut", "kill"])
@pytest.mark.parametrize("seed", SEEDS)
def test_stop_anywhere_behind_a_whole_version_3_file(seed: int, power_cut: bool) -> None:
    """COW-95, COW-96: the file has its old ops or all, and called again the append ends."""
    total = operations(3, None, *KEPT, ("raw", 60, 10, 0))
    for stop_at in range(total):
        machine = stopped(seed, stop_at, power_cut, 3, None, *KEPT, ("raw", 60, 10, 0))
        where = f"seed {seed}, stop {stop_at} of {total}"
        assert CowFile.parse(machine.cow).op_count >= 6 + 3, where
        machine.append(None)
        assert machine.image() == NEW, where


@pytest.mark.parametrize("power_cut", [True, False], ids=["power-cut", "kill"])
@pytest.mark.parametrize("seed", SEEDS)
def test_stop_anywhere_behind_a_version_2_file_without_labels(seed: int, power_cut: bool) -> None:
    """COW-91, COW-94: the old file, the new one, or none, for want of a footer."""
    total = operations(2, None, *KEPT, ("raw", 60, 10, 0))
    refused = 0
    for stop_at in range(total):
        machine = stopped(seed, stop_at, power_cut, 2, None, *KEPT, ("raw", 60, 10, 0))
        try:
            cow = CowFile.parse(machine.cow)
        except CowError:
            refused += 1
            continue
        assert cow.op_count >= 16
        machine.append(None)
        assert machine.image() == NEW, f"seed {seed}, stop {stop_at} of {total}"
    assert refused


def test_an_error_stops_nothing_halfway() -> None:
    """EINVAL for an op that is wrong: not one operation on the disk."""
    machine = Machine(0, 3, *KEPT, *DROPPED, target=bytes(OTHER))
    with pytest.raises(SnapdError, match="block 50: op 6"):
        machine.append(None)
    assert machine.disk.operations == 0

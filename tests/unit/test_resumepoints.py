"""The region of the resume points: whatever a power cut leaves of it, the last durable label is in it."""

import struct
from collections.abc import Iterator
from random import Random

import pytest

from snapd.cow.write.resumepoints import REGION_SIZE, Point, ResumePoints

SECTOR = 512


def believed(region: bytes, slots: int, op_count: int) -> list[Point]:
    """What a reader makes of a region: COW-84, COW-85, written down once more."""
    found: list[Point] = []
    highest = -1
    for slot in range(min(slots, 4)):
        point = Point(*struct.unpack_from("<QQ", region, 16 * slot))
        if point.label > highest and point.op_count <= op_count:
            found.append(point)
        highest = max(highest, point.label)
    return found


def torn(old: bytes, new: bytes, start: int) -> Iterator[bytes]:
    """What a power cut may leave of a write: each sector as it was or as it is to be."""
    border = -start % SECTOR
    for head in (old, new):
        for tail in (old, new):
            yield head[:border] + tail[border:] if border < REGION_SIZE else head


class Disk:
    """Header and region as a writer would write them, checked after every write."""

    def __init__(self, start: int) -> None:
        self.points = ResumePoints(start)
        self.region = bytes(REGION_SIZE)
        self.op_count = 0
        self.durable: Point | None = None
        self.given: dict[int, int] = {}

    def label(self, number: int, op_count: int) -> None:
        """One label, in the steps of the table."""
        points = self.points
        self.given[number] = op_count
        points.add(number, op_count)
        fits = points.fits
        if fits:
            self._write_region()
            points.believed = len(points)
        self.op_count = op_count
        self._check(self.region)
        if not fits:
            self._write_region()
            points.believed = len(points)
            self._check(self.region)
        self.durable = Point(number, op_count)
        self._check(self.region)

    def _write_region(self) -> None:
        # Until the header is written, the old one counts: `believed` and `op_count` are its.
        for region in self.points.writes():
            for left in torn(self.region, region, self.points.start):
                self._check(left)
            self.region = region
        self.points.wrote()

    def _check(self, region: bytes) -> None:
        found = believed(region, self.points.believed, self.op_count)
        assert self.durable is None or self.durable in found, f"{self.durable} is lost"
        for point in found:
            assert self.given[point.label] == point.op_count, f"{point} was never given"


def label_numbers(random: Random) -> list[int]:
    """Growing labels whose bytes change at different places."""
    number, numbers = 0, []
    for _ in range(9):
        number += random.choice([1, 255, 1 << 15, 1 << 16, (1 << 32) - 1, 1 << 47])
        numbers.append(number)
    return numbers


@pytest.mark.parametrize("entries", range(91, 110))
def test_no_power_cut_loses_the_last_label(entries: int) -> None:
    """COW-83, COW-84, COW-96: for a sector border at any place in the region, and for labels of any bytes."""
    random = Random(entries)
    for _ in range(300):
        disk = Disk(78 + 4 * entries)
        op_count = 0
        for number in label_numbers(random):
            op_count += random.choice([0, 1, 1, 300, 70000])
            disk.label(number, op_count)
            found = believed(disk.region, len(disk.points), op_count)
            assert found[-1] == Point(number, op_count)
            assert len(found) == len(disk.points)


@pytest.mark.parametrize("start", [78, 78 + (2 << 20), 78 + 4 * 92, 78 + 4 * 109])
def test_without_a_border_the_last_four_labels_are_there(start: int) -> None:
    """COW-83: in slot order, the oldest gone, unused slots zeros."""
    points = ResumePoints(start)
    for number in range(1, 8):
        points.add(number, number)
        assert points.fits
        (region,) = points.writes()
        points.wrote()
        points.believed = len(points)
        kept = range(max(1, number - 3), number + 1)
        assert region == b"".join(struct.pack("<QQ", n, n) for n in kept).ljust(64, b"\0")


def test_three_labels_stay_where_the_border_takes_the_third_slot() -> None:
    """COW-83: the last label must not move into that slot; else the last four are there."""
    for entries in range(93, 109):
        points = ResumePoints(78 + 4 * entries)
        counts = []
        for number in range(1, 9):
            points.add(number, number)
            points.writes()
            points.wrote()
            points.believed = len(points)
            counts.append(len(points))
        third = 97 <= entries <= 100
        assert counts == ([1, 2, 3, 4, 3, 4, 3, 4] if third else [1, 2, 3, 4, 4, 4, 4, 4])

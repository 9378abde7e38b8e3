"""The resume points of a version 3 file: its last labels, in a region that must never lose one (COW-83 to COW-85).

The region of four slots is not aligned, so one sector border may run through it, and then through a slot. A reader
believes as many slots as the header says, without those of more ops than the header has and those whose label does
not grow. Let the header have n ops, and L be the label in the last slot that it believes. A label is added so:

| step | action | a crash after it leaves |
| --- | --- | --- |
| 1 | ops and payloads, and the new region if it *fits*; flush | n ops, L |
| 2 | header with the new op count; flush | all ops, L, and the new label if its region fitted |
| 3 | else the region, one sector and one flush at a time | all ops, L, and at last the new label |
| 4 | the header's number of slots, if it became less; flush | the same |

A region fits when it leaves alone the slots that the header believes; or when it lies in one sector and still has L,
for then the old or the new one is there, and the new label has more ops than the header.

In step 3 the two sectors are written in turn, and the slot on their border first gets an op count that no file has, so
that nobody takes its halves for a label. L must not move into that slot: then one more of the old labels is dropped.
A label that is not above all others drops those that it is not above (COW-83): they are given up with the call.
"""

from typing import NamedTuple

from snapd.block.bio import SECTOR_BYTES
from snapd.cow.format import RESUME_POINT, RESUME_POINT_MAX, RESUME_POINT_SIZE

REGION_SIZE = RESUME_POINT_MAX * RESUME_POINT_SIZE
_COUNT_OFFSET = 8
"""Where in a slot the op count lies."""


class Point(NamedTuple):
    """A label and the number of ops before it (COW-51)."""

    label: int
    op_count: int


class ResumePoints:
    """The points as they are to be, beside the region at byte `start` as it is on disk.

    `believed` is how many of its slots the header on disk believes.
    """

    def __init__(self, start: int, region: bytes = b"", points: tuple[Point, ...] = (), *, believed: int = 0) -> None:
        self.start = start
        self.believed = believed
        self._on_disk = region.ljust(REGION_SIZE, b"\0")
        self._points = points
        border = -start % SECTOR_BYTES
        self._border = border if border < REGION_SIZE else 0

    def __len__(self) -> int:
        return len(self._points)

    def add(self, label: int, op_count: int) -> None:
        """Put a label behind those below it, and drop the oldest where there is no room."""
        points = (*(point for point in self._points if point.label < label), Point(label, op_count))
        self._points = points[-RESUME_POINT_MAX:]
        on_border = self._border // RESUME_POINT_SIZE
        if on_border and not self.fits and _slot(self._region, on_border) == self._last:
            self._points = self._points[1:]

    @property
    def fits(self) -> bool:
        """Whether the region may be written before the header."""
        believed = self.believed * RESUME_POINT_SIZE
        if self._region[:believed] == self._on_disk[:believed]:
            return True
        return not self._border and self._last in (_slot(self._region, i) for i in range(len(self)))

    def writes(self) -> list[bytes]:
        """The contents to give the region, each durable before the next; none where it is right already."""
        new, old = self._region, self._on_disk
        if new == old:
            return []
        if not self._border or self.fits:
            return [new]
        slot = self._border - self._border % RESUME_POINT_SIZE
        end = slot + RESUME_POINT_SIZE
        below = new[:slot] + old[slot:]
        # The bytes of the count behind the border; they are the high ones.
        high = max(self._border, slot + _COUNT_OFFSET)
        void = below[:high] + b"\xff" * (end - high) + below[end:]
        return [below, void, new[: self._border] + void[self._border :], new]

    def wrote(self) -> None:
        """All of `writes` are durable."""
        self._on_disk = self._region

    @property
    def _region(self) -> bytes:
        return b"".join(RESUME_POINT.pack(*point) for point in self._points).ljust(REGION_SIZE, b"\0")

    @property
    def _last(self) -> bytes:
        return _slot(self._on_disk, self.believed - 1)


def _slot(region: bytes, index: int) -> bytes:
    return region[index * RESUME_POINT_SIZE : (index + 1) * RESUME_POINT_SIZE]

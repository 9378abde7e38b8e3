"""The bio: one request to a block target, as the kernel's own unit of block I/O.

The operation numbers are those of the dm-user messages (DMU section 3), so that a bio and its message speak
of the same thing.
"""

from collections.abc import Callable
from enum import IntEnum

SECTOR_BYTES = 512
MAX_BIO_BYTES = 1 << 20
"""A device host cuts requests into bios of at most this size (DMU-182)."""


class BioOp(IntEnum):
    """What a bio asks for; the value is its dm-user request type."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    SECURE_ERASE = 4
    WRITE_SAME = 5
    WRITE_ZEROES = 6
    ZONE_OPEN = 7
    ZONE_CLOSE = 8
    ZONE_FINISH = 9
    ZONE_APPEND = 10
    ZONE_RESET = 11
    ZONE_RESET_ALL = 12


class Bio:
    """One request: `length` bytes from `sector` (512-byte units).

    `data` is where a READ's bytes go and where a WRITE's bytes are, or None when they lie in the memory that target
    and daemon share, from byte `place` on. `on_complete(bio, errno)` is called exactly once, with 0 or a positive errno
    number; `tag` is the submitter's own.
    """

    __slots__ = ("data", "flags", "length", "on_complete", "op", "place", "sector", "tag")

    def __init__(
        self,
        op: BioOp,
        sector: int,
        length: int,
        data: memoryview | None,
        on_complete: "Callable[[Bio, int], None]",
        flags: int = 0,
        place: int = -1,
        tag: int = 0,
    ) -> None:
        self.op = op
        self.sector = sector
        self.length = length
        self.data = data
        self.on_complete = on_complete
        self.flags = flags
        self.place = place
        self.tag = tag

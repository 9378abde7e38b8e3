"""The dm-user message: a 40-byte header both ways, then payload (DMU-5 to DMU-12).

    offset bytes field   request                  answer
    0      8     seq     number of the request    the same number
    8      8     type    `BioOp`                  `Answer`
    16     8     flags   `Flag`                   not looked at
    24     8     sector  first sector             not looked at
    32     8     len     bytes of the range       not looked at
    40     n     payload WRITE data               READ data, only after SUCCESS

Integers are little-endian here; the kernel uses the host's order, which is the same on every machine it serves.
Type values overlap between the two directions (DMU-9), so a header never says by itself which way it goes.
"""

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from snapd.block.bio import BioOp

HEADER = struct.Struct("<QQQQQ")
HEADER_BYTES = HEADER.size
SUSPECTS = 32
"""So many of the oldest requests of a dead daemon may have ended it: a worker goes in order and answers so many at once
at most. The others do not count as replayed, or a deep queue would not survive a few deaths in a row."""


class Answer(IntEnum):
    """The daemon's verdict on a request; any other code counts as ERROR (DMU-64 to DMU-67)."""

    SUCCESS = 0
    ERROR = 1
    UNSUPPORTED = 2


class Flag(IntFlag):
    """What may stand in a request's flags field; `admission` says who takes which of them."""

    FAILFAST_DEV = 0x00001
    FAILFAST_TRANSPORT = 0x00002
    FAILFAST_DRIVER = 0x00004
    SYNC = 0x00008
    META = 0x00010
    PRIO = 0x00020
    NOMERGE = 0x00040
    IDLE = 0x00080
    INTEGRITY = 0x00100
    FUA = 0x00200
    PREFLUSH = 0x00400
    RAHEAD = 0x00800
    BACKGROUND = 0x01000
    NOWAIT = 0x02000
    CGROUP_PUNT = 0x04000
    NOUNMAP = 0x08000
    HIPRI = 0x10000
    DRV = 0x20000
    SWAP = 0x40000


def is_flush(op: int, length: int, flags: int) -> bool:
    """A FLUSH, or the zero-length WRITE with PREFLUSH that device mapper sends instead (DMU-16)."""
    return op == BioOp.FLUSH or (op == BioOp.WRITE and not length and bool(flags & Flag.PREFLUSH))


class Request(NamedTuple):
    """A request header as the daemon reads it; `length` is in bytes, `sector` in 512-byte units.

    `op` is a plain number: a kernel newer than this list may send others.
    """

    seq: int
    op: int
    flags: int
    sector: int
    length: int

    def pack(self) -> bytes:
        """The 40 bytes on the wire."""
        return HEADER.pack(*self)

    @property
    def is_flush(self) -> bool:
        """Whether it asks for a flush, in either form (DMU-16)."""
        return is_flush(self.op, self.length, self.flags)

"""Admission: which bios a target takes at all, decided before one gets a message or a number (DMU-13 to DMU-23).

A profile is what one published form of the driver takes: `android` by default, `v1` for the first one. Less than that
is taken when operations are switched off (DMU-144, DMU-145). A hint may be dropped on the way in, where it would be
refused otherwise; FUA and PREFLUSH are promises, not hints, and are never dropped (DMU-23).
"""

import errno
from collections.abc import Iterable
from typing import NamedTuple

from snapd.block.bio import Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.message import Flag, is_flush

HINTS = int(Flag.RAHEAD | Flag.BACKGROUND | Flag.IDLE | Flag.PRIO | Flag.NOMERGE | Flag.HIPRI | Flag.CGROUP_PUNT)
_DURABILITY = int(Flag.FUA | Flag.PREFLUSH)
_ALL_FLAGS = (1 << len(Flag)) - 1


class Profile(NamedTuple):
    """What a target takes (`ops`, `flags`), and which operations whoever exports it may offer (`offered`)."""

    ops: frozenset[BioOp]
    offered: frozenset[BioOp]
    flags: int


# WRITE_SAME and ZONE_APPEND carry data that the protocol drops: no daemon could perform them (DMU-17).
_BLOCK_OPS = frozenset({op for op in BioOp if op <= BioOp.WRITE_ZEROES} - {BioOp.WRITE_SAME})
_ZONE_OPS = frozenset({BioOp.ZONE_OPEN, BioOp.ZONE_CLOSE, BioOp.ZONE_FINISH, BioOp.ZONE_RESET})

ANDROID = Profile(_BLOCK_OPS, _BLOCK_OPS, _ALL_FLAGS & ~int(Flag.CGROUP_PUNT | Flag.HIPRI | Flag.DRV | Flag.SWAP))
V1 = Profile(
    _BLOCK_OPS | _ZONE_OPS,
    # It tells nobody that it could flush and discard (DMU-15).
    (_BLOCK_OPS | _ZONE_OPS) - {BioOp.FLUSH, BioOp.DISCARD},
    _ALL_FLAGS & ~int(Flag.DRV | Flag.SWAP),
)
PROFILES = {"android": ANDROID, "v1": V1}


class Admission:
    """What one target takes: of `profile`, only `ops` where given, with `dropped_hints` left out of every request.

    `offered` is what an export of the target announces, neither more nor less (DMU-145). EINVAL for an operation that
    the profile has not, or for a flag to drop that is no hint.
    """

    def __init__(
        self, profile: Profile = ANDROID, *, ops: Iterable[BioOp] | None = None, dropped_hints: int = 0
    ) -> None:
        self.offered = profile.offered if ops is None else frozenset(ops)
        taken = profile.ops if ops is None else self.offered
        if beyond := taken - profile.ops:
            raise SnapdError(errno.EINVAL, f"no such operation to take: {', '.join(op.name for op in sorted(beyond))}")
        if dropped_hints & ~HINTS:
            raise SnapdError(errno.EINVAL, f"flags {dropped_hints & ~HINTS:#x} are not hints, they cannot be dropped")
        self._dropped_hints = dropped_hints
        self._flags = profile.flags
        if BioOp.FLUSH not in taken:
            # Who cannot flush can promise nothing about durability either.
            self._flags &= ~_DURABILITY
        self.op_bits = sum(1 << op for op in taken)
        """Bit `op` is set when the operation is taken; with `other_flags` the whole answer for nearly every bio."""
        self.other_flags = ~self._flags | dropped_hints
        """Any of these bits on a bio calls for `admit`."""

    def admit(self, bio: Bio) -> None:
        """Take the dropped hints out of the bio's flags; EOPNOTSUPP when it is not taken (DMU-13, DMU-18, DMU-21)."""
        flags = bio.flags & ~self._dropped_hints
        op = BioOp.FLUSH if is_flush(bio.op, bio.length, bio.flags) else bio.op
        if not self.op_bits >> op & 1 or flags & ~self._flags:
            raise SnapdError(errno.EOPNOTSUPP, f"{bio.op.name} with flags {bio.flags:#x} is not taken by this target")
        bio.flags = flags


ANDROID_ADMISSION = Admission()

"""A device-mapper table line of a dm-user target, as our constructor takes it (DMU-25, DMU-36, DMU-37, DMU-145).

    START SECTORS user START SECTORS NODE [OPTION=VALUE ...]

The kernel's driver takes exactly the three arguments behind `user`, and reads only the last. Options are ours alone:

    ops=read,write,...       the operations that are taken; more than the profile has is refused
    profile=android|v1       whose operations and flags (default android)
    drop=rahead,idle,...     hints to drop, where they would be refused or handed on
    compat_unsupported=io    the submitter sees an answer UNSUPPORTED as EIO
    lenient=1                the first two arguments may be anything
"""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass

from snapd.block.bio import BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.admission import ANDROID_ADMISSION, PROFILES, Admission
from snapd.dmuser.message import Flag

_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBER = re.compile(r"[0-9]{1,19}")
_OPTION = re.compile(r"([a-z_]+)=([a-z0-9_,]+)")
_FIXED = 6
"""Words of a line without options; the kernel takes no more."""


@dataclass(frozen=True, slots=True)
class TableLine:
    """One row: sectors [start, start + sectors) of a mapped device are the target behind the control node `node`.

    EINVAL for a node that is not 1 to 64 letters, digits and `._-` (DMU-36).
    """

    start_sector: int
    sectors: int
    node: str
    admission: Admission = ANDROID_ADMISSION
    unsupported_errno: int = errno.EOPNOTSUPP

    def __post_init__(self) -> None:
        if not _NODE.fullmatch(self.node) or self.node in (".", ".."):
            raise SnapdError(errno.EINVAL, f"control node {self.node!r}: not 1 to 64 of A-Z a-z 0-9 . _ - (DMU-36)")

    @classmethod
    def parse(cls, line: str) -> "TableLine":
        """EINVAL that names the word which is wrong."""
        words = line.split()
        if len(words) < _FIXED or words[2] != "user":
            raise _error(line, "is not START SECTORS user START SECTORS NODE")
        start, sectors = _number(line, words[0]), _number(line, words[1])
        if not sectors:
            raise _error(line, "has no sectors")
        options = _options(line, words[_FIXED:])
        if "lenient" not in options and [_number(line, word) for word in words[3:5]] != [start, sectors]:
            raise _error(line, f"repeats its start and length as {words[3]} {words[4]}")
        return cls(
            start,
            sectors,
            words[5],
            _admission(options),
            errno.EIO if "compat_unsupported" in options else errno.EOPNOTSUPP,
        )

    def __str__(self) -> str:
        """The line as every kernel takes it."""
        return f"{self.start_sector} {self.sectors} user {self.start_sector} {self.sectors} {self.node}"


def _error(line: str, what: str) -> SnapdError:
    return SnapdError(errno.EINVAL, f"table line {line!r} {what}")


def _number(line: str, word: str) -> int:
    if not _NUMBER.fullmatch(word):
        raise _error(line, f"has {word!r} where a number must be")
    return int(word)


def _options(line: str, words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None or match[1] not in _VALUES or not _VALUES[match[1]](match[2]):
            raise _error(line, f"has {word!r}, which is no option")
        if match[1] in options:
            raise _error(line, f"has {match[1]} twice")
        options[match[1]] = match[2]
    return options


def _are_names_of(names: type[BioOp] | type[Flag]) -> Callable[[str], bool]:
    return lambda value: all(name in names.__members__ for name in value.upper().split(","))


_VALUES: dict[str, Callable[[str], bool]] = {
    "ops": _are_names_of(BioOp),
    "profile": PROFILES.__contains__,
    "drop": _are_names_of(Flag),
    "compat_unsupported": ("io",).__contains__,
    "lenient": ("1",).__contains__,
}


def _admission(options: dict[str, str]) -> Admission:
    dropped = Flag(0)
    for name in options["drop"].upper().split(",") if "drop" in options else ():
        dropped |= Flag[name]
    ops = [BioOp[name] for name in options["ops"].upper().split(",")] if "ops" in options else None
    return Admission(PROFILES[options.get("profile", "android")], ops=ops, dropped_hints=int(dropped))

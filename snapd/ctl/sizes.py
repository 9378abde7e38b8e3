"""Sizes as people write them: `65536`, `64KiB`, `1.5GiB`; always powers of 1024."""

import errno
import re
from fractions import Fraction

from snapd.block.errors import SnapdError

_UNITS = ("", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(KiB|MiB|GiB|TiB|B|)")


def parse_size(text: str) -> int:
    """Bytes; EINVAL for anything but a number with an optional B, KiB, MiB, GiB or TiB."""
    match = _SIZE.fullmatch(text.strip())
    if match:
        size = Fraction(match[1]) * 1024 ** _UNITS.index(match[2].removesuffix("B") and match[2])
        if size.denominator == 1:
            return int(size)
    raise SnapdError(
        errno.EINVAL, f"{text!r} is not a size: expected a number of bytes, or one with KiB, MiB, GiB or TiB"
    )


def format_size(size_bytes: int) -> str:
    """`64 KiB`, `1.50 GiB`: at most two decimals, none where it is exact."""
    power = 0
    while power + 1 < len(_UNITS) and abs(size_bytes) >= 1024 ** (power + 1):
        power += 1
    scale = 1024**power
    number = str(size_bytes // scale) if size_bytes % scale == 0 else f"{size_bytes / scale:.2f}"
    return f"{number} {_UNITS[power] or 'bytes'}"

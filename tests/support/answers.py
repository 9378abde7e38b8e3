"""What a daemon answers, as bytes, for tests that play the daemon."""

from snapd.dmuser.message import HEADER


def pack_answer(seq: int, code: int) -> bytes:
    """An answer header; the fields nobody looks at are zero (DMU-8)."""
    return HEADER.pack(seq, code, 0, 0, 0)

"""Where a creation looks for the source bytes of XOR ops."""

from enum import StrEnum


class XorMode(StrEnum):
    """Where a target block may have the source bytes from which it differs little."""

    SAME = "same"
    """At its own place."""
    SEARCH = "search"
    """At its own place, or moved by any number of bytes."""
    NONE = "none"
    """Nowhere: no XOR ops."""

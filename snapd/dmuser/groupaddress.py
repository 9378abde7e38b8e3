"""How a connection offers a group at open (DMU-147): by the abstract address it binds itself to before it connects.

    NUL "dm-user-group/" GROUP "/" MEMBER

GROUP matches `[A-Za-z0-9._-]{1,32}`; MEMBER only makes the address one of its own, which the system demands. Nothing of
it is in the byte stream, so neither a target that knows no groups nor a daemon that offers none sees a difference.
"""

import os
import re

_PREFIX = b"\0dm-user-group/"
_ADDRESS = re.compile(re.escape(_PREFIX) + rb"([A-Za-z0-9._-]{1,32})/[A-Za-z0-9._-]{1,32}", re.DOTALL)


def new_address(group: str) -> bytes:
    """An address to bind a daemon's socket to, as one more member of `group`."""
    address = _PREFIX + group.encode() + b"/" + os.urandom(8).hex().encode()
    assert _ADDRESS.fullmatch(address), group
    return address


def group_of(address: str | bytes) -> str:
    """The group that a peer with this address offers; empty for every other address."""
    match = _ADDRESS.fullmatch(address) if isinstance(address, bytes) else None
    return match[1].decode() if match else ""

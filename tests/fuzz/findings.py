"""What counts as a finding: anything that is neither the right answer nor a refusal that says which rule was broken."""

import errno
import os
import re
from collections import Counter

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore

Outcome = Counter[tuple[str, str]]
"""How often a step (parse, map, read, ...) ended how: "accepted", or the statement that it was refused by."""
ACCEPTED = "accepted"
_MOST_WORDS = 1000
_STATEMENT = re.compile(r"\(((?:V|COW-|UNDO-)\d+)\)$")


class Finding(Exception):
    """Something that must not happen."""


def require(holds: bool, what: str) -> None:
    """A finding unless it holds."""
    if not holds:
        raise Finding(what)


def statement_of(error: SnapdError, *numbers: int) -> str:
    """The rule that a refusal names in its last words; a finding unless it names one and has one of these errnos."""
    require(error.errno in (numbers or (errno.EBADMSG,)), f"refused as {error.reason}: {error}")
    named = statement_in(str(error))
    require(named != "" and getattr(error, "statement", named) == named, f"refused without a statement: {error!r}")
    require(len(str(error)) < _MOST_WORDS, f"refused with too many words: {error}")
    return named


def statement_in(text: str) -> str:
    """The rule that the last words of a message name; empty without one."""
    named = _STATEMENT.search(text)
    return named[1] if named is not None else ""


def memory_file(content: bytes = b"") -> FileStore:
    """A file that no folder has; the caller closes its descriptor."""
    fd = os.memfd_create("fuzz")
    os.pwrite(fd, content, 0)
    return FileStore(fd, "fuzz")

"""A worker started by hand: paths instead of descriptors.

What an offline verb would check and lock is checked and locked here, then the process becomes one that has inherited
it all: the COW is parsed with numpy, which must not stay in the memory of a process that serves.
"""

import fcntl
import os
import sys

from snapd.block.file import file_store
from snapd.block.lock import open_locked
from snapd.proc.child import FIRST_FD
from snapd.worker.arguments import Arguments

_OUT_OF_THE_WAY = 256


def become_inheriting(arguments: Arguments) -> None:
    """Does not return. Errors: EBUSY for files in use or a merge that has begun; what `CowFile` refuses."""
    assert arguments.base is not None
    fds: dict[str, int] = {}
    if arguments.cow is None:
        fds["base"] = open_locked(arguments.base, writable=not arguments.read_only)
    else:
        fds["cow"] = open_locked(arguments.cow, writable=False)
        fds["base"] = open_locked(arguments.base, writable=False)
        fds["extent_map"] = _save_map(arguments.cow, arguments.base, fds["cow"], fds["base"])
    rest = ["--channel", str(arguments.channel), "--threads", str(arguments.threads)]
    if arguments.read_only:
        rest.append("--read-only")
    # Out of the way first: a target number may be one of the sources.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in fds.values()]
    for number, fd in enumerate(high, start=FIRST_FD):
        os.dup2(fd, number)
    os.execv(sys.executable, [sys.executable, "-I", "-m", "snapd.worker", "--inherited", ",".join(fds), *rest])


def _save_map(cow_path: str, base_path: str, cow_fd: int, base_fd: int) -> int:
    """A descriptor of the extent map's file form."""
    from snapd.cow.claim import check_unclaimed
    from snapd.cow.digests import load_digests
    from snapd.cow.history import holds_new_image
    from snapd.cow.parse.reader import CowFile

    payloads, base = file_store(cow_fd, cow_path), file_store(base_fd, base_path)
    cow = CowFile.parse(payloads)
    # Copies must be read from the old image, not from a base that a merge has begun to overwrite (UNDO-4).
    check_unclaimed(cow_path)
    merged = holds_new_image(cow, cow_path, payloads, base)
    fd = os.memfd_create("extent map", os.MFD_CLOEXEC)
    cow.extent_map(base.size(), merged=merged, digests=load_digests(cow_path, cow)).save(fd)
    return fd

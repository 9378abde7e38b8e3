"""Running a program of the system: exec'd, bounded in time, and never waited for in the event loop's place.

A tool that talks to the kernel about devices may hang in it, where not even SIGKILL ends it; then it is left to itself.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import Sequence

from snapd.block.errors import SnapdError
from snapd.manager.process import Watch

_MAX_OUTPUT_BYTES = 64 << 10


async def run_tool(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit code (128 + signal) and output, both streams together; ENOENT when there is no such program, ETIMEDOUT."""
    program = shutil.which(command[0])
    if program is None:
        raise SnapdError(errno.ENOENT, f"there is no program {command[0]}")
    # A file takes what a pipe would make the tool wait for.
    output_fd = os.memfd_create("tool")
    try:
        pid = os.posix_spawn(
            program,
            list(command),
            {**os.environ, "LC_ALL": "C"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output_fd, 1),
                (os.POSIX_SPAWN_DUP2, output_fd, 2),
            ],
            setsid=True,
            setsigmask=(),
        )
        watch = Watch(pid, os.pidfd_open(pid), child=True)
        try:
            code = await asyncio.wait_for(watch.exited(), timeout_s)
        except TimeoutError as error:
            watch.kill()
            raise SnapdError(errno.ETIMEDOUT, f"{' '.join(command)}: no end after {timeout_s:g} s") from error
        return code, os.pread(output_fd, _MAX_OUTPUT_BYTES, 0).decode(errors="replace").strip()
    except OSError as error:
        raise SnapdError.from_os(error, f"start {command[0]}") from error
    finally:
        os.close(output_fd)

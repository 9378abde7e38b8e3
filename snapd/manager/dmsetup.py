"""device-mapper through its own command, as far as a dm-user device needs it.

Every call is an exec'd child with a timeout. Neither the mapped device nor a node is ever opened or looked at from
here: a process that waits for itself cannot be killed (DMU-180).
"""

import asyncio
import errno
import os
from dataclasses import dataclass

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.manager.tool import run_tool

_TIMEOUT_S = 20.0
_SWAP_TIMEOUT_S = 60.0
"""A suspend waits for what is in flight, and a resume for the last answers of the old worker (DMU-174)."""
_REMOVE_TRIES = 20
_REMOVE_PAUSE_S = 0.1
# udev looks into a new device, and a device without its worker does not answer: nobody may wait for udev.
_UDEV = "--noudevsync"


@dataclass(frozen=True, slots=True)
class DmSettings:
    """The command, and the directories where the kernel's nodes and devices appear."""

    dmsetup: str = "dmsetup"
    node_directory: str = "/dev/dm-user"
    mapper_directory: str = "/dev/mapper"

    def node_path(self, node: str) -> str:
        """Where the worker of a target opens its node."""
        return os.path.join(self.node_directory, node)


class DmSetup:
    """The verbs, by device name; errors are `SnapdError` with what the command said."""

    def __init__(self, settings: DmSettings) -> None:
        self._command = settings.dmsetup

    async def has_dm_user(self) -> str:
        """Why there is no dm-user target to be had here; empty when there is."""
        try:
            code, said = await run_tool([self._command, "targets"], _TIMEOUT_S)
        except SnapdError as error:
            return str(error)
        if code:
            return f"{self._command} targets: {_last_line(said)}"
        if not any(line.split()[:1] == ["user"] for line in said.splitlines()):
            return "the kernel has no dm-user target"
        return ""

    async def exists(self, name: str) -> bool:
        """Whether there is a device of this name."""
        code, _ = await run_tool([self._command, "info", name], _TIMEOUT_S)
        return code == 0

    async def has_inactive_table(self, name: str) -> bool:
        """Whether a loaded table waits for its resume."""
        said = await self._run(["info", name, "--columns", "--noheadings", "-o", "tables_loaded"])
        return said in ("Both", "Inactive")

    async def create(self, name: str) -> None:
        """A device without a table: it serves nothing until the first `load` and `resume`."""
        await self._run(["create", name, "--notable", _UDEV])

    async def load(self, name: str, size_bytes: int, node: str, *, read_only: bool) -> None:
        """Have a second, inactive table, whose target appears as `node` at once (DMU-161, DMU-162)."""
        table = f"0 {size_bytes // SECTOR_BYTES} user 0 {size_bytes // SECTOR_BYTES} {node}"
        flags = ["--readonly"] if read_only else []
        await self._run(["load", name, *flags, "--table", table])

    async def suspend(self, name: str) -> None:
        """Hold new requests back and finish those in flight, through the table of now (SNAP-267)."""
        await self._run(["suspend", name], _SWAP_TIMEOUT_S)

    async def resume(self, name: str) -> None:
        """Make the inactive table the one of now, if there is one, and let requests through."""
        await self._run(["resume", name, _UDEV], _SWAP_TIMEOUT_S)

    async def clear(self, name: str) -> None:
        """Drop the inactive table."""
        await self._run(["clear", name])

    async def remove(self, name: str) -> None:
        """Remove a device and its targets; EBUSY when it stays in use (DMU-174)."""
        for attempt in range(_REMOVE_TRIES):
            try:
                await self._run(["remove", name, _UDEV])
                return
            except SnapdError as error:
                if error.errno != errno.EBUSY or attempt + 1 == _REMOVE_TRIES:
                    raise
            await asyncio.sleep(_REMOVE_PAUSE_S)

    async def _run(self, arguments: list[str], timeout_s: float = _TIMEOUT_S) -> str:
        code, said = await run_tool([self._command, *arguments], timeout_s)
        if code:
            number = errno.EBUSY if "busy" in said.lower() else errno.EIO
            raise SnapdError(number, f"dmsetup {arguments[0]} {arguments[1]}: {_last_line(said)}")
        return said


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line and line != "Command failed."]
    return lines[-1] if lines else "failed"

"""What a daemon leaves for its successor about a dm-user device: `dm.json` in the run directory.

A device has two places for a worker, each with a fence of its own, so that during a swap or a planned replacement the
new worker is there before the old one goes (DMU-171, SNAP-267). Never more than these two exist. Device-mapper itself
does not tell which node a table has (DMU-161), so it is written down before it is made. The file needs no flush: after
a power cut there is no device either.
"""

import json
import os
from dataclasses import asdict, dataclass, replace

from snapd.manager.paths import DevicePaths


@dataclass(frozen=True, slots=True)
class DmState:
    """`node` is served by the worker at `place` (0 or 1); `next_node` is not empty while the other place takes over.

    `next_node` equal to `node` is a planned replacement of the worker; any other is a swap of the table, and
    `is_loaded` says that it has an inactive table, or had one until the resume. `version` is that of the program the
    worker runs.
    """

    name: str
    node: str = ""
    place: int = 0
    next_node: str = ""
    is_loaded: bool = False
    version: str = ""

    def given_up(self) -> "DmState":
        """The state when the other place has not taken over, and will not."""
        return replace(self, next_node="", is_loaded=False)

    def taken_over(self, version: str) -> "DmState":
        """The state when the other place has taken over."""
        return replace(self, node=self.next_node, place=1 - self.place, next_node="", is_loaded=False, version=version)


def fence_path(paths: DevicePaths, place: int) -> str:
    """The fence of the worker at a place."""
    return (paths.worker_fence, paths.standby_fence)[place]


def write_state(paths: DevicePaths, state: DmState) -> None:
    """Replace the file as a whole."""
    temporary = f"{paths.dm_state}.new"
    with open(temporary, "w") as file:
        json.dump(asdict(state), file)
    os.replace(temporary, paths.dm_state)


def read_state(paths: DevicePaths) -> DmState | None:
    """What the former daemon wrote; None when it wrote nothing, or nothing of ours."""
    try:
        with open(paths.dm_state) as file:
            return DmState(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None

"""Releasing the way back of a snapshot whose update is confirmed (UNDO-10).

| step | action | a crash after it leaves | next start |
| --- | --- | --- | --- |
| 1 | the records say CONFIRMED, one transaction for all snapshots of the update | the decision | goes on with 2 |
| 2 | the state file says CONFIRMED | the same | goes on with 3 |
| 3 | `<COW>.merged` and the COW itself say that it is merged (COW-145): never again onto this base | the same | 4 |
| 4 | the claim beside the COW removed | the same | 5 |
| 5 | undo store, then state file, then directory removed | part of them | removes the rest |

Step 1 is the manager's. A device that is mapped needs nothing of this any more: every block of it is on the base.
"""

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.cow import claim
from snapd.cow.history import record_merge
from snapd.cow.parse.reader import CowFile
from snapd.manager.records import SnapshotRecord
from snapd.manager.resources import Resources
from snapd.merge.statefile import Phase, ReadBack, write_state
from snapd.merge.undodir import UndoDirectory


def release_undo(record: SnapshotRecord, resources: Resources, directory: Path) -> None:
    """Steps 2 to 5; blocks. EBUSY when the state file says that the merge is not over, with nothing changed."""
    files = UndoDirectory(resources.undo_fd)
    try:
        state = files.read_state()
        if state is not None and state.phase is not Phase.CONFIRMED:
            if state.phase is not Phase.MERGED or state.read_back is not ReadBack.OK:
                raise SnapdError(
                    errno.EBUSY, f"{directory}: the merge is {state.phase.name}, read-back {state.read_back.name}"
                )
            write_state(files.state, replace(state, phase=Phase.CONFIRMED))
        if state is not None:
            cow = file_store(resources.cow_fd, record.cow_path)
            record_merge(CowFile.parse(cow), record.cow_path, cow, state.old_digest, state.new_digest)
        claim.release(record.cow_path, UUID(record.uuid))
        files.remove()
    finally:
        files.close()
    for path in (directory, directory.parent):
        with contextlib.suppress(OSError):
            os.rmdir(path)

"""The merger process: `python -I -m snapd.merge --snapshot UUID`, one per merging snapshot, niced.

Descriptors: 3 control connection, 4 COW, 5 base, 6 extent map, 7 shared map, 8 undo directory, 9 fence lock.

Events on the control connection, one JSON object a packet: `progress` (done_bytes, total_bytes, phase "merge" or
"read_back"; at most ten a second, left out when the peer does not drain), then one of `merged` (MERGED and read
back, durable), `stopped` (on `{"verb": "stop"}` or when the connection closed, at the end of a span) or `failed`
(errno, message). A merge never waits for its peer, and may be killed at any moment: the next process continues.
Exit status: 1 after `failed`, else 0.
"""

import argparse
import contextlib
import os
import select
import socket
import sys
import uuid

from snapd.block.clock import Clock, SystemClock
from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.cow.image.extentmap import ExtentMap
from snapd.merge.engine import Merge
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, ReadBack
from snapd.merge.undodir import UndoDirectory
from snapd.merge.work import Hooks
from snapd.proc import control, fence

CONTROL_FD, COW_FD, BASE_FD, EXTENT_MAP_FD, SHARED_MAP_FD, UNDO_DIRECTORY_FD, FENCE_FD = range(3, 10)
NICENESS = 10
_PROGRESS_INTERVAL_MS = 100
_LAST_WORD_TIMEOUT_S = 5.0


class Reporter:
    """The merger's end of the control connection."""

    def __init__(self, connection: socket.socket, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._next_progress_ms = clock.now_ms()
        self._phase = ""
        connection.setblocking(False)

    def progress(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Tell how far it is, unless that was told just now."""
        now_ms = self._clock.now_ms()
        if now_ms < self._next_progress_ms and phase == self._phase:
            return
        self._next_progress_ms = now_ms + _PROGRESS_INTERVAL_MS
        self._phase = phase
        self._send({"event": "progress", "phase": phase, "done_bytes": done_bytes, "total_bytes": total_bytes})

    def should_stop(self) -> bool:
        """Whether the peer said so, or is gone."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while poll.poll(0):
            try:
                received = control.receive(self._connection)
            except (OSError, SnapdError):
                return True
            if received is None:
                return True
            message, fds = received
            for fd in fds:
                os.close(fd)
            if message.get("verb") == "stop":
                return True
        return False

    def last_word(self, message: control.Message) -> None:
        """Tell how it ended; waits a little for a peer that is slow."""
        self._connection.settimeout(_LAST_WORD_TIMEOUT_S)
        self._send(message)

    def _send(self, message: control.Message) -> None:
        # The state file is the truth; a peer that misses an event reads it there.
        with contextlib.suppress(OSError):
            control.send(self._connection, message)


def merge(snapshot: uuid.UUID, reporter: Reporter) -> control.Message:
    """Run the merge to its end, or to where it was stopped; what to say of it."""
    extent_map = ExtentMap.load(EXTENT_MAP_FD)
    shared = SharedMap(SHARED_MAP_FD, writable=True)
    files = UndoDirectory(UNDO_DIRECTORY_FD)
    state = Merge(
        snapshot=snapshot,
        extent_map=extent_map,
        cow=file_store(COW_FD, "COW"),
        base=file_store(BASE_FD, "base"),
        files=files,
        shared=shared,
        hooks=Hooks(progress=reporter.progress, should_stop=reporter.should_stop),
    ).run()
    finished = state.phase is Phase.CONFIRMED or (state.phase is Phase.MERGED and state.read_back is ReadBack.OK)
    return {"event": "merged" if finished else "stopped"}


def main() -> int:
    os.nice(NICENESS)
    # Before anything is touched: a predecessor's late write would land on ours.
    fence.hold(FENCE_FD)
    parser = argparse.ArgumentParser(prog="snapd.merge")
    parser.add_argument("--snapshot", type=uuid.UUID, required=True)
    arguments = parser.parse_args()
    reporter = Reporter(socket.socket(fileno=CONTROL_FD), SystemClock())
    # Whoever started us may have been replaced while we waited for the fence, and with it the order to merge.
    if reporter.should_stop():
        return 0
    try:
        reporter.last_word(merge(arguments.snapshot, reporter))
    except SnapdError as error:
        reporter.last_word({"event": "failed", "errno": error.errno, "message": str(error)})
        print(f"merger: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

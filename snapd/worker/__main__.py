"""`python -I -m snapd.worker`: serve the new view of one snapshot on one channel.

Inherited descriptors: 3 channel, 4 COW, 5 base, 6 extent map, 7 shared map, 8 undo directory, 9 fence. Exits 0 when the
channel ends.
"""

import sys

from snapd.block.clock import SystemClock
from snapd.block.errors import SnapdError
from snapd.block.file import file_store
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.dmuser.client import ChannelClient
from snapd.merge.oldview import OldView
from snapd.merge.sharedmap import SharedMap
from snapd.proc import fence
from snapd.proc.child import FIRST_FD
from snapd.proc.log import Log
from snapd.worker.serve import ReadService

CHANNEL_FD, COW_FD, BASE_FD, EXTENT_MAP_FD, SHARED_MAP_FD, UNDO_DIRECTORY_FD, FENCE_FD = range(FIRST_FD, FIRST_FD + 7)


def main() -> int:
    # Before anything is read or answered: a predecessor that still lives could answer too (DMU-185).
    fence.hold(FENCE_FD)
    log = Log("ota-snapd worker", SystemClock())
    try:
        extent_map = ExtentMap.load(EXTENT_MAP_FD)
        base = file_store(BASE_FD, "the base")
        old_view = OldView(base, UNDO_DIRECTORY_FD, SharedMap(SHARED_MAP_FD), extent_map)
        view = CowView(extent_map, file_store(COW_FD, "the COW"), source=old_view, base=base)
        ReadService(ChannelClient(CHANNEL_FD), view, log).run()
    except SnapdError as error:
        log.line(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

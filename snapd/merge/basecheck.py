"""Whether a base is the one that earlier work was done on; somebody named it, which proves nothing.

Nothing here writes. Both checks are exact for the blocks that the work has touched and say nothing about the others,
which no merge has read or written for good.
"""

import errno
from dataclasses import replace

import numpy as np

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.block.store import Store, read_bytes
from snapd.cow.image.extentmap import ExtentMap
from snapd.merge.engine import PIECE_BYTES
from snapd.merge.statefile import Phase, ReadBack, State
from snapd.merge.targets import Targets
from snapd.merge.undodir import UndoFiles
from snapd.merge.views import open_views


def check_begun_base(state: State, extent_map: ExtentMap, cow: Store, base: Store, files: UndoFiles) -> None:
    """EINVAL unless `base` is where the merge that `state` and the undo store speak of was begun.

    A block that is done reads as N. Any other block of T has, sector by sector, old or new content: more than that
    no stop leaves (UNDO-27).
    """
    if not state.old_size_bytes <= base.size() <= max(state.old_size_bytes, state.new_size_bytes):
        raise SnapdError(
            errno.EINVAL, f"base: {base.size()} bytes; the merge was begun on one of {state.old_size_bytes} (UNDO-23)"
        )
    # The undo store outlives CONFIRMED until the COW is marked, so that this check can still be made.
    phase = Phase.MERGED if state.phase is Phase.CONFIRMED else state.phase
    views = open_views(replace(state, phase=phase), extent_map, cow, base, files)
    done_block = 0
    if phase is Phase.MERGING or (phase is Phase.MERGED and state.read_back is not ReadBack.FAILED):
        done_block = state.next_block
    block_size = extent_map.block_size
    targets = Targets(extent_map, PIECE_BYTES)
    for piece in targets.pieces(0):
        start, end = piece.start * block_size, piece.end * block_size
        # What lies behind O has no old content; it is known once it is done.
        old_end = max(start, min(end, state.old_size_bytes))
        found_end = max(start, min(end, base.size()))
        found, old, new = (
            np.frombuffer(side.ljust(end - start, b"\0"), dtype=np.uint64).reshape(piece.length, -1, SECTOR_BYTES // 8)
            for side in (
                read_bytes(base, start, found_end - start),
                read_bytes(views.old, start, old_end - start),
                read_bytes(views.new, start, end - start),
            )
        )
        not_new = (found != new).any(axis=2)
        wrong = (not_new & (found != old).any(axis=2)).any(axis=1)
        wrong[old_end // block_size - piece.start :] = False
        done = max(0, min(piece.end, done_block) - piece.start)
        wrong[:done] = not_new[:done].any(axis=1)
        wrong &= targets.mask(piece)
        if wrong.any():
            block = piece.start + int(wrong.argmax())
            raise SnapdError(
                errno.EINVAL, f"base: block {block} has neither its old nor its new content, is this the right base?"
            )

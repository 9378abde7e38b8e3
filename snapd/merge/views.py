"""Both views of a reversible snapshot as they follow from what is stored, whatever state it is in (UNDO-3 to UNDO-5).

For whoever looks at a snapshot without a merger running: nothing here writes.
"""

import errno
from dataclasses import dataclass

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, Store
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.merge.oldview import OldImage
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, ReadBack, State, read_state
from snapd.merge.undodir import UndoFiles
from snapd.merge.undostore import UndoStore


@dataclass(frozen=True, slots=True)
class Views:
    """`old` reads O and `new` reads N; `undo` is None while no undo store is needed."""

    undo: UndoStore | None
    old: Readable
    new: Readable


def open_views(state: State | None, extent_map: ExtentMap, cow: Store, base: Store, files: UndoFiles) -> Views:
    """The views of a snapshot in `state` that nobody is merging right now.

    After CONFIRMED there is no old view: `old` reads the base too. Errors: EBADMSG for a state file or an undo store
    that is damaged, missing or belongs to something else.
    """
    if state is not None and state.phase is Phase.CONFIRMED:
        return Views(None, base, base)
    undo = open_undo(state, extent_map, files)
    if undo is None:
        return Views(None, base, CowView(extent_map, cow, source=base, base=base))
    count, opened = undo.op_count, undo
    old = OldImage(base, lambda: count, lambda: opened)
    return Views(undo, old, CowView(extent_map, cow, source=old, base=base))


def open_undo(state: State | None, extent_map: ExtentMap, files: UndoFiles) -> UndoStore | None:
    """The undo store that `state` speaks of, wholly loaded; None in a state that needs none."""
    if state is None or not state.needs_undo:
        return None
    undo = UndoStore(*files.open_undo(), extent_map)
    check_undo(state, extent_map, undo)
    undo.load(undo.header.op_count)
    return undo


def check_undo(state: State, extent_map: ExtentMap, undo: UndoStore) -> None:
    """EBADMSG unless `undo` is the store of this state and COW, and has all ops that it must have (UNDO-12a)."""
    identity = undo.identity
    if identity.ops_digest != extent_map.ops_digest:
        raise SnapdError(errno.EBADMSG, "undo store: made for another COW, its op digest differs (UNDO-15)")
    if (identity.snapshot, identity.generation) != (state.snapshot, state.undo_generation):
        raise SnapdError(errno.EBADMSG, "undo store: belongs to another snapshot or generation (UNDO-14)")
    if identity.old_size_bytes != state.old_size_bytes:
        raise SnapdError(
            errno.EBADMSG,
            f"undo store: the old image has {identity.old_size_bytes} bytes there, {state.old_size_bytes} in the state",
        )
    if undo.header.op_count < state.undo_op_count:
        raise SnapdError(
            errno.EBADMSG,
            f"undo store: {undo.header.op_count} ops, {state.undo_op_count} were durable (UNDO-12a)",
        )


def restore_shared_map(shared: SharedMap, extent_map: ExtentMap, files: UndoFiles) -> None:
    """Publish in a fresh shared map what the disk says; before any reader is given the map.

    Nothing needs to be flushed for this: an op that the header counts can be read, durable or not.
    """
    state = read_state(files.state)
    undo = open_undo(state, extent_map, files)
    if state is not None:
        publish_state(shared, state, 0 if undo is None else undo.op_count)


def publish_state(shared: SharedMap, state: State, undo_op_count: int) -> None:
    """Make `shared` say what `state` and the undo store say: first what is saved, then what is merged."""
    # Where no undo store is needed the count stays: readers may know the ops of one that is gone, and a new store's
    # count would mean other ops to them.
    if state.needs_undo:
        shared.publish(undo_op_count)
    if state.phase in (Phase.MERGED, Phase.CONFIRMED) and state.read_back is not ReadBack.FAILED:
        shared.mark_merged(0, shared.block_count)
    elif state.phase is Phase.MERGING:
        shared.mark_merged(0, state.next_block)
    else:
        shared.withdraw()

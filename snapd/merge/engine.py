"""The reversible merge: overwrite the base with N, and be able to turn round at any instant (UNDO-1 to UNDO-6).

Work goes in ascending order of target block, in *spans* of 8 to 64 MiB that are streamed in pieces of at most 4 MiB.
A span (UNDO-12), for a merge:

| step | action | what is durable after it | a crash before the next step leaves | the next start |
| --- | --- | --- | --- | --- |
| a | append O of the span's changed blocks that U lacks | – | stale bytes behind what counts in U | overwrites them |
| b | flush U and its table | these bytes | the same | the same |
| c | U's header with the new op count, flushed | U has the span | old view reads it from U | repeats the span |
| c' | publish the op count | – | | publishes what the disk says |
| d | compute N (sources through the old view), write it | – | a mixed span; both views exact | repeats the span |
| e | flush the base | N of the span | the same | repeats the span, same result |
| f | progress record | the span is done | | goes on behind it |

A rollback has only d, e and f, and d writes U's content. A change of direction first writes a record of a new
generation with `next_block` 0 (UNDO-12a). Every start rewrites the state record and U's header and flushes U, its
table, C, the base and the state: what a start can read need not be durable (UNDO-24), and a flush that failed is never
simply repeated (UNDO-30). A failed flush ends the run; nothing is done behind it.

A block is *changed* if N differs from the old view; only those are saved and written (UNDO-2). Trace points are
reached right before the step they name.
"""

import errno
import uuid
from dataclasses import replace

import numpy as np

from snapd.block.errors import SnapdError
from snapd.block.file import BlockDeviceStore
from snapd.block.store import Store
from snapd.cow.format import SOURCE_LIMIT, OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.merge.backward import roll_back_spans
from snapd.merge.forward import merge_spans
from snapd.merge.readback import read_back
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import Phase, ReadBack, State, read_state, write_state
from snapd.merge.undodir import UndoFiles
from snapd.merge.undostore import UndoStore
from snapd.merge.undotable import UndoIdentity
from snapd.merge.undowriter import UndoWriter
from snapd.merge.views import check_undo, publish_state
from snapd.merge.work import Hooks, Work

MIN_SPAN_BYTES = 8 << 20
MAX_SPAN_BYTES = 64 << 20
_SPANS_AT_LEAST = 8
PIECE_BYTES = 4 << 20
_NO_HOOKS = Hooks()


class Merge:
    """One snapshot's merge and its undoing, over stores; one run at a time.

    `extent_map` is C's map over O's size, `shared` a map that readers of this merge share. A run that is asked to stop
    returns early and another one continues. Both directions may be repeated, interrupted and turned round in any
    order and converge.

    Errors: EBADMSG for damage, ENOSPC, EBUSY for a step that the state does not allow, else what a store raises.
    After an error the stores are as after a crash: both views stay exact, a new `Merge` continues.
    """

    def __init__(
        self,
        *,
        snapshot: uuid.UUID,
        extent_map: ExtentMap,
        cow: Store,
        base: Store,
        files: UndoFiles,
        shared: SharedMap,
        hooks: Hooks = _NO_HOOKS,
        span_bytes: int | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._snapshot = snapshot
        self._map = extent_map
        self._cow = cow
        self._base = base
        self._files = files
        self._shared = shared
        self._work = Work(
            extent_map=extent_map,
            cow=cow,
            base=base,
            state_store=files.state,
            shared=shared,
            hooks=hooks,
            span_bytes=span_bytes or _span_bytes(extent_map.changed_blocks() * extent_map.block_size),
            piece_bytes=piece_bytes,
        )

    @property
    def written_bytes(self) -> int:
        """What this object has written to the base."""
        return self._work.written_bytes

    def run(self) -> State:
        """Merge from any state but CONFIRMED (which is left alone) to MERGED and read back (UNDO-8).

        Returns the durable state: MERGING, or MERGED with the read-back pending, when asked to stop.
        """
        state = self._take_over()
        if state is None or state.phase is Phase.ROLLED_BACK:
            state = self._begin(state)
        elif state.phase is Phase.ROLLING_BACK or state.read_back is ReadBack.FAILED:
            state = self._turn(state, Phase.MERGING)
        if state.phase is Phase.MERGING:
            self._grow_base(state)
            state = merge_spans(self._work, state)
        if state.phase is Phase.MERGED and state.read_back is not ReadBack.OK:
            state = read_back(self._work, state)
        return state

    def rollback(self) -> State:
        """Put O back from any state but CONFIRMED (EBUSY) to ROLLED_BACK, read back (UNDO-14).

        Returns ROLLING_BACK when asked to stop. EINVAL when no merge has begun. The undo store is not deleted here.
        """
        state = self._take_over()
        if state is None:
            raise SnapdError(errno.EINVAL, "rollback: no merge has begun")
        if state.phase is Phase.CONFIRMED:
            raise SnapdError(errno.EBUSY, "rollback: the update is confirmed, its undo store is released")
        if state.phase is Phase.ROLLED_BACK:
            return state
        if state.phase is not Phase.ROLLING_BACK:
            state = self._turn(state, Phase.ROLLING_BACK)
        return roll_back_spans(self._work, state)

    def confirm(self) -> State:
        """Make the merge final: state CONFIRMED, durable. EBUSY unless merged and read back (UNDO-9)."""
        state = self._take_over()
        if state is not None and state.phase is Phase.CONFIRMED:
            return state
        if state is None or state.phase is not Phase.MERGED or state.read_back is not ReadBack.OK:
            raise SnapdError(errno.EBUSY, "confirm: the new image is not merged and read back yet (UNDO-9)")
        return self._work.put("confirm", replace(state, phase=Phase.CONFIRMED))

    def _take_over(self) -> State | None:
        """Make durable whatever an earlier process left readable, then publish what the disk says (UNDO-24)."""
        self._work.hooks.trace("take over")
        state = read_state(self._files.state)
        if state is not None and state.snapshot != self._snapshot:
            raise SnapdError(errno.EBADMSG, f"merge state: belongs to snapshot {state.snapshot} (UNDO-29)")
        if state is not None and state.needs_undo:
            if state.new_size_bytes != self._work.new_size:
                raise SnapdError(
                    errno.EBADMSG,
                    f"merge state: the new image has {state.new_size_bytes} bytes there, not {self._work.new_size}",
                )
            store, table = self._files.open_undo()
            # Before anything is written: a store that is not ours stays as it is.
            check_undo(state, self._map, UndoStore(store, table, self._map))
            self._work.undo = UndoWriter(store, table, self._map)
        self._cow.flush()
        self._base.flush()
        if state is not None:
            write_state(self._files.state, state)
            publish_state(self._shared, state, self._work.undo.op_count if state.needs_undo else 0)
        return state

    def _begin(self, prior: State | None) -> State:
        """A new undo store, durable before the state says MERGING (UNDO-10)."""
        old_size = self._base.size() if prior is None else prior.old_size_bytes
        self._check_sizes(old_size)
        if self._shared.undo_op_count:
            raise SnapdError(errno.EBUSY, "merge: the shared map is of an earlier merge")
        generation = 1 if prior is None else prior.generation + 1
        self._work.hooks.trace("begin")
        store, table = self._files.create_undo()
        identity = UndoIdentity(self._snapshot, generation, self._map.ops_digest, old_size)
        self._work.undo = UndoWriter.create(store, table, identity, self._map)
        self._files.sync()
        state = State(
            snapshot=self._snapshot,
            generation=generation,
            undo_generation=generation,
            phase=Phase.MERGING,
            next_block=0,
            undo_op_count=0,
            old_size_bytes=old_size,
            new_size_bytes=self._work.new_size,
        )
        return self._work.put("merging", state)

    def _turn(self, state: State, phase: Phase) -> State:
        """Change direction, durably, before the first base write in it (UNDO-12a)."""
        self._shared.withdraw()
        turned = replace(
            state,
            generation=state.generation + 1,
            phase=phase,
            next_block=0,
            undo_op_count=self._work.undo.op_count,
            read_back=ReadBack.PENDING,
        )
        return self._work.put("turn", turned)

    def _check_sizes(self, old_size: int) -> None:
        """No copy from behind O, an op for every block behind O, and room for N (UNDO-23)."""
        block_size = self._map.block_size
        if old_size % block_size or self._base.size() < old_size:
            raise SnapdError(errno.EINVAL, f"base: {self._base.size()} bytes, the old image has {old_size} (UNDO-23)")
        if isinstance(self._base, BlockDeviceStore) and self._base.size() < self._work.new_size:
            raise SnapdError(
                errno.ENOSPC, f"base: a device of {self._base.size()} bytes, the new image has {self._work.new_size}"
            )
        old_blocks, new_blocks = old_size // block_size, self._map.block_count
        info = np.frombuffer(self._map.records, dtype="<u8")[1::2]
        for kind, unit, limit in ((OpType.COPY, "block", old_blocks), (OpType.XOR, "byte", old_size - block_size + 1)):
            read = info[info >> np.uint64(60) == kind] & np.uint64(SOURCE_LIMIT - 1)
            if read.size and int(read.max()) >= limit:
                raise SnapdError(
                    errno.EINVAL,
                    f"COW: a {kind.name} op reads {unit} {read.max()}, the old image has {old_blocks} blocks (UNDO-23)",
                )
        if self._work.targets.count(old_blocks, new_blocks) < new_blocks - old_blocks:
            raise SnapdError(errno.EINVAL, "COW: a block behind the old image has no op (UNDO-23)")

    def _grow_base(self, state: State) -> None:
        """Both sizes are durable by now, so the base may become as long as N (UNDO-23)."""
        if self._base.size() >= state.new_size_bytes:
            return
        self._work.hooks.trace("grow")
        block_size = self._map.block_size
        self._base.zero(state.new_size_bytes - block_size, block_size)
        self._base.flush()


def _span_bytes(changed_bytes: int) -> int:
    """As long as a flush is worth, but so that also a small merge has some progress to show and to resume from."""
    return min(max(changed_bytes // _SPANS_AT_LEAST, MIN_SPAN_BYTES), MAX_SPAN_BYTES)

"""The span loop of a merge: steps a to f of UNDO-12 (the table is in `engine`).

Two passes over a span: the first saves, the second computes N again and writes. So memory holds one piece, never a
span, and N's copy sources are read after their old content is safe.
"""

from dataclasses import replace

import numpy as np

from snapd.block.extent import Extent
from snapd.merge.statefile import Phase, State
from snapd.merge.targets import true_runs
from snapd.merge.work import Mask, UpTo, Work, differing


def merge_spans(work: Work, state: State) -> State:
    """From `state.next_block` to MERGED, or to where the run is asked to stop."""
    end = work.new_size // work.block_size
    done, total = work.target_bytes(0, state.next_block), work.target_bytes(0, end)
    work.hooks.progress("merge", done, total)
    for span in work.spans(state.next_block):
        state = _merge_span(work, state, span)
        done += sum(work.target_bytes(piece.start, piece.end) for piece in span)
        work.hooks.progress("merge", done, total)
        if work.hooks.should_stop():
            return state
    return work.put("merged", replace(state, phase=Phase.MERGED, next_block=end))


def _merge_span(work: Work, state: State, span: list[Extent]) -> State:
    trace, undo = work.hooks.trace, work.undo
    trace("a")
    changes = [(piece, _save(work, piece, state.old_size_bytes)) for piece in span]
    if undo.has_pending:
        trace("b")
        undo.flush()
        trace("c")
        undo.commit()
        trace("c'")
        work.shared.publish(undo.op_count)
    trace("d")
    for piece, changed in changes:
        _write_new(work, piece, changed)
    trace("e")
    work.base.flush()
    first, end = span[0].start, span[-1].end
    state = work.put("f", replace(state, next_block=end, undo_op_count=undo.op_count))
    work.shared.mark_merged(first, end - first)
    return state


def _save(work: Work, piece: Extent, old_size: int) -> Mask:
    """Step a of one piece: append what U lacks of its changed blocks; which blocks are changed (UNDO-2)."""
    old, new = work.read_two(piece, UpTo(work.old, old_size), work.new)
    changed = differing(old, new, piece.length)
    # What lies behind O has no old content to compare with, or to save.
    inside = max(0, min(piece.end, old_size // work.block_size) - piece.start)
    changed[inside:] = True
    changed &= work.targets.mask(piece)
    index = work.undo.index
    for run in true_runs(changed[:inside]):
        block, end = piece.start + run.start, piece.start + run.end
        while (block := index.next_lacking(block, end)) < end:
            stop = index.next_saved(block, end)
            first, last = ((b - piece.start) * work.block_size for b in (block, stop))
            work.undo.append(block, old[first:last])
            block = stop
    return changed


def _write_new(work: Work, piece: Extent, changed: Mask) -> None:
    """Step d of one piece."""
    if not np.any(changed):
        return
    new = work.read_one(piece, work.new)
    for run in true_runs(changed):
        work.write_base(new[run.start * work.block_size : run.end * work.block_size], piece.start + run.start)

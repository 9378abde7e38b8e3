"""The span loop of a rollback: U's content back to the base, in ascending order (UNDO-14; the table is in `engine`)."""

from collections.abc import Iterator
from dataclasses import replace

from snapd.block.extent import Extent
from snapd.merge.readback import check_piece
from snapd.merge.statefile import Phase, State
from snapd.merge.work import Work


def roll_back_spans(work: Work, state: State) -> State:
    """From `state.next_block` to ROLLED_BACK and read back, or to where the run is asked to stop."""
    index, hooks = work.undo.index, work.hooks
    total = index.saved_blocks() * work.block_size
    done = span_blocks = 0
    for piece in _saved_pieces(work):
        done += piece.length * work.block_size
        if piece.end <= state.next_block:
            continue
        hooks.trace("d")
        work.write_base(work.read_one(piece, index), piece.start)
        span_blocks += piece.length
        if span_blocks >= work.span_blocks:
            state = _end_span(work, state, piece.end)
            span_blocks = 0
            hooks.progress("rollback", done, total)
            if hooks.should_stop():
                return state
    state = _end_span(work, state, index.size // work.block_size)
    hooks.progress("rollback", total, total)
    hooks.trace("read back")
    work.drop_cached_base()
    for piece in _saved_pieces(work):
        check_piece(work, piece, index)
    return work.put("rolled back", replace(state, phase=Phase.ROLLED_BACK))


def _end_span(work: Work, state: State, next_block: int) -> State:
    work.hooks.trace("e")
    work.base.flush()
    return work.put("f", replace(state, next_block=next_block))


def _saved_pieces(work: Work) -> Iterator[Extent]:
    """The runs of blocks that U has, in pieces."""
    index = work.undo.index
    block, blocks = 0, index.size // work.block_size
    while (block := index.next_saved(block, blocks)) < blocks:
        end = index.next_lacking(block, min(blocks, block + work.piece_blocks))
        yield Extent(block, end - block)
        block = end

"""The read-back: what the disk has, compared with what was written, before anybody may confirm it (UNDO-9)."""

import errno
from dataclasses import replace

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.block.store import Readable
from snapd.merge.statefile import ReadBack, State
from snapd.merge.targets import true_runs
from snapd.merge.work import UpTo, Work, differing


def read_back(work: Work, state: State) -> State:
    """Compare all of T on the base with N and record the result durably, bound to the generation of `state`.

    The record then also has the digests by which a base is known for the old or the new image later. Returns with
    the result still pending when asked to stop. A difference is recorded, the merged marks are withdrawn, and EIO
    names the block.
    """
    work.hooks.trace("read back")
    old_digest, new_digest = xxhash.xxh3_128(), xxhash.xxh3_128()
    old = UpTo(work.old, state.old_size_bytes)
    done, total = 0, work.target_bytes(0, work.new_size // work.block_size)
    work.drop_cached_base()
    for span in work.spans(0):
        for piece in span:
            try:
                check_piece(work, piece, work.new)
            except SnapdError:
                work.shared.withdraw()
                work.put("read back failed", replace(state, read_back=ReadBack.FAILED))
                raise
            for digest, image in ((new_digest, work.base), (old_digest, old)):
                content = work.read_one(piece, image)
                for run in true_runs(work.targets.mask(piece)):
                    digest.update(content[run.start * work.block_size : run.end * work.block_size])
            done += work.target_bytes(piece.start, piece.end)
        work.hooks.progress("read_back", done, total)
        if work.hooks.should_stop():
            return state
    known = replace(state, read_back=ReadBack.OK, old_digest=old_digest.digest(), new_digest=new_digest.digest())
    return work.put("read back ok", known)


def check_piece(work: Work, piece: Extent, wanted: Readable) -> None:
    """EIO unless the base has what `wanted` has."""
    different = differing(*work.read_two(piece, work.base, wanted), piece.length)
    if different.any():
        block = piece.start + int(different.argmax())
        raise SnapdError(errno.EIO, f"read-back: block {block} of the base is not what was written (UNDO-9)")

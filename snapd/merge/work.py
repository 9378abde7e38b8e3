"""What one run of a merge or a rollback works on: the stores, both views, and two buffers of one piece.

All memory that a run needs for block data is here, whatever the size of the images.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snapd.block.extent import Extent
from snapd.block.file import FileStore
from snapd.block.store import Readable, Store, WritableBuffer
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.merge.oldview import OldImage
from snapd.merge.sharedmap import SharedMap
from snapd.merge.statefile import State, write_state
from snapd.merge.targets import Targets
from snapd.merge.undowriter import UndoWriter

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """How a run is watched and held.

    `progress` gets (phase, bytes done, bytes in all), the phase being "merge", "read_back" or "rollback";
    `should_stop` is asked after every span; `trace` gets the name of a step right before it is done.
    """

    progress: Callable[[str, int, int], None] = lambda _phase, _done, _total: None
    should_stop: Callable[[], bool] = lambda: False
    trace: Callable[[str], None] = lambda _name: None


class Work:
    """One run's material. `undo` is set once the run knows its undo store."""

    undo: UndoWriter

    def __init__(
        self,
        *,
        extent_map: ExtentMap,
        cow: Store,
        base: Store,
        state_store: Store,
        shared: SharedMap,
        hooks: Hooks,
        span_bytes: int,
        piece_bytes: int,
    ) -> None:
        self.block_size = extent_map.block_size
        self.new_size = extent_map.block_count * extent_map.block_size
        self.base = base
        self.shared = shared
        self.hooks = hooks
        self.targets = Targets(extent_map, piece_bytes)
        self.piece_blocks = max(1, piece_bytes // self.block_size)
        self.span_blocks = max(1, span_bytes // self.block_size)
        self.written_bytes = 0
        self.old = OldImage(base, lambda: shared.undo_op_count, lambda: self.undo.index)
        # Asked for a block without an op only where a piece runs over a short gap; the old view has those too.
        self.new = CowView(extent_map, cow, source=self.old, base=self.old)
        self._state_store = state_store
        self._buffers = [memoryview(bytearray(self.piece_blocks * self.block_size)) for _ in range(2)]

    def read_two(self, piece: Extent, first: Readable, second: Readable) -> tuple[memoryview, memoryview]:
        """One piece of two images; valid until the next read."""
        length = piece.length * self.block_size
        one, two = (buffer[:length] for buffer in self._buffers)
        first.read_into(one, piece.start * self.block_size)
        second.read_into(two, piece.start * self.block_size)
        return one, two

    def read_one(self, piece: Extent, image: Readable) -> memoryview:
        """One piece of one image; valid until the next read."""
        content = self._buffers[0][: piece.length * self.block_size]
        image.read_into(content, piece.start * self.block_size)
        return content

    def write_base(self, content: memoryview, block: int) -> None:
        """Step d: whole blocks from `block` on."""
        self.base.write(content, block * self.block_size)
        self.written_bytes += len(content)

    def put(self, step: str, state: State) -> State:
        """Make `state` durable, as the step of this name."""
        self.hooks.trace(step)
        write_state(self._state_store, state)
        return state

    def target_bytes(self, start: int, end: int) -> int:
        """Bytes of T in blocks [start, end)."""
        return self.targets.count(start, end) * self.block_size

    def spans(self, block: int) -> Iterator[list[Extent]]:
        """T from `block` on in spans: lists of pieces, together at most a span long."""
        span: list[Extent] = []
        blocks = 0
        for piece in self.targets.pieces(block):
            if span and blocks + piece.length > self.span_blocks:
                yield span
                span, blocks = [], 0
            span.append(piece)
            blocks += piece.length
        if span:
            yield span

    def drop_cached_base(self) -> None:
        """Let the next reads come from the disk: after a flush all cached pages are clean and can go."""
        if isinstance(self.base, FileStore):
            os.posix_fadvise(self.base.fd, 0, 0, os.POSIX_FADV_DONTNEED)


class UpTo:
    """An image that has zeros from byte `end` on: O, where N is larger."""

    def __init__(self, image: Readable, end: int) -> None:
        self._image = image
        self._end = end

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        out = memoryview(buffer)
        inside = max(0, min(len(out), self._end - offset))
        if inside:
            self._image.read_into(out[:inside], offset)
        out[inside:] = bytes(len(out) - inside)


def differing(one: memoryview, two: memoryview, blocks: int) -> Mask:
    """Which of the blocks differ."""
    left, right = (np.frombuffer(side, dtype=np.uint64).reshape(blocks, -1) for side in (one, two))
    return np.asarray((left != right).any(axis=1), dtype=np.bool_)

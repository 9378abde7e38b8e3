"""The old view: O, exact at every instant, whatever a merge or a rollback is doing (UNDO-3).

A block that U has is read from U, any other from the base. The merger publishes U's op count *before* it overwrites
what those ops hold. So a reader that took a block from the base looks at the count again: unchanged means that the
base was still old; changed means that the new ops are loaded and what they hold is read again from U. What they do
not hold had not been overwritten when it was read, so one look is enough (UNDO-25). Nobody waits for anybody.

Workers read through this module: nothing here imports numpy.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from snapd.block.errors import SnapdError
from snapd.block.store import Readable, Store, WritableBuffer
from snapd.cow.image.extentmap import ExtentMap
from snapd.merge.sharedmap import SharedMap

if TYPE_CHECKING:
    from snapd.merge.undostore import UndoStore

UNDO_NAME = "undo.cow"
"""The undo store's name in its directory."""


class OldImage:
    """The old view over any stores.

    `published()` is the op count that must be known before the base is believed; `open_undo()` is called once, when
    it is first above zero. Not for use by two threads at once.
    """

    def __init__(self, base: Readable, published: Callable[[], int], open_undo: "Callable[[], UndoStore]") -> None:
        self._base = base
        self._published = published
        self._open_undo = open_undo
        self._undo: UndoStore | None = None

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill `buffer` with O from byte `offset`; any offset and length inside O.

        Errors: EBADMSG where the undo store is damaged; else what a store raises.
        """
        out = memoryview(buffer)
        count = self._published()
        undo = self._loaded(count)
        if undo is None:
            self._base.read_into(out, offset)
        else:
            self._fill(out, offset, undo, from_base=True)
        count_after = self._published()
        if count_after != count and (undo := self._loaded(count_after)) is not None:
            self._fill(out, offset, undo, from_base=False)

    def _loaded(self, count: int) -> "UndoStore | None":
        """The undo store with at least `count` ops loaded; None while there is nothing in it."""
        if self._undo is None:
            if not count:
                return None
            self._undo = self._open_undo()
        self._undo.load(count)
        return self._undo

    def _fill(self, out: memoryview, offset: int, undo: "UndoStore", *, from_base: bool) -> None:
        """Read the saved runs from U and, if asked to, the runs between them from the base."""
        block_size = undo.header.block_size
        start, end = offset, offset + len(out)
        if end > undo.size:
            raise SnapdError(errno.EIO, f"read of bytes {offset} to {end} of an old image of {undo.size}")
        last = -(-end // block_size)
        block = start // block_size
        while block < last:
            saved = undo.next_saved(block, last)
            if saved > block:
                stop = min(saved * block_size, end)
                if from_base:
                    self._base.read_into(out[offset - start : stop - start], offset)
                offset, block = stop, saved
            if block < last:
                block = undo.next_lacking(block, last)
                stop = min(block * block_size, end)
                undo.read_into(out[offset - start : stop - start], offset)
                offset = stop


class OldView(OldImage):
    """The old view of a mapped snapshot, as its worker reads it: U lies in the undo directory."""

    def __init__(self, base: Store, undo_directory_fd: int, shared: SharedMap, extent_map: ExtentMap) -> None:
        def open_undo() -> "UndoStore":
            # Before a merge a worker has no use for it, and it takes a while to load.
            from snapd.merge.undostore import UndoStore

            return UndoStore.open(UNDO_NAME, dir_fd=undo_directory_fd, targets=extent_map)

        super().__init__(base, lambda: shared.undo_op_count, open_undo)

"""The shared map: how far a merge is, as its readers may use it right now.

One file a snapshot and generation, mapped by the merger (the only writer), the workers and the device host. It is
never a source of truth: after a reboot it is made anew from the disk. The merger publishes in this order: save
durable, publish the undo op count, write the base, flush the base, mark merged; so a reader may believe what it
sees at any instant, if it looks again after it took data from the base (UNDO-25, UNDO-26).

File layout (little-endian):

    0   8  magic "SNAPDSHM"
    8   8  generation
    16  8  undo op count: so many ops of the undo store are durable and readable (aligned, one store)
    24  8  blocks (B)
    32 16  snapshot UUID
    48 16  zero
    64  B  one state byte a block: UNTOUCHED, MERGED or PENDING
"""

import errno
import mmap
import os
import re
import struct
import uuid
from collections.abc import Iterator

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap

_MAGIC = b"SNAPDSHM"
_HEAD = struct.Struct("<8sQQQ16s16x")
_COUNT_WORD = 2
_STEP_BYTES = 1 << 20

UNTOUCHED = 0
"""No op: the base is right in both views."""
MERGED = 1
"""The new content is durable on the base: the base is right in the new view."""
PENDING = 2
"""The base cannot be used as it is."""
_PENDING_BYTE = bytes([PENDING])
_PENDING_RUN = re.compile(_PENDING_BYTE + b"+")
_TO_MERGED = bytes([UNTOUCHED, MERGED, MERGED]) + bytes(253)
_TO_PENDING = bytes([UNTOUCHED, PENDING, PENDING]) + bytes(253)


class SharedMap:
    """A mapping of the file behind `fd`; the descriptor may be closed afterwards."""

    def __init__(self, fd: int, *, writable: bool = False) -> None:
        size = os.fstat(fd).st_size
        if size < _HEAD.size:
            raise SnapdError(errno.EBADMSG, f"shared map: only {size} bytes long")
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        magic, self.generation, _, self.block_count, raw_uuid = _HEAD.unpack_from(self._map)
        if magic != _MAGIC or size != _HEAD.size + self.block_count:
            raise SnapdError(errno.EBADMSG, "shared map: not one, or of another size")
        self.snapshot = uuid.UUID(bytes=raw_uuid)
        # 8-byte aligned loads and stores: one instruction each, never half a number.
        self._words = memoryview(self._map)[: _HEAD.size].cast("Q")

    @classmethod
    def create(cls, fd: int, extent_map: ExtentMap, snapshot: uuid.UUID, generation: int) -> "SharedMap":
        """Fill the empty file `fd` for a merge that has not begun."""
        # Here, not above: workers and device hosts use shared maps, and never make one.
        import numpy as np

        kinds = np.frombuffer(extent_map.whats, dtype=np.uint64) >> np.uint64(60)
        run_states = np.where(kinds == UNCHANGED, UNTOUCHED, PENDING).astype(np.uint8)
        starts = np.frombuffer(extent_map.starts, dtype=np.uint32).astype(np.int64)
        states = np.repeat(run_states, starts[1:] - starts[:-1]).tobytes()
        head = _HEAD.pack(_MAGIC, generation, 0, extent_map.block_count, snapshot.bytes)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(head + states)
        return cls(fd, writable=True)

    @property
    def undo_op_count(self) -> int:
        """How many ops of the undo store readers must know before they believe the base."""
        return int(self._words[_COUNT_WORD])

    def publish(self, undo_op_count: int) -> None:
        """Step c': the undo store holds so many ops durably."""
        self._words[_COUNT_WORD] = undo_op_count

    def mark_merged(self, start: int, blocks: int) -> None:
        """After step f: of these blocks, those that have an op hold their new content durably."""
        self._translate(_HEAD.size + start, _HEAD.size + start + blocks, _TO_MERGED)

    def withdraw(self) -> None:
        """Before a rollback's first base write, or when a read-back failed: no block with an op is on the base."""
        self._translate(_HEAD.size, len(self._map), _TO_PENDING)

    def _translate(self, first: int, end: int, to: bytes) -> None:
        # In steps: a map of a large device must not be copied as a whole.
        for start in range(first, end, _STEP_BYTES):
            stop = min(start + _STEP_BYTES, end)
            self._map[start:stop] = self._map[start:stop].translate(to)

    def new_view_on_base(self, start: int, end: int) -> bool:
        """Whether blocks [start, end) of the new view may be read from the base (UNDO-26)."""
        return self._map.find(_PENDING_BYTE, _HEAD.size + start, _HEAD.size + end) < 0

    def pending_extents(self, start: int, end: int) -> Iterator[Extent]:
        """The runs of blocks in [start, end) that the base does not serve in the new view, ascending."""
        for run in _PENDING_RUN.finditer(self._map, _HEAD.size + start, _HEAD.size + end):
            yield Extent(run.start() - _HEAD.size, run.end() - run.start())

    def state(self, block: int) -> int:
        """The state byte of one block."""
        return self._map[_HEAD.size + block]

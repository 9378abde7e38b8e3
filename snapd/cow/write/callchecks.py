"""What every call of a writer must be like, whatever the version of the file.

Nothing here changes anything: a call that is refused was never made.
"""

import errno
from typing import TYPE_CHECKING

from snapd.cow.errors import CowError
from snapd.cow.format import SOURCE_LIMIT, Compression, OpType
from snapd.cow.write.writeroptions import WriterOptions

if TYPE_CHECKING:
    from snapd.cow.write.targetdigests import TargetDigests

_BLOCK_LIMIT = 1 << 32
_MAX_LENGTH_V2 = (1 << 16) - 1


class CallChecks:
    """The checks of one file; with `digests` the sizes of both images are known. Errors: EINVAL or ERANGE."""

    def __init__(self, options: WriterOptions, digests: "TargetDigests | None") -> None:
        self._options = options
        self._digests = digests
        self._block_size = options.block_size

    def target(self, start: int, count: int) -> None:
        """Target blocks, at least one (COW-23, COW-59, COW-60)."""
        if count < 1:
            raise refused(f"a call for {count} blocks", "COW-59")
        if start < 0 or start + count > _BLOCK_LIMIT:
            raise refused(f"target block {start + count - 1} is not of 32 bits", "COW-23", errno.ERANGE)
        limit = self._options.max_blocks
        if limit is not None and start + count > limit:
            raise refused(f"target block {start + count - 1}, there are {limit}", "COW-60", errno.ERANGE)
        if self._digests is not None:
            self._digests.check_target(start, count)

    def source(self, first: int, last: int) -> None:
        """The source fields of the first and the last op (COW-23)."""
        if first < 0 or last >= SOURCE_LIMIT:
            raise refused(f"source {last if first >= 0 else first} is not of 48 bits", "COW-23", errno.ERANGE)

    def source_bytes(self, offset: int, length: int) -> None:
        """The bytes of the source that are read, where its size is known."""
        if self._digests is not None:
            self._digests.check_source(offset, length)

    def payload(self, kind: OpType, blocks: int, length: int) -> None:
        """A payload that was encoded elsewhere (COW-57, COW-109, COW-111)."""
        most = self._options.unit_blocks if kind is OpType.REPLACE else 1
        if kind not in (OpType.REPLACE, OpType.XOR) or not 1 <= blocks <= most or blocks & (blocks - 1):
            raise refused(f"no op of type {kind} covers {blocks} blocks here", "COW-57")
        unit = blocks * self._block_size
        is_raw = self._options.compression.algorithm is Compression.NONE
        # Streams of version 2 may be longer than their block (COW-105), as far as 16 bits go.
        limit = unit if self._options.version == 3 else _MAX_LENGTH_V2
        if not 1 <= length <= limit or (is_raw and length != unit):
            raise refused(f"no payload of {length} bytes stores a unit of {unit}", "COW-109")

    def block_count(self, data: memoryview) -> int:
        """The blocks of raw or XOR data (COW-129)."""
        if len(data) % self._block_size:
            raise refused(f"{len(data)} bytes are not whole blocks of {self._block_size}", "COW-129")
        return len(data) // self._block_size


def refused(message: str, statement: str, number: int = errno.EINVAL) -> CowError:
    """The error of a call, or of options, that cannot be had."""
    return CowError(message, statement=statement, number=number)

"""The store: what every reader and writer of block data stands on.

Invariant: a call either does all it was asked or raises; there are no short reads or writes above this line.
Offsets and lengths are bytes. Nothing is durable before `flush` returned.
"""

from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
WritableBuffer: TypeAlias = bytearray | memoryview


class Readable(Protocol):
    """Anything that can fill a buffer from a byte offset: a store, or a view computed from several."""

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill the whole buffer with the bytes from `offset` on; raises `SnapdError` (EIO) where it cannot."""
        ...


class Store(Readable, Protocol):
    """Seven verbs over a file, a block device or a simulated disk."""

    def size(self) -> int:
        """Bytes that can be read now."""
        ...

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of `data`; a file grows when the write ends behind its end."""
        ...

    def flush(self) -> None:
        """Return only when everything written before is durable."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Say that the range is not needed; what it reads as afterwards is not defined."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros; like a write it is durable only after `flush`."""
        ...

    def truncate(self, size: int) -> None:
        """Make a file end at `size`, durable only after `flush`; a block device has no end to move and stays."""
        ...


def read_bytes(source: Readable, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, as an own copy."""
    buffer = bytearray(length)
    source.read_into(buffer, offset)
    return bytes(buffer)

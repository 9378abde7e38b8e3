"""Byte-for-byte comparisons of the demo; a difference is an error that says where."""

import errno
from pathlib import Path

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.ctl.progress import Progress

_CHUNK_BYTES = 4 << 20


def compare_device(uri: str, expected: Path, progress: Progress) -> int:
    """Read a whole device and compare it with a file; returns the bytes compared."""
    size = expected.stat().st_size
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with NbdClient.connect(uri) as device, open(expected, "rb") as file:
        if device.size_bytes != size:
            raise SnapdError(errno.EIO, f"the device has {device.size_bytes} bytes, {expected.name} has {size}")
        for offset in range(0, size, _CHUNK_BYTES):
            piece = buffer[: min(_CHUNK_BYTES, size - offset)]
            device.read_into(piece, offset)
            if piece != file.read(len(piece)):
                raise SnapdError(errno.EIO, f"the device differs from {expected.name} behind byte {offset}")
            progress(offset + len(piece), size)
    return size


def compare_files(one: Path, two: Path) -> None:
    """Raise unless both files hold the same bytes."""
    if one.stat().st_size != two.stat().st_size:
        raise SnapdError(errno.EIO, f"{one.name} and {two.name} differ in size")
    with open(one, "rb") as file_one, open(two, "rb") as file_two:
        while piece := file_one.read(_CHUNK_BYTES):
            if piece != file_two.read(_CHUNK_BYTES):
                raise SnapdError(errno.EIO, f"{one.name} and {two.name} differ before byte {file_one.tell()}")

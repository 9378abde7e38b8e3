"""Reading images that are mostly holes: what lies in one is zeros, and costs neither a read nor a look at it."""

import errno
import os
import stat
from collections.abc import Iterator

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import Readable


class SparseReader:
    """Reads an image that does not change meanwhile; any number of threads may use it.

    Only a regular file can tell where its holes are: in everything else all is data.
    """

    def __init__(self, image: Readable) -> None:
        self._image = image
        self._file = image if isinstance(image, FileStore) and stat.S_ISREG(os.fstat(image.fd).st_mode) else None
        # Where the data ends that was found last: some file systems look for that page by page.
        self._data = (0, 0)

    def read(self, buffer: memoryview, offset: int) -> bool:
        """Fill `buffer` as `read_into` does; returns False, and leaves it alone, when the whole range is a hole."""
        end = offset + len(buffer)
        # Behind the end of a file the system sees a hole, too; we see an error.
        if self._file is None or end > self._file.size():
            self._image.read_into(buffer, offset)
            return True
        filled = 0
        for start, stop in self._data_ranges(self._file, offset, end):
            buffer[filled : start - offset] = bytes(start - offset - filled)
            self._image.read_into(buffer[start - offset : stop - offset], start)
            filled = stop - offset
        if filled:
            buffer[filled:] = bytes(len(buffer) - filled)
        return filled > 0

    def _data_ranges(self, file: FileStore, at: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of [at, end) that are data, ascending. Moves the file position, which nobody here uses."""
        while at < end:
            start, stop = self._data
            if not start <= at < stop:
                try:
                    start = os.lseek(file.fd, at, os.SEEK_DATA)
                    stop = os.lseek(file.fd, start, os.SEEK_HOLE)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        return
                    raise SnapdError.from_os(error, f"look for the holes of {file.name} at {at}") from error
                self._data = start, stop
            if start < end:
                yield max(start, at), min(stop, end)
            at = stop

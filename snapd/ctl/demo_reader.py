"""The demo's client: reads a device at random places all the time and compares every byte with what it must be."""

import errno
import threading
import time
from pathlib import Path
from random import Random

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient

_READ_BYTES = (4 << 10, 4 << 10, 64 << 10, 1 << 20)


class VerifyingReader(threading.Thread):
    """Reads until `finish`, which raises whatever went wrong; the figures may be looked at any time."""

    def __init__(self, uri: str, expected: Path, seed: int) -> None:
        super().__init__(name="verifying reader", daemon=True)
        self._uri = uri
        self._expected = expected
        self._random = Random(seed)
        self._finish = threading.Event()
        self._error: SnapdError | OSError | None = None
        self.verified_bytes = 0
        self.longest_read_seconds = 0.0

    def run(self) -> None:
        try:
            with NbdClient.connect(self._uri) as device, open(self._expected, "rb") as expected:
                while not self._finish.is_set():
                    length = self._random.choice(_READ_BYTES)
                    offset = self._random.randrange(0, device.size_bytes - length, 512)
                    buffer = bytearray(length)
                    started = time.monotonic()
                    device.read_into(buffer, offset)
                    self.longest_read_seconds = max(self.longest_read_seconds, time.monotonic() - started)
                    expected.seek(offset)
                    if buffer != expected.read(length):
                        raise SnapdError(errno.EIO, f"a read of {length} bytes at {offset} gave other bytes")
                    self.verified_bytes += length
        except (SnapdError, OSError) as error:
            self._error = error

    def finish(self) -> None:
        """Stop reading; raises the error that ended it earlier, a difference included."""
        self._finish.set()
        self.join()
        if self._error is not None:
            raise self._error

"""A picture as a PNG file: 8-bit palette, no filter, no interlace, one line of text inside."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE_8_BIT = (8, 3, 0, 0, 0)


def encode_png(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]], text: str) -> bytes:
    """The file for rows of `pixels`, which are indices into `palette`; `text` (Latin-1) is its description."""
    height, width = pixels.shape
    # Every row begins with its filter: none.
    rows = np.pad(pixels, ((0, 0), (1, 0)))
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *_PALETTE_8_BIT)),
            _chunk(b"tEXt", b"Description\0" + text.encode("latin-1")),
            _chunk(b"PLTE", bytes(part for colour in palette for part in colour)),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))

"""Payload compression: the option string, the encoders and the decoders (section 10).

Invariant: `Decoder.decode` returns exactly the bytes asked for or raises; a damaged payload never turns into
data (COW-103, COW-120). Both ends keep one codec context and must not be shared between threads.
"""

import errno
from dataclasses import dataclass

import lz4.block
import zstandard

from snapd.block.errors import SnapdError
from snapd.cow.errors import CowError
from snapd.cow.format import Compression

_DEFAULT_LEVEL = {Compression.NONE: 0, Compression.LZ4: 0, Compression.ZSTD: 3}
_NAMES = {"": Compression.NONE, "none": Compression.NONE, "lz4": Compression.LZ4, "zstd": Compression.ZSTD}


@dataclass(frozen=True, slots=True)
class CompressOption:
    """A parsed `ALGO[,LEVEL]` (COW-100, COW-101)."""

    algorithm: Compression
    level: int

    @classmethod
    def parse(cls, text: str) -> "CompressOption":
        """EINVAL for more than two parts, an unknown name or a level that is not an integer."""
        name, *level = text.split(",")
        if name not in _NAMES or len(level) > 1:
            raise SnapdError(
                errno.EINVAL, f"compression {text!r}: expected zstd, lz4 or none, optionally ',LEVEL' (COW-100)"
            )
        algorithm = _NAMES[name]
        if not level:
            return cls(algorithm, _DEFAULT_LEVEL[algorithm])
        try:
            return cls(algorithm, int(level[0]))
        except ValueError as error:
            raise SnapdError(
                errno.EINVAL, f"compression {text!r}: the level {level[0]!r} is not an integer (COW-100)"
            ) from error


class Encoder:
    """Compresses units of one file; a unit that does not shrink is stored raw (COW-106)."""

    def __init__(self, option: CompressOption) -> None:
        self._algorithm = option.algorithm
        if option.algorithm is Compression.ZSTD:
            limit = zstandard.MAX_COMPRESSION_LEVEL
            if option.level > limit:
                raise SnapdError(errno.EINVAL, f"zstd level {option.level} is above the highest, {limit}")
            self._zstd = zstandard.ZstdCompressor(level=option.level, write_content_size=True, write_checksum=False)
        elif option.algorithm not in (Compression.NONE, Compression.LZ4):
            raise SnapdError(errno.EOPNOTSUPP, f"no encoder for {option.algorithm.name.lower()}")

    def encode(self, unit: bytes | bytearray | memoryview) -> bytes:
        """The payload that stores `unit`; as long as `unit` means raw."""
        if self._algorithm is Compression.ZSTD:
            packed = self._zstd.compress(unit)
        elif self._algorithm is Compression.LZ4:
            packed = lz4.block.compress(unit, store_size=False)
        else:
            return bytes(unit)
        return packed if len(packed) < len(unit) else bytes(unit)


class Decoder:
    """Decodes the payloads of one file, by the table of COW-108 for version 3."""

    def __init__(self, algorithm: Compression) -> None:
        self._algorithm = algorithm
        if algorithm is Compression.ZSTD:
            self._zstd = zstandard.ZstdDecompressor()
        elif algorithm not in (Compression.NONE, Compression.LZ4):
            raise CowError(
                f"compression {algorithm.name.lower()} is not supported",
                statement="COW-108",
                number=errno.EOPNOTSUPP,
            )

    def decode(self, payload: bytes | bytearray | memoryview, size: int, *, op_index: int) -> bytes:
        """The `size` bytes of a unit from its stored payload; `CowError` (EBADMSG) if it does not give them."""
        if len(payload) == size:
            return bytes(payload)
        if self._algorithm is Compression.NONE:
            raise CowError(
                f"raw payload of {len(payload)} bytes for a unit of {size}", statement="COW-108", op_index=op_index
            )
        try:
            if self._algorithm is Compression.ZSTD:
                unit = self._decode_zstd(payload, size)
            else:
                unit = lz4.block.decompress(payload, uncompressed_size=size)
        except (zstandard.ZstdError, lz4.block.LZ4BlockError, ValueError) as error:
            raise CowError(f"payload does not decompress: {error}", statement="COW-120", op_index=op_index) from error
        if len(unit) != size:
            raise CowError(
                f"payload decompresses to {len(unit)} bytes instead of {size}", statement="COW-103", op_index=op_index
            )
        return bytes(unit)

    def _decode_zstd(self, payload: bytes | bytearray | memoryview, size: int) -> bytes:
        declared = zstandard.frame_content_size(payload)
        # Checked before decoding: the frame must not make us allocate what it likes.
        if declared not in (-1, size):
            raise ValueError(f"the frame declares {declared} bytes instead of {size}")
        return self._zstd.decompress(payload, max_output_size=size, allow_extra_data=False)

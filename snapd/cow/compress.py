"""Payload compression: the option string, the encoders and the decoders (section 10).

Invariant: `Decoder.decode` returns exactly the bytes asked for or raises; a damaged payload never turns into
data (COW-103, COW-120), and none makes us allocate more than those bytes and the codec's window. Both ends keep one
codec context and must not be shared between threads.
"""

import errno
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import lz4.block
import zstandard

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer
from snapd.cow.errors import CowError
from snapd.cow.format import Compression

if TYPE_CHECKING:
    import brotli
else:
    brotli = None

_DEFAULT_LEVEL = {
    Compression.NONE: 0,
    Compression.GZ: 9,
    Compression.BROTLI: 11,
    Compression.LZ4: 0,
    Compression.ZSTD: 3,
}
_LEVELS = {
    Compression.GZ: range(-1, 10),
    Compression.BROTLI: range(12),
    Compression.ZSTD: range(-(1 << 17), zstandard.MAX_COMPRESSION_LEVEL + 1),
}
_NAMES = {"": Compression.NONE} | {algorithm.name.lower(): algorithm for algorithm in Compression}
_ALWAYS_STREAMS = (Compression.GZ, Compression.BROTLI)
_BROTLI_WINDOW_LOG = 22
_ZSTD_WINDOW_BYTES = 8 << 20
"""What every decoder must support (RFC 8878); a frame without its size could ask for 128 MiB to hold one block."""


class CompressOption(NamedTuple):
    """A parsed `ALGO[,LEVEL]` (COW-100, COW-101)."""

    algorithm: Compression
    level: int

    @classmethod
    def parse(cls, text: str) -> "CompressOption":
        """EINVAL for more than two parts, an unknown name or a level that is not an integer."""
        name, *level = text.split(",")
        if name not in _NAMES or len(level) > 1:
            raise SnapdError(
                errno.EINVAL,
                f"compression {text!r}: expected zstd, lz4, gz, brotli or none, optionally ',LEVEL' (COW-100)",
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
    """Compresses the units of one file of `version`; `max_unit` is the most bytes of one (COW-102).

    EINVAL for a level that the algorithm does not have.
    """

    def __init__(self, option: CompressOption, *, version: int, max_unit: int) -> None:
        self._algorithm = option.algorithm
        self._level = option.level
        # Versions 1 and 2 have no way to say that a gz or brotli payload is raw (COW-105).
        self._always_stream = version < 3 and option.algorithm in _ALWAYS_STREAMS
        levels = _LEVELS.get(option.algorithm)
        if levels is not None and option.level not in levels:
            raise SnapdError(
                errno.EINVAL,
                f"{option.algorithm.name.lower()} has the levels {levels[0]} to {levels[-1]}, not {option.level}",
            )
        if option.algorithm is Compression.ZSTD:
            parameters = zstandard.ZstdCompressionParameters(
                compression_level=option.level,
                window_log=max(max_unit.bit_length() - 1, zstandard.WINDOWLOG_MIN),
                write_content_size=1,
                write_checksum=0,
                write_dict_id=0,
            )
            self._zstd = zstandard.ZstdCompressor(compression_params=parameters)
        elif option.algorithm is Compression.BROTLI:
            _load_brotli()

    def encode(self, unit: Buffer) -> bytes:
        """The payload that stores `unit`; one that does not shrink is stored raw where that can be told."""
        if self._algorithm is Compression.ZSTD:
            packed = self._zstd.compress(unit)
        elif self._algorithm is Compression.LZ4:
            packed = lz4.block.compress(unit, store_size=False)
        elif self._algorithm is Compression.GZ:
            packed = zlib.compress(unit, self._level)
        elif self._algorithm is Compression.BROTLI:
            packed = brotli.compress(bytes(unit), quality=self._level, lgwin=_BROTLI_WINDOW_LOG)
        else:
            return bytes(unit)
        return packed if self._always_stream or len(packed) < len(unit) else bytes(unit)


class Decoder:
    """Decodes the payloads of one file, by the table of COW-108."""

    def __init__(self, algorithm: Compression, *, version: int) -> None:
        self._always_stream = version < 3 and algorithm in _ALWAYS_STREAMS
        self._decompress: Callable[[Buffer, int], bytes] | None = None
        if algorithm is Compression.ZSTD:
            zstd = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
            self._decompress = partial(_decompress_zstd, zstd)
        elif algorithm is Compression.LZ4:
            self._decompress = lz4.block.decompress
        elif algorithm is Compression.GZ:
            self._decompress = _decompress_gz
        elif algorithm is Compression.BROTLI:
            _load_brotli()
            self._decompress = _decompress_brotli

    def decode(self, payload: Buffer, size: int, *, op_index: int) -> Buffer:
        """The `size` bytes of a unit from its stored payload; `CowError` (EBADMSG) if it does not give them.

        A raw unit is `payload` itself.
        """
        if len(payload) == size and not self._always_stream:
            return payload
        if self._decompress is None:
            raise CowError(
                f"raw payload of {len(payload)} bytes for a unit of {size}", statement="COW-108", op_index=op_index
            )
        try:
            unit = self._decompress(payload, size)
        except (zstandard.ZstdError, lz4.block.LZ4BlockError, zlib.error, ValueError) as error:
            raise CowError(f"payload does not decompress: {error}", statement="COW-120", op_index=op_index) from error
        if len(unit) != size:
            raise CowError(
                f"payload decompresses to {len(unit)} bytes instead of {size}", statement="COW-103", op_index=op_index
            )
        return unit


def _decompress_zstd(zstd: zstandard.ZstdDecompressor, payload: Buffer, size: int) -> bytes:
    declared = zstandard.frame_content_size(payload)
    # Checked before decoding: the frame must not make us allocate what it likes.
    if declared not in (-1, size):
        raise ValueError(f"the frame declares {declared} bytes instead of {size}")
    # At most `size` bytes of one frame with nothing behind it; by keyword it costs half a microsecond more.
    return zstd.decompress(payload, size, False, False)


def _decompress_gz(payload: Buffer, size: int) -> bytes:
    stream = zlib.decompressobj()
    # One byte more than there may be: so the end of the stream is reached, and a longer one shows.
    unit = stream.decompress(payload, size + 1)
    if len(unit) == size and (not stream.eof or stream.unused_data):
        raise ValueError("the stream does not end with its payload")
    return unit


def _decompress_brotli(payload: Buffer, size: int) -> bytes:
    stream = brotli.Decompressor()
    try:
        unit: bytes = stream.process(bytes(payload), output_buffer_limit=size + 1)
        while len(unit) <= size and not stream.can_accept_more_data():
            unit += stream.process(b"", output_buffer_limit=size + 1)
    except brotli.error as error:
        raise ValueError(str(error)) from error
    if len(unit) == size and not stream.is_finished():
        raise ValueError("the stream does not end with its payload")
    return unit


def _load_brotli() -> None:
    """Import brotli where a file needs it: no process pays for it at its start."""
    global brotli
    import brotli as module

    brotli = module

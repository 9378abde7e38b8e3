"""Payloads for the corpus: honest ones of every algorithm, and those that want more memory than they are worth."""

import functools
import zlib
from collections.abc import Callable
from random import Random

import brotli
import lz4.block
import zstandard
from rawcow import BROTLI, GZ, LZ4, ZSTD

_BOMB_BYTES = 1 << 20


def unit(random: Random, size: int) -> bytes:
    """Content of `size` bytes that compresses to about a tenth, different every time."""
    return (random.randbytes(24) * (size // 24 + 1))[: size - 8] + random.randbytes(8)


def packed(algorithm: int, content: bytes, version: int) -> bytes:
    """The payload that stores `content`, raw where it does not get shorter and that can be told (COW-105, COW-106)."""
    encoders: dict[int, Callable[[bytes], bytes]] = {
        GZ: zlib.compress,
        BROTLI: functools.partial(brotli.compress, quality=3),
        LZ4: functools.partial(lz4.block.compress, store_size=False),
        ZSTD: zstandard.ZstdCompressor().compress,
    }
    payload = encoders.get(algorithm, bytes)(content)
    if version < 3 and algorithm in (GZ, BROTLI):
        return payload
    return payload if len(payload) < len(content) else content


@functools.cache
def bombs(algorithm: int, size: int) -> tuple[bytes, ...]:
    """Payloads for a unit of `size` bytes that declare or expand to more, want a large window, or end elsewhere."""
    make = {GZ: _gz, BROTLI: _brotli, LZ4: _lz4, ZSTD: _zstd}.get(algorithm)
    return (bytes(300), b"\xff" * 300, *(make(bytes(size)) if make is not None else ()))


def _gz(unit: bytes) -> list[bytes]:
    stream = zlib.compress(unit)
    large = [zlib.compress(bytes(_BOMB_BYTES)), zlib.compress(bytes(8 * len(unit))), zlib.compress(unit + b"\0")]
    # With bytes behind it, a wrong checksum, a wish for a dictionary.
    return [*large, stream + b"\0", stream + stream, stream[:-4] + bytes(4), b"\x78\xbb" + stream[2:]]


def _brotli(unit: bytes) -> list[bytes]:
    stream = brotli.compress(unit)
    large = [brotli.compress(bytes(_BOMB_BYTES), quality=2), brotli.compress(unit + b"\0")]
    # Cut short, with bytes behind it, with the largest window, and with one that brotli has only when asked for it.
    return [*large, stream[:-1], stream + b"\0", b"\x0f" + stream[1:], b"\x11" + stream[1:]]


def _lz4(unit: bytes) -> list[bytes]:
    block = lz4.block.compress(unit, store_size=False)
    large = [lz4.block.compress(content, store_size=False) for content in (bytes(_BOMB_BYTES), unit + b"\0")]
    # Cut short, with bytes behind it, with a length that goes on and on, with a distance of nothing.
    return [*large, block[:-1], block + b"\0", b"\x1f\0\x01\0" + b"\xff" * 200 + b"\0", b"\x1f\0\0\0" + block[4:]]


def _zstd(unit: bytes) -> list[bytes]:
    frame, large = (zstandard.ZstdCompressor().compress(content) for content in (unit, bytes(_BOMB_BYTES)))
    skipped = [_zstd_skippable(64) + frame, frame + _zstd_skippable(64), _zstd_skippable((1 << 32) - 1)]
    declaring = [_zstd_declaring(length) for length in (0, len(unit), len(unit) + 1, 1 << 32, (1 << 64) - 1)]
    hiding = [_zstd_hiding(unit, window_log) for window_log in (10, 23, 27, 31, 41)]
    return [large, frame + frame, *skipped, *declaring, *hiding, _zstd_hiding(bytes(_BOMB_BYTES), 20)]


def _zstd_hiding(content: bytes, window_log: int) -> bytes:
    """A frame that does not say how long its content is, and declares a window."""
    parameters = zstandard.ZstdCompressionParameters(compression_level=1, window_log=20, write_content_size=0)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = bytearray(stream.compress(content) + stream.flush())
    # Byte 4 says that the frame is no single segment, so byte 5 is the window.
    frame[5] = (window_log - 10) << 3
    return bytes(frame)


def _zstd_declaring(declared: int) -> bytes:
    """A frame of RLE blocks that says it has `declared` bytes, and has less."""
    block = (1 | 1 << 1 | 1000 << 3).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\xe0" + declared.to_bytes(8, "little") + block


def _zstd_skippable(size: int) -> bytes:
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(min(size, 64))

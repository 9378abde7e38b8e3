"""The codecs of the second reader: one payload to its content, in small steps, so that no payload can make it large."""

import zlib

import brotli
import zstandard

_LARGEST_WINDOW = 8 << 20


class Damaged(Exception):
    """A payload does not decode to its unit."""


def decode_gz(payload: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    unit = b""
    try:
        for at in range(0, len(payload), 64):
            unit += stream.decompress(payload[at : at + 64])
            if len(unit) > size:
                break
    except zlib.error as error:
        raise Damaged(str(error)) from error
    if not stream.eof or stream.unused_data:
        raise Damaged("the end is elsewhere")
    return unit


def decode_zstd(payload: bytes, size: int) -> bytes:
    stream = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
    unit = b""
    try:
        for at in range(0, len(payload), 64):
            if stream.eof:
                raise Damaged("bytes behind the frame")
            unit += stream.decompress(payload[at : at + 64])
            if len(unit) > size:
                break
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error
    if not stream.eof or stream.unused_data:
        raise Damaged("the end is elsewhere")
    return unit


def decode_brotli(payload: bytes, size: int) -> bytes:
    stream = brotli.Decompressor()
    unit = b""
    try:
        for at in range(len(payload)):
            if stream.is_finished():
                raise Damaged("bytes behind the stream")
            unit += stream.process(payload[at : at + 1], output_buffer_limit=size + 1)
            if len(unit) > size:
                break
    except brotli.error as error:
        raise Damaged(str(error)) from error
    if not stream.is_finished():
        raise Damaged("no end")
    return unit


def decode_lz4(payload: bytes, size: int) -> bytes:
    unit = bytearray()
    at = 0

    def take(length: int) -> bytes:
        nonlocal at
        if at + length > len(payload):
            raise Damaged("cut off")
        at += length
        return payload[at - length : at]

    def extended(nibble: int) -> int:
        length = nibble
        while nibble == 15:
            more = take(1)[0]
            length += more
            if more != 255:
                break
        return length

    while at < len(payload):
        token = take(1)[0]
        unit += take(extended(token >> 4))
        if len(unit) > size:
            break
        if at == len(payload):
            return bytes(unit)
        # A block ends with five literals at least, and its last match begins twelve bytes before its end.
        if len(unit) > size - 12 or at > len(payload) - 8:
            raise Damaged("too near the end")
        distance = int.from_bytes(take(2), "little")
        length = 4 + extended(token & 15)
        if distance > len(unit) or len(unit) + length > size - 5:
            raise Damaged("a match outside the unit")
        # The format knows no distance of 0; the library takes it for zeros, and only digests tell.
        pattern = unit[-distance:] if distance else b"\0"
        unit += (pattern * (length // len(pattern) + 1))[:length]
    raise Damaged("no end")

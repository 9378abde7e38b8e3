"""The option string, the encoders and the decoders: exactly the bytes, or an error."""

import contextlib
import tracemalloc
import zlib
from random import Random

import brotli
import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.cow.compress import CompressOption, Decoder, Encoder
from snapd.cow.errors import CowError
from snapd.cow.format import Compression

UNIT = Random(1).randbytes(2048) + bytes(6144)
CODECS = ["gz", "brotli", "lz4", "zstd"]


def encoder(text: str, version: int = 3) -> Encoder:
    return Encoder(CompressOption.parse(text), version=version, max_unit=64 << 10)


def decoder(text: str, version: int = 3) -> Decoder:
    return Decoder(CompressOption.parse(text).algorithm, version=version)


@pytest.mark.parametrize(
    ("text", "algorithm", "level"),
    [
        ("zstd", Compression.ZSTD, 3),
        ("zstd,9", Compression.ZSTD, 9),
        ("zstd,-5", Compression.ZSTD, -5),
        ("gz", Compression.GZ, 9),
        ("gz,4", Compression.GZ, 4),
        ("brotli", Compression.BROTLI, 11),
        ("lz4", Compression.LZ4, 0),
        ("lz4,4", Compression.LZ4, 4),
        ("none", Compression.NONE, 0),
        ("", Compression.NONE, 0),
    ],
)
def test_options(text: str, algorithm: Compression, level: int) -> None:
    """COW-100, COW-101: names, levels and their defaults."""
    assert CompressOption.parse(text) == CompressOption(algorithm, level)


@pytest.mark.parametrize("text", ["gz,4,4", "zs,4", "zstd.4", "zstd,x", "zstd,", "gzip", "ZSTD", " zstd"])
def test_bad_options(text: str) -> None:
    """COW-100: more parts, another name or a level that is no integer fail, and the message quotes the text."""
    with pytest.raises(SnapdError, match="COW-100") as caught:
        CompressOption.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["zstd,99", "gz,10", "gz,-2", "brotli,12", "brotli,-1"])
def test_level_out_of_range_fails_before_any_block(text: str) -> None:
    """COW-101: a level that the library does not have is an error of the option, which names the levels there are."""
    with pytest.raises(SnapdError, match=f"has the levels .* not {text.split(',')[1]}"):
        encoder(text)


@given(
    data=st.binary(min_size=1, max_size=40),
    repeat=st.integers(1, 3000),
    name=st.sampled_from(["none", "gz,6", "brotli,4", "lz4", "zstd"]),
    version=st.sampled_from([2, 3]),
)
@settings(max_examples=200, deadline=None)
def test_round_trip(data: bytes, repeat: int, name: str, version: int) -> None:
    """COW-102, COW-105, COW-106: what was put in comes out."""
    unit = (data * repeat).ljust(4096, b"\0")[:65536]
    payload = encoder(name, version).encode(unit)
    assert bytes(decoder(name, version).decode(payload, len(unit), op_index=0)) == unit


@pytest.mark.parametrize(("name", "version"), [*((name, 3) for name in CODECS), ("lz4", 2), ("zstd", 2)])
def test_what_does_not_shrink_is_raw(name: str, version: int) -> None:
    """COW-105, COW-106: as long as its unit means raw."""
    noise = Random(2).randbytes(4096)
    assert encoder(name, version).encode(noise) == noise


@pytest.mark.parametrize(("name", "length"), [("gz", 4107), ("brotli", 4100)])
def test_version_2_has_no_raw_gz_or_brotli(name: str, length: int) -> None:
    """COW-105: the stream is stored even where it is longer than its block; 4096 bytes are not taken for raw."""
    noise = Random(2).randbytes(4096)
    payload = encoder(name, 2).encode(noise)
    assert len(payload) == length
    assert decoder(name, 2).decode(payload, 4096, op_index=0) == noise
    with pytest.raises(CowError):
        decoder(name, 2).decode(noise, 4096, op_index=0)


def test_zstd_frames_declare_their_size_and_carry_no_checksum() -> None:
    """COW-102: one frame with the content size, without checksum and dictionary."""
    parameters = zstandard.get_frame_parameters(encoder("zstd").encode(UNIT))
    assert (parameters.content_size, parameters.has_checksum, parameters.dict_id) == (len(UNIT), False, 0)


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_decodes_to_its_unit_or_not_at_all(name: str) -> None:
    """COW-103, COW-120: shorter, longer and trailing bytes are errors that name the op; none gives data."""
    payload = encoder(name).encode(UNIT)
    codec = decoder(name)
    for damaged, size in (
        (payload[:-1], len(UNIT)),
        (payload[: len(payload) // 2], len(UNIT)),
        (payload + b"\0", len(UNIT)),
        (payload, len(UNIT) - 4096),
        (payload, len(UNIT) + 4096),
    ):
        with pytest.raises(CowError, match="op 7: "):
            codec.decode(damaged, size, op_index=7)
    assert codec.decode(payload, len(UNIT), op_index=7) == UNIT


def test_two_frames_are_not_one_payload() -> None:
    """COW-103: exactly one frame a payload."""
    half = encoder("zstd").encode(UNIT[:4096])
    with pytest.raises(CowError):
        decoder("zstd").decode(half + half, 8192, op_index=0)


def test_a_frame_that_hides_its_size_is_held_to_the_unit() -> None:
    """COW-103: without a declared size the unit still bounds what is decoded."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(UNIT)
    assert decoder("zstd").decode(frame, len(UNIT), op_index=0) == UNIT
    with pytest.raises(CowError):
        decoder("zstd").decode(frame, len(UNIT) - 4096, op_index=0)


@pytest.mark.parametrize("name", CODECS)
def test_random_damage_never_raises_anything_else(name: str) -> None:
    """COW-120: whatever the bytes are, decoding ends in the right length or in a `CowError`."""
    random = Random(3)
    payload = encoder(name).encode(UNIT)
    codec = decoder(name)
    for _ in range(400):
        damaged = bytearray(payload)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        with contextlib.suppress(CowError):
            assert len(codec.decode(damaged, len(UNIT), op_index=0)) == len(UNIT)


def test_short_raw_payload_is_an_error() -> None:
    """COW-108: without compression nothing but the whole unit is a payload."""
    with pytest.raises(CowError, match="COW-108"):
        decoder("none").decode(UNIT[:100], len(UNIT), op_index=0)


@pytest.mark.parametrize("name", CODECS)
def test_a_bomb_is_refused_for_the_memory_of_its_unit(name: str) -> None:
    """COW-103: 64 MiB of zeros in a payload cost no more than the 4 KiB that they claim to be."""
    zeros = bytes(64 << 20)
    bomb = {
        "gz": zlib.compress(zeros),
        "brotli": brotli.compress(zeros, quality=5),
        "lz4": lz4.block.compress(zeros, store_size=False),
        "zstd": zstandard.ZstdCompressor(write_content_size=False).compress(zeros),
    }[name]
    codec = decoder(name)
    tracemalloc.start()
    try:
        with pytest.raises(CowError):
            codec.decode(bomb, 4096, op_index=0)
        assert tracemalloc.get_traced_memory()[1] < len(bomb) + (1 << 20)
    finally:
        tracemalloc.stop()

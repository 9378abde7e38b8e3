"""The option string, the encoders and the decoders: exactly the bytes, or an error."""

import contextlib
from random import Random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.cow.compress import CompressOption, Decoder, Encoder
from snapd.cow.errors import CowError
from snapd.cow.format import Compression

UNIT = Random(1).randbytes(2048) + bytes(6144)


@pytest.mark.parametrize(
    ("text", "algorithm", "level"),
    [
        ("zstd", Compression.ZSTD, 3),
        ("zstd,9", Compression.ZSTD, 9),
        ("zstd,-5", Compression.ZSTD, -5),
        ("lz4", Compression.LZ4, 0),
        ("lz4,4", Compression.LZ4, 4),
        ("none", Compression.NONE, 0),
        ("", Compression.NONE, 0),
    ],
)
def test_options(text: str, algorithm: Compression, level: int) -> None:
    """COW-100, COW-101: names, levels and their defaults."""
    assert CompressOption.parse(text) == CompressOption(algorithm, level)


@pytest.mark.parametrize("text", ["zstd,4,4", "zs,4", "zstd.4", "zstd,x", "zstd,", "gz", "ZSTD", " zstd"])
def test_bad_options(text: str) -> None:
    """COW-100: more parts, another name or a level that is no integer fail, and the message quotes the text."""
    with pytest.raises(SnapdError, match="COW-100") as caught:
        CompressOption.parse(text)
    assert repr(text) in str(caught.value)


def test_level_out_of_range_fails_before_any_block() -> None:
    """A level that the library does not have is an error of the option."""
    with pytest.raises(SnapdError, match="zstd level 99"):
        Encoder(CompressOption.parse("zstd,99"))


@given(
    data=st.binary(min_size=1, max_size=40), repeat=st.integers(1, 3000), name=st.sampled_from(["none", "lz4", "zstd"])
)
@settings(max_examples=150, deadline=None)
def test_round_trip(data: bytes, repeat: int, name: str) -> None:
    """COW-102, COW-106: what was put in comes out, and no payload is longer than its unit."""
    unit = (data * repeat).ljust(4096, b"\0")[:65536]
    option = CompressOption.parse(name)
    payload = Encoder(option).encode(unit)
    assert 0 < len(payload) <= len(unit)
    assert Decoder(option.algorithm).decode(payload, len(unit), op_index=0) == unit


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_what_does_not_shrink_is_raw(name: str) -> None:
    """COW-106: as long as its unit means raw."""
    noise = Random(2).randbytes(4096)
    assert Encoder(CompressOption.parse(name)).encode(noise) == noise


def test_zstd_frames_declare_their_size_and_carry_no_checksum() -> None:
    """COW-102: one frame with the content size, without checksum and dictionary."""
    parameters = zstandard.get_frame_parameters(Encoder(CompressOption.parse("zstd")).encode(UNIT))
    assert (parameters.content_size, parameters.has_checksum, parameters.dict_id) == (len(UNIT), False, 0)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_payload_decodes_to_its_unit_or_not_at_all(name: str) -> None:
    """COW-103, COW-120: shorter, longer and trailing bytes are errors that name the op; none gives data."""
    option = CompressOption.parse(name)
    payload = Encoder(option).encode(UNIT)
    decoder = Decoder(option.algorithm)
    for damaged, size in (
        (payload[:-1], len(UNIT)),
        (payload[: len(payload) // 2], len(UNIT)),
        (payload + b"\0", len(UNIT)),
        (payload, len(UNIT) - 4096),
        (payload, len(UNIT) + 4096),
    ):
        with pytest.raises(CowError, match="op 7: "):
            decoder.decode(damaged, size, op_index=7)
    assert decoder.decode(payload, len(UNIT), op_index=7) == UNIT


def test_two_frames_are_not_one_payload() -> None:
    """COW-103: exactly one frame a payload."""
    half = Encoder(CompressOption.parse("zstd")).encode(UNIT[:4096])
    with pytest.raises(CowError):
        Decoder(Compression.ZSTD).decode(half + half, 8192, op_index=0)


def test_a_frame_that_hides_its_size_is_held_to_the_unit() -> None:
    """COW-103: without a declared size the unit still bounds what is decoded."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(UNIT)
    assert Decoder(Compression.ZSTD).decode(frame, len(UNIT), op_index=0) == UNIT
    with pytest.raises(CowError):
        Decoder(Compression.ZSTD).decode(frame, len(UNIT) - 4096, op_index=0)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_random_damage_never_raises_anything_else(name: str) -> None:
    """COW-120: whatever the bytes are, decoding ends in the right length or in a `CowError`."""
    random = Random(3)
    option = CompressOption.parse(name)
    payload = Encoder(option).encode(UNIT)
    decoder = Decoder(option.algorithm)
    for _ in range(400):
        damaged = bytearray(payload)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        with contextlib.suppress(CowError):
            assert len(decoder.decode(damaged, len(UNIT), op_index=0)) == len(UNIT)


def test_short_raw_payload_is_an_error() -> None:
    """COW-108: without compression nothing but the whole unit is a payload."""
    with pytest.raises(CowError, match="COW-108"):
        Decoder(Compression.NONE).decode(UNIT[:100], len(UNIT), op_index=0)


@pytest.mark.parametrize("algorithm", [Compression.GZ, Compression.BROTLI])
def test_unsupported_algorithms_have_no_decoder(algorithm: Compression) -> None:
    """COW-108: gz and brotli are named, not guessed at."""
    with pytest.raises(CowError, match=f"{algorithm.name.lower()} is not supported"):
        Decoder(algorithm)

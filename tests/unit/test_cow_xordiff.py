"""XOR or replace, unit by unit: always the smaller of what was compressed."""

from random import Random

import pytest

from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.diff.xordiff import cheaper_as_xor
from snapd.cow.format import BLOCK_SIZE

OP = 16
NOISE = Random(1).randbytes(64 * BLOCK_SIZE)


@pytest.fixture(params=["zstd", "lz4", "gz", "brotli,5"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """An encoder of each algorithm."""
    return Encoder(CompressOption.parse(request.param), version=3, max_unit=64 << 10)


def small_difference(row: int) -> bytes:
    """What is left of a block that differs in three bytes."""
    difference = bytearray(BLOCK_SIZE)
    for at in (100, 2000, 4000):
        difference[at] = 1 + row
    return bytes(difference)


def test_noise_with_small_differences_is_xored_whole(encoder: Encoder) -> None:
    """Every row is taken, and its payload is the encoded difference."""
    differences = {row: small_difference(row) for row in range(16)}
    chosen = cheaper_as_xor(encoder, memoryview(NOISE)[: 16 * BLOCK_SIZE], differences, OP)
    assert chosen == {row: encoder.encode(difference) for row, difference in differences.items()}


def test_differences_that_do_not_compress_are_not_taken(encoder: Encoder) -> None:
    """A unit that compresses well stays one."""
    unit = b"the same again, " * (BLOCK_SIZE * 16 // 16)
    differences = {row: NOISE[row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE] for row in range(16)}
    assert cheaper_as_xor(encoder, memoryview(unit), differences, OP) == {}


def test_only_the_rows_that_are_worth_it(encoder: Encoder) -> None:
    """Of rows with small and with large differences the small ones are taken, and the rest stays a unit."""
    differences = {row: small_difference(row) if row < 4 else NOISE[-BLOCK_SIZE:] for row in range(8)}
    unit = bytearray(NOISE[: 8 * BLOCK_SIZE])
    unit[4 * BLOCK_SIZE :] = NOISE[: BLOCK_SIZE // 2] * 8
    assert set(cheaper_as_xor(encoder, memoryview(unit), differences, OP)) == {0, 1, 2, 3}


def test_what_the_rest_loses_counts(encoder: Encoder) -> None:
    """A row whose content the others of its unit repeat is not free to leave it."""
    half = NOISE[: BLOCK_SIZE // 2]
    unit = half * 4
    difference = NOISE[:1500] + bytes(BLOCK_SIZE - 1500)
    assert len(encoder.encode(difference)) < len(encoder.encode(unit)) < 2 * 2048 + 100
    assert cheaper_as_xor(encoder, memoryview(unit), {0: difference}, OP) == {}


def test_ops_cost_something() -> None:
    """Sixteen ops for one have to save their records."""
    encoder = Encoder(CompressOption.parse("zstd"), version=3, max_unit=64 << 10)
    unit = (NOISE[:800] + bytes(BLOCK_SIZE - 800)) * 16
    differences = {row: small_difference(row) for row in range(16)}
    saved = len(encoder.encode(unit)) - sum(len(encoder.encode(difference)) for difference in differences.values())
    assert saved > 0
    assert len(cheaper_as_xor(encoder, memoryview(unit), differences, saved // 15 - 1)) == 16
    assert cheaper_as_xor(encoder, memoryview(unit), differences, saved // 15 + 1) == {}

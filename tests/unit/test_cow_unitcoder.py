"""Payloads made on threads: what they store, and what it costs to give an op up."""

from random import Random

import numpy as np
import pytest
from cowfiles import store

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.cow.compress import CompressOption
from snapd.cow.diff.blockrows import NONE, Ints
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.unitcoder import ReplacePayload, UnitCoder
from snapd.cow.format import BLOCK_SIZE

_RANDOM = Random(1)
# Each block compresses worse than the one before.
SOURCE = b"".join(_RANDOM.randbytes(400 * i).ljust(BLOCK_SIZE, b".") for i in range(10))
TARGET = bytearray(SOURCE[500:] + _RANDOM.randbytes(500))
TARGET[::700] = bytes(len(TARGET[::700]))


@pytest.fixture(params=[1, 3])
def coder(request: pytest.FixtureRequest) -> UnitCoder:
    """A coder on one thread and on several."""
    options = CreateOptions(unit=16 << 10, jobs=request.param)
    return UnitCoder(store(SOURCE), store(bytes(TARGET)), options)


def encoded(data: bytes) -> bytes:
    """As the coder's encoders do."""
    return CreateOptions(unit=16 << 10).writer_options(1).encoder().encode(data)


def target(block: int, blocks: int = 1) -> bytes:
    """Blocks of the target."""
    return bytes(TARGET[block * BLOCK_SIZE : (block + blocks) * BLOCK_SIZE])


def difference(block: int, start: int) -> bytes:
    """A target block XOR the source from a byte on."""
    return bytes(a ^ b for a, b in zip(target(block), SOURCE[start : start + BLOCK_SIZE], strict=True))


def moved(blocks: Ints) -> Ints:
    """Where the content of the target's blocks is in the source; the last one's is not there."""
    return np.where(blocks < 9, blocks * BLOCK_SIZE + 500, NONE)


def nowhere(blocks: Ints) -> Ints:
    """No block has a source."""
    return np.full(len(blocks), NONE)


def own_place(blocks: Ints) -> Ints:
    """Every second block has one at its own place."""
    return np.where(blocks % 2, blocks * BLOCK_SIZE, NONE)


def test_units_of_extents(coder: UnitCoder) -> None:
    """COW-113: each extent is cut from its start."""
    found = [payload for payloads in coder.units([Extent(0, 7), Extent(8, 2)]) for payload in payloads]
    expected = [(0, 4), (4, 2), (6, 1), (8, 2)]
    assert found == [ReplacePayload(block, blocks, encoded(target(block, blocks))) for block, blocks in expected]


def test_blocks_as_xor_in_any_order(coder: UnitCoder) -> None:
    """In the order that was asked for, an empty piece included."""
    pieces = [np.array(piece, dtype=np.int64) for piece in ([3, 4, 1], [], [8])]
    found = list(coder.as_xor(pieces, moved))
    assert [[payload.block for payload in payloads] for payloads in found] == [[3, 4, 1], [], [8]]
    for block, start, payload in (payload for payloads in found for payload in payloads):
        assert start == block * BLOCK_SIZE + 500
        assert payload == encoded(difference(block, start))


def test_giving_up_a_copy_costs_its_block(coder: UnitCoder) -> None:
    """What it takes as a replace op of its own."""
    blocks = np.arange(10)
    assert coder.weigh(blocks, nowhere, nowhere).tolist() == [len(encoded(target(block))) for block in range(10)]


def test_giving_up_an_xor_saves_its_payload(coder: UnitCoder) -> None:
    """Only the difference is lost."""
    expected = [len(encoded(target(b))) - len(encoded(difference(b, b * BLOCK_SIZE + 500))) for b in range(9)]
    assert coder.weigh(np.arange(9), nowhere, moved).tolist() == expected


def test_what_is_given_up_may_be_the_xor_of_its_own_place() -> None:
    """The smaller of both counts."""
    edited = bytearray(SOURCE)
    edited[9 * BLOCK_SIZE] ^= 1
    edited[8 * BLOCK_SIZE] ^= 1
    coder = UnitCoder(store(SOURCE), store(bytes(edited)), CreateOptions(unit=16 << 10, jobs=1))
    eight, nine = coder.weigh(np.array([8, 9]), own_place, nowhere).tolist()
    assert nine == len(encoded(b"\1" + bytes(BLOCK_SIZE - 1)))
    assert eight == len(encoded(bytes(edited[8 * BLOCK_SIZE : 9 * BLOCK_SIZE]))) > 2000


def test_unit_by_unit_the_smaller_form(coder: UnitCoder) -> None:
    """Blocks with a source that are no smaller as XOR are left out; so is what has none."""
    found = {payload.block for payloads in coder.better_as_xor([Extent(0, 10)], moved) for payload in payloads}
    assert 8 in found
    assert 9 not in found
    sizes = {b: (len(encoded(target(b))), len(encoded(difference(b, b * BLOCK_SIZE + 500)))) for b in range(9)}
    assert all(xor < replace for b, (replace, xor) in sizes.items() if b in found)


def test_an_error_of_an_image_is_raised(coder: UnitCoder) -> None:
    """What cannot be read on a thread is not lost there."""
    with pytest.raises(SnapdError, match="behind the end"):
        list(coder.units([Extent(0, 4), Extent(9, 4)]))


def test_payloads_of_version_2() -> None:
    """COW-105: a stream stays a stream, and there is one block a unit."""
    options = CreateOptions(compression=CompressOption.parse("gz"), version=2, jobs=1)
    noise = Random(2).randbytes(2 * BLOCK_SIZE)
    (payloads,) = UnitCoder(store(noise), store(noise), options).units([Extent(0, 2)])
    assert [(p.block, p.blocks) for p in payloads] == [(0, 1), (1, 1)]
    assert all(len(p.payload) > BLOCK_SIZE for p in payloads)

"""Blocks as rows: read from anywhere, compared byte for byte."""

from random import Random

import numpy as np
from cowfiles import store
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.store import WritableBuffer
from snapd.cow.diff.blockrows import NONE, RowComparer, are_data, as_words, read_rows
from snapd.cow.format import BLOCK_SIZE

IMAGE = Random(1).randbytes(8 * BLOCK_SIZE)
# Places a block apart, so that runs come up, and some that look as if they went on from NONE.
_BLOCKS = st.integers(1, 7)
_STARTS = st.just(NONE) | _BLOCKS.map(lambda i: i * BLOCK_SIZE) | _BLOCKS.map(lambda i: i * BLOCK_SIZE - 1)


@given(st.lists(_STARTS, max_size=12))
@settings(max_examples=300, deadline=None)
def test_each_row_is_what_lies_at_its_byte(starts: list[int]) -> None:
    """Rows without a place stay as they were."""
    buffer = memoryview(bytearray(b"x" * (12 * BLOCK_SIZE)))
    rows = read_rows(store(IMAGE), starts, buffer)
    expected = [b"x" * BLOCK_SIZE if start == NONE else IMAGE[start : start + BLOCK_SIZE] for start in starts]
    assert [bytes(row) for row in rows] == expected


class _Counting:
    """An image that notes how much is read at a time."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        self.lengths.append(len(buffer))
        buffer[:] = IMAGE[offset : offset + len(buffer)]


def test_consecutive_blocks_are_one_read() -> None:
    """What lies side by side is read at once."""
    image = _Counting()
    read_rows(image, [5, 5 + BLOCK_SIZE, NONE, 0, 100], memoryview(bytearray(5 * BLOCK_SIZE)))
    assert image.lengths == [2 * BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE]


@given(st.lists(st.integers(0, BLOCK_SIZE) | st.just(0), max_size=40), st.integers(0, 1 << 32))
@settings(max_examples=100, deadline=None)
def test_equal_bytes_are_counted(differences: list[int], seed: int) -> None:
    """From none to all of a block, wherever they are."""
    random = Random(seed)
    one = bytearray(random.randbytes(len(differences) * BLOCK_SIZE))
    other = bytearray(one)
    for row, count in enumerate(differences):
        for at in random.sample(range(BLOCK_SIZE), count):
            other[row * BLOCK_SIZE + at] ^= 1 + random.randrange(255)
    one_rows, other_rows = (as_words(memoryview(raw), len(differences)) for raw in (one, other))
    comparer = RowComparer(40)
    every = np.arange(len(differences))
    assert comparer.equal_bytes(one_rows, every, other_rows, every).tolist() == [
        BLOCK_SIZE - count for count in differences
    ]
    assert comparer.differ(one_rows, other_rows).tolist() == [count > 0 for count in differences]
    assert are_data(one_rows ^ other_rows, every[::-1]).tolist() == [count > 0 for count in reversed(differences)]

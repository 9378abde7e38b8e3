"""Blocks of an image as the rows of a buffer: read from any bytes of it, compared all at once."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from snapd.block.store import Readable
from snapd.cow.format import BLOCK_SIZE

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

_LANES = BLOCK_SIZE // 1024
_FEW_ROWS = 16

NONE = -1
"""In place of a block, a byte or an op where there is none."""


def read_rows(image: Readable, starts: Sequence[int], buffer: memoryview) -> list[memoryview]:
    """One block from each of these bytes of the image, one behind the other; NONE leaves its row as it is."""
    row = 0
    while row < len(starts):
        first, start = row, starts[row]
        row += 1
        if start != NONE:
            while row < len(starts) and starts[row] == start + (row - first) * BLOCK_SIZE:
                row += 1
            image.read_into(buffer[first * BLOCK_SIZE : row * BLOCK_SIZE], start)
    return [buffer[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(len(starts))]


def as_words(buffer: memoryview, rows: int) -> Words:
    """The first rows of a buffer as 64-bit words, one block a row."""
    return np.frombuffer(buffer[: rows * BLOCK_SIZE], dtype=np.uint64).reshape(rows, BLOCK_SIZE // 8)


class RowComparer:
    """Compares up to `rows` rows at a time. For one thread.

    What is in between has its own room: large temporary arrays are mapped anew each time, and faulting them in would
    cost more than all the rest.
    """

    def __init__(self, rows: int) -> None:
        self._one = np.empty((rows, BLOCK_SIZE // 8), dtype=np.uint64)
        self._other = np.empty_like(self._one)
        self._flags = np.empty((rows, BLOCK_SIZE), dtype=np.bool_)

    def differ(self, one: Words, other: Words) -> Flags:
        """Which rows of two equally many are not the same."""
        flags = self._flags.reshape(-1)[: one.size].reshape(one.shape)
        np.not_equal(one, other, out=flags)
        differ: Flags = np.any(flags, axis=1)
        return differ

    def equal_bytes(self, one: Words, rows: Ints, other: Words, other_rows: Ints) -> Ints:
        """How many bytes of each of these rows, and the row of the other that goes with it, are equal."""
        count = len(rows)
        # "clip" as anything else would make take go through an array of its own.
        np.take(one, rows, axis=0, out=self._one[:count], mode="clip")
        np.take(other, other_rows, axis=0, out=self._other[:count], mode="clip")
        flags = self._flags[:count]
        np.equal(self._one[:count].view(np.uint8), self._other[:count].view(np.uint8), out=flags)
        # Added up as bytes in words, four times faster than one by one; 128 of them never carry.
        sums = flags.view(np.uint64).reshape(count, _LANES, 128).sum(axis=2)
        counts: Ints = sums.view(np.uint8).reshape(count, _LANES * 8).sum(axis=1, dtype=np.int64)
        return counts


def are_data(words: Words, rows: Ints) -> Flags:
    """Which of these rows are not all zeros."""
    # Nearly every block of data begins with something.
    data: Flags = words[rows, 0] != 0
    doubtful = np.flatnonzero(~data)
    for start in range(0, len(doubtful), _FEW_ROWS):
        some = doubtful[start : start + _FEW_ROWS]
        data[some] = words[rows[some]].any(axis=1)
    return data

"""XOR or replace: how the blocks of one unit are stored in the fewest bytes.

A block that differs little from some of the source is cheaper as the compressed difference of the two, but costs its
unit what it shares with its neighbours. So the unit is compressed both ways, and the smaller result is taken.
"""

from collections.abc import Container, Iterator, Mapping

from snapd.block.store import Buffer
from snapd.cow.compress import Encoder
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.write.writeroptions import unit_lengths


def cheaper_as_xor(
    encoder: Encoder, unit: memoryview, differences: Mapping[int, Buffer], op_size: int
) -> dict[int, bytes]:
    """The rows of `unit` that are better stored as XOR, with their payloads; none when the whole unit is smaller.

    `differences` has the XOR of target and source of the rows that have a source; `op_size` is what an op costs.
    """
    rows = len(unit) // BLOCK_SIZE
    best: dict[int, bytes] = {}
    best_size = len(encoder.encode(unit)) + op_size
    payloads = {row: encoder.encode(difference) for row, difference in differences.items()}
    # Either all of them, or those that are smaller than their part of the unit is on average.
    small = {row: payload for row, payload in payloads.items() if (len(payload) + op_size) * rows < best_size}
    for chosen in (payloads,) if len(small) == len(payloads) else (payloads, small):
        size = sum(len(payload) + op_size for payload in chosen.values())
        for start, blocks in _rest(rows, chosen):
            if size >= best_size:
                break
            size += len(encoder.encode(unit[start * BLOCK_SIZE : (start + blocks) * BLOCK_SIZE])) + op_size
        if size < best_size:
            best, best_size = chosen, size
    return best


def _rest(rows: int, without: Container[int]) -> Iterator[tuple[int, int]]:
    """The units (first row, blocks) that are left of `rows` rows without these."""
    row = 0
    while row < rows:
        first = row
        while row < rows and row not in without:
            row += 1
        for blocks in unit_lengths(row - first, rows):
            yield first, blocks
            first += blocks
        row += 1

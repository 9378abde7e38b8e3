"""What the blocks of a target become when they are stored: the payloads of replace and XOR ops, made on threads.

The results come in the order of the work, and no more than a few MiB of them are held at a time, whatever the number of
threads (COW-110).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from snapd.block.extent import Extent
from snapd.block.store import Readable, Store
from snapd.cow.diff.blockrows import NONE, Ints, as_words, read_rows
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.xordiff import cheaper_as_xor
from snapd.cow.format import BLOCK_SIZE, OP_SIZE_V2, OP_SIZE_V3
from snapd.cow.pool import OrderedPool
from snapd.cow.write.writeroptions import unit_lengths

TASK_BLOCKS = 256
"""The most blocks of one task; a multiple of every unit."""

SourceOf = Callable[[Ints], Ints]
"""For target blocks the byte of the source from which on each may be stored as XOR, or NONE."""

_Work = TypeVar("_Work")
_Result = TypeVar("_Result")


class XorPayload(NamedTuple):
    """A target block as the difference from the source bytes at byte `source`."""

    block: int
    source: int
    payload: bytes


class ReplacePayload(NamedTuple):
    """`blocks` target blocks from `block` as one unit."""

    block: int
    blocks: int
    payload: bytes


class UnitCoder:
    """Makes payloads from two images, as the options say."""

    def __init__(self, source: Store, target: Store, options: CreateOptions) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._op_size = OP_SIZE_V2 if options.version < 3 else OP_SIZE_V3

    def units(self, extents: Iterable[Extent]) -> Iterator[list[ReplacePayload]]:
        """The extents as replace units (COW-113); none is longer than `TASK_BLOCKS`."""
        return self._run(_tasks(extents), self._units)

    def better_as_xor(self, extents: Iterable[Extent], source_of: SourceOf) -> Iterator[list[XorPayload]]:
        """What of the extents takes fewer bytes as XOR, decided unit by unit; none is longer than `TASK_BLOCKS`."""
        return self._run(_tasks(extents), lambda bench, extents: self._better_as_xor(bench, extents, source_of))

    def as_xor(self, blocks: Iterable[Ints], source_of: SourceOf) -> Iterator[list[XorPayload]]:
        """These blocks as XOR, at most `TASK_BLOCKS` at a time; each has a source."""

        def encode(bench: "_Workbench", piece: Ints) -> list[XorPayload]:
            starts = source_of(piece)
            differences = bench.differences(self._target, self._source, piece, starts)
            return [
                XorPayload(block, start, bench.encoder.encode(difference))
                for block, start, difference in zip(piece.tolist(), starts.tolist(), differences, strict=True)
            ]

        return self._run(blocks, encode)

    def weigh(self, blocks: Ints, same_place: SourceOf, given_up: SourceOf) -> Ints:
        """Bytes by which each of these blocks grows when it is not what it is now: a copy, or the XOR of `given_up`.

        It then is a replace op of its own, or an XOR with its `same_place`.
        """

        def grows(bench: "_Workbench", piece: Ints) -> Ints:
            units = read_rows(self._target, (piece * BLOCK_SIZE).tolist(), bench.new)
            sizes = np.array([len(bench.encoder.encode(unit)) for unit in units])
            as_xor = self._xor_sizes(bench, piece, same_place)
            sizes = np.where(as_xor == NONE, sizes, np.minimum(sizes, as_xor))
            as_xor = self._xor_sizes(bench, piece, given_up)
            return np.where(as_xor == NONE, sizes, sizes - as_xor)

        pieces = (blocks[start : start + TASK_BLOCKS] for start in range(0, len(blocks), TASK_BLOCKS))
        return np.concatenate(list(self._run(pieces, grows)))

    def _xor_sizes(self, bench: "_Workbench", blocks: Ints, source_of: SourceOf) -> Ints:
        """How many bytes each of these blocks takes as XOR, or NONE."""
        starts = source_of(blocks)
        sizes = np.full(len(blocks), NONE)
        differences = bench.differences(self._target, self._source, blocks, starts)
        for i in np.flatnonzero(starts != NONE).tolist():
            sizes[i] = len(bench.encoder.encode(differences[i]))
        return sizes

    def _units(self, bench: "_Workbench", extents: list[Extent]) -> list[ReplacePayload]:
        payloads = []
        for extent in extents:
            unit = bench.new[: extent.length * BLOCK_SIZE]
            self._target.read_into(unit, extent.start * BLOCK_SIZE)
            block = extent.start
            for blocks in unit_lengths(extent.length, self._options.unit_blocks):
                payloads.append(ReplacePayload(block, blocks, bench.encoder.encode(unit[: blocks * BLOCK_SIZE])))
                unit = unit[blocks * BLOCK_SIZE :]
                block += blocks
        return payloads

    def _better_as_xor(self, bench: "_Workbench", extents: list[Extent], source_of: SourceOf) -> list[XorPayload]:
        payloads = []
        for extent in extents:
            blocks = np.arange(extent.start, extent.end)
            starts = source_of(blocks)
            rows = bench.differences(self._target, self._source, blocks, starts)
            row = 0
            for length in unit_lengths(extent.length, self._options.unit_blocks):
                unit = bench.new[row * BLOCK_SIZE : (row + length) * BLOCK_SIZE]
                differences = {i: rows[row + i] for i in np.flatnonzero(starts[row : row + length] != NONE).tolist()}
                if differences:
                    chosen = cheaper_as_xor(bench.encoder, unit, differences, self._op_size)
                    payloads += [
                        XorPayload(extent.start + row + i, int(starts[row + i]), payload)
                        for i, payload in chosen.items()
                    ]
                row += length
        return payloads

    def _run(self, tasks: Iterable[_Work], work: Callable[["_Workbench", _Work], _Result]) -> Iterator[_Result]:
        def given(task: _Work) -> Callable[[_Workbench], _Result]:
            return lambda bench: work(bench, task)

        jobs = self._options.jobs
        pool: OrderedPool[_Workbench, _Result] = OrderedPool(
            jobs, in_flight=2 * jobs, make_state=lambda: _Workbench(self._options)
        )
        return pool.run(given(task) for task in tasks)


class _Workbench:
    """What one thread works with: an encoder, and room for a task's blocks of each image."""

    def __init__(self, options: CreateOptions) -> None:
        self.encoder = options.writer_options(target_blocks=1).encoder()
        self.new = memoryview(bytearray(TASK_BLOCKS * BLOCK_SIZE))
        self._old = memoryview(bytearray(TASK_BLOCKS * BLOCK_SIZE))

    def differences(self, target: Readable, source: Readable, blocks: Ints, starts: Ints) -> list[memoryview]:
        """Each target block XOR the source from the byte in `starts` on; without meaning where that is NONE.

        The blocks themselves are in `new`, in the same order.
        """
        read_rows(target, (blocks * BLOCK_SIZE).tolist(), self.new)
        differences = read_rows(source, starts.tolist(), self._old)
        words = as_words(self._old, len(blocks))
        np.bitwise_xor(words, as_words(self.new, len(blocks)), out=words)
        return differences


def _tasks(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """The extents in lists of at most `TASK_BLOCKS` blocks."""
    task: list[Extent] = []
    blocks = 0
    for extent in extents:
        if blocks + extent.length > TASK_BLOCKS:
            yield task
            task, blocks = [], 0
        task.append(extent)
        blocks += extent.length
    if task:
        yield task

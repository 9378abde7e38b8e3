"""The rules of data ops that all versions share (section 9, the "Ours" column), as array comparisons.

Invariant: a rule is broken by no op that passed. What a lenient parse may let pass (COW-208) is noted op by op; all
else raises for the first op that breaks the rule. Messages are made only then. Ops are checked in parts, so that no
check needs memory of its own for all of them, but for the one that sorts.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import Compression, OpType
from snapd.cow.header import Header
from snapd.cow.parse.optable import OpTable

_PART_OPS = 1 << 15
_MAX_EXPONENT = 6
_Mask = npt.NDArray[np.bool_]


class OpChecks:
    """The checks of one file of `size` bytes; `offset_of` gives the byte offset of an op's record.

    Without a `tolerance` the parse is strict.
    """

    def __init__(self, header: Header, size: int, offset_of: Callable[[int], int], tolerance: Tolerance | None) -> None:
        self._header = header
        self._size = size
        self._offset_of = offset_of
        self._tolerance = tolerance

    def run(self, ops: OpTable) -> None:
        """Check all ops (V16, V18, V20, V22, V23, V27, V28, COW-107, COW-109).

        A payload elsewhere that is tolerated (V18) is put where its op says.
        """
        for start, part in ops.parts(_PART_OPS):
            self._check_part(start, part)
        self._check_overlap(ops)

    def _check_part(self, start: int, ops: OpTable) -> None:
        header, kind, exponent, length = self._header, ops.type, ops.exponent, ops.data_length
        source, payload = ops.source, ops.payload
        replace, zero = kind == OpType.REPLACE, kind == OpType.ZERO
        carries = replace | (kind == OpType.XOR)

        def refuse(bad: _Mask, statement: str, message: str) -> None:
            if bad.any():
                raise self._error(ops, start, int(bad.argmax()), statement, message)

        def tolerate(bad: _Mask, statement: str, message: str) -> None:
            if self._tolerance is None:
                refuse(bad, statement, message)
            else:
                found = np.flatnonzero(bad)
                errors = (self._error(ops, start, int(i), statement, message) for i in found)
                note_all(self._tolerance, errors, len(found))

        refuse(~(carries | zero | (kind == OpType.COPY)), "V22", "unknown op type {type}")
        tolerate(ops.reserved != 0, "V28", "reserved bits are set")
        tolerate(~carries & (length != 0), "V28", "payload of {data_length} bytes on an op without data")
        tolerate(zero & (source != 0), "V28", "source {source} on a zero op")
        highest = min(header.max_unit // header.block_size, 1 << _MAX_EXPONENT).bit_length() - 1
        too_long = np.where(replace, exponent > highest, exponent != 0)
        refuse(too_long, "V23", f"exponent {{exponent}} on an op of type {{type}}, units have {header.max_unit} bytes")
        refuse(carries & (length == 0), "COW-109", "an op without its payload")
        unit = np.uint32(header.block_size) << exponent
        if header.compression == Compression.NONE:
            refuse(carries & (length != unit), "COW-107", "payload of {data_length} bytes is not raw")
        elif header.version == 3:
            refuse(carries & (length > unit), "COW-109", "payload of {data_length} bytes for {blocks} blocks")
        refuse(ops.end > 1 << 32, "V16", "target blocks from {new_block} leave 32 bits")
        elsewhere = replace & (source != payload)
        if header.version == 3:
            refuse(elsewhere, "V18", "payload at byte {source} instead of {payload}")
        else:
            tolerate(elsewhere, "V18", "payload at byte {source} instead of {payload}")
            np.copyto(payload, source, where=elsewhere)
        outside = carries & ((payload < header.size) | (payload + length > self._size))
        refuse(outside, "V20", f"payload of {{data_length}} bytes at {{payload}}, the file has {self._size}")

    def _check_overlap(self, ops: OpTable) -> None:
        """V27: no target block twice. A sort of start and exponent in one number is all that a good file costs."""
        keys = ops.new_block.astype(np.uint64)
        keys <<= np.uint64(3)
        keys |= ops.exponent
        if (keys[1:] < keys[:-1]).any():
            keys.sort()
        for start in range(0, len(keys), _PART_OPS):
            part = keys[start : start + _PART_OPS + 1]
            first = part >> np.uint64(3)
            if (first[1:] < (first + (np.uint64(1) << (part & np.uint64(7))))[:-1]).any():
                break
        else:
            return
        del keys
        order = np.argsort(ops.new_block, kind="stable")
        first, end = ops.new_block[order].astype(np.uint64), ops.end[order]
        reach = np.maximum.accumulate(end)
        # The op that reaches farthest so far: what the next one runs into.
        holder = order[np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))]
        found = np.flatnonzero(first[1:] < reach[:-1])

        def overlap(place: int) -> CowError:
            one, two = sorted((int(holder[place]), int(order[place + 1])))
            message = f"target block {first[place + 1]} is already written by op {one}"
            return CowError(message, statement="V27", op_index=two, offset=self._offset_of(two))

        if self._tolerance is None:
            raise overlap(int(found[0]))
        note_all(self._tolerance, (overlap(int(place)) for place in found), len(found))

    def _error(self, ops: OpTable, start: int, index: int, statement: str, message: str) -> CowError:
        """`message` may name any column of the op."""
        names = ("type", "exponent", "new_block", "blocks", "source", "data_length", "payload")
        one = ops.part(index, index + 1)
        fields = {name: int(getattr(one, name)[0]) for name in names}
        index += start
        return CowError(message.format(**fields), statement=statement, op_index=index, offset=self._offset_of(index))


def check_sequence(
    sequence: npt.NDArray[np.uint32], ops: OpTable, offset_of: Callable[[int], int], *, whole: bool
) -> None:
    """A sequence names no block twice (COW-67) and, where all ops are there, no block without an op (V19).

    `offset_of` gives the byte offset of an entry.
    """
    if not len(sequence):
        return
    blocks, starts = np.sort(sequence), np.sort(ops.new_block)

    def refuse(block: np.uint32, what: str, statement: str, *, which: int = 0) -> None:
        entry = int(np.flatnonzero(sequence == block)[which])
        raise CowError(f"the sequence names block {block}{what}", statement=statement, offset=offset_of(entry))

    twice = blocks[1:] == blocks[:-1]
    if twice.any():
        refuse(blocks[twice.argmax()], " twice", "COW-67", which=1)
    if whole:
        found = np.searchsorted(starts, blocks, side="right") > np.searchsorted(starts, blocks)
        if not found.all():
            refuse(blocks[found.argmin()], ", which has no op", "V19")


def note_all(tolerance: Tolerance, errors: Iterator[CowError], count: int) -> None:
    """Note the errors, of which there are `count`; those that are only counted are not made."""
    room = max(0, min(count, Tolerance.LIMIT - len(tolerance.notes)))
    for error in islice(errors, room):
        tolerance.note(error)
    tolerance.count += count - room

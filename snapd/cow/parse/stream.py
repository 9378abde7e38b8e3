"""Reading versions 1 and 2: records and payloads in one stream, up to a footer or a label (section 4).

Invariant: ops come out in version 3 form with the offset of every payload, kept by op (COW-36, COW-224), so that
nothing above this line knows the difference.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from snapd.block.store import Store, read_bytes
from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import DATA_TYPES, SOURCE_BITS, Compression, OpType
from snapd.cow.header import Header
from snapd.cow.parse.checks import OpChecks, check_sequence
from snapd.cow.parse.optable import OpTable
from snapd.cow.parse.parsed import End, Label, Parsed
from snapd.cow.parse.walk import RECORD, StreamWalk

_Mask = npt.NDArray[np.bool_]
_IS_DATA = np.zeros(256, dtype=np.bool_)
_IS_DATA[list(DATA_TYPES)] = True


def read_stream(store: Store, header: Header, size: int, *, label: int | None, tolerance: Tolerance | None) -> Parsed:
    """The file of `size` bytes, cut at `label`, checked; strict without a `tolerance`."""
    walk = StreamWalk(store, header, size, label)
    end = walk.run()
    records = _Records(walk)
    header = replace(header, compression=records.compression())
    records.check_fields()
    positions = walk.data_positions()
    sequence, entry_offset = records.sequence(store, size, positions)
    labels = records.labels()
    ops = OpTable(records.packed(), positions[records.is_data])
    del positions
    OpChecks(header, size, records.op_offset, tolerance).run(ops)
    check_sequence(sequence, ops, entry_offset, whole=end is End.FINISHED)
    ops.payload.flags.writeable = False
    return Parsed(header, ops, len(ops) if end is End.FINISHED else None, sequence, labels, end, walk.cursor)


class _Records:
    """The records of a walk as columns."""

    def __init__(self, walk: StreamWalk) -> None:
        self._walk = walk
        self._table = np.frombuffer(walk.records, dtype=RECORD)
        self._type = self._table["type"]
        self.is_data: _Mask = _IS_DATA[self._type]

    def op_offset(self, index: int) -> int:
        """The byte offset of the record of a data op."""
        return self._walk.record_offset(int(np.flatnonzero(self.is_data)[index]))

    def compression(self) -> Compression:
        """The one code other than 0 (COW-18); V24 for one that is unknown, V17 for a second one."""
        codes = self._walk.records[1 :: RECORD.itemsize]
        used = codes.lstrip(b"\0")
        if not used:
            return Compression.NONE
        first = used[0]
        if first not in Compression._value2member_map_:
            self._refuse(codes.index(first), "V24", f"unknown compression {first}")
        others = used.translate(None, bytes((0, first)))
        if others:
            self._refuse(codes.index(others[0]), "V17", f"compression {others[0]} in a file that has {first}")
        return Compression(first)

    def check_fields(self) -> None:
        """What version 3 has no room for (V16, COW-19); labels have all 64 bits."""
        new_block, source = self._table["new_block"], self._table["source"]
        self._check(new_block >> np.uint64(32) != 0, "V16", "target block {new_block} needs more than 32 bits")
        wide = (source >> np.uint64(SOURCE_BITS) != 0) & (self._type != OpType.LABEL)
        self._check(wide, "V16", "source {source} needs more than 48 bits")

    def labels(self) -> tuple[Label, ...]:
        """All labels, in their order."""
        found = np.flatnonzero(self._type == OpType.LABEL)
        before = np.searchsorted(np.flatnonzero(self.is_data), found)
        return tuple(map(Label, self._table["source"][found].tolist(), before.tolist()))

    def packed(self) -> memoryview:
        """The data ops in version 3 form."""
        words = np.empty((int(np.count_nonzero(self.is_data)), 2), dtype="<u8")
        words[:, 0] = self._table["new_block"][self.is_data]
        words[:, 0] <<= np.uint64(32)
        words[:, 0] |= self._table["data_length"][self.is_data]
        words[:, 1] = self._type[self.is_data]
        words[:, 1] <<= np.uint64(60)
        words[:, 1] |= self._table["source"][self.is_data]
        return words.reshape(-1).view(np.uint8).data.toreadonly()

    def sequence(
        self, store: Store, size: int, positions: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.uint32], Callable[[int], int]]:
        """The lists of all sequence ops as one (COW-58), and where in the file an entry of it lies."""
        found = np.flatnonzero(self._type == OpType.SEQUENCE)
        starts, lengths = positions[found], self._table["data_length"][found].astype(np.uint64)
        if len(found):
            other = (self._type != OpType.SEQUENCE) & (self._type != OpType.CLUSTER)
            late = found[found > other.argmax()] if other.any() else found[:0]
            if len(late):
                self._refuse(int(late[0]), "COW-58", "a sequence op behind other ops")
        for bad, statement, message in (
            (lengths % 4 != 0, "COW-58", "a sequence of {data_length} bytes"),
            (self._table["source"][found] != starts, "COW-37", "sequence at byte {source}, which is not its place"),
            (starts + lengths > size, "V20", f"a sequence of {{data_length}} bytes, the file has only {size}"),
        ):
            if bad.any():
                self._refuse(int(found[bad.argmax()]), statement, message)
        raw = b"".join(
            read_bytes(store, start, length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        )
        before = np.cumsum(lengths) - lengths

        def offset_of(entry: int) -> int:
            piece = int(np.searchsorted(before, 4 * entry, side="right")) - 1
            return int(starts[piece]) + 4 * entry - int(before[piece])

        return np.frombuffer(raw, dtype="<u4"), offset_of

    def _check(self, bad: _Mask, statement: str, message: str) -> None:
        if bad.any():
            self._refuse(int(bad.argmax()), statement, message)

    def _refuse(self, index: int, statement: str, message: str) -> None:
        """`message` may name any field of the record; an op index is given for data ops, which alone have one."""
        fields = {name: int(self._table[name][index]) for name in ("type", "data_length", "new_block", "source")}
        op_index = int(np.count_nonzero(self.is_data[:index])) if self.is_data[index] else None
        offset = self._walk.record_offset(index)
        raise CowError(message.format(**fields), statement=statement, op_index=op_index, offset=offset)

"""Finding the records of a version 1 or 2 stream (section 4): cluster by cluster, or one by one without clusters.

Invariant: the walk only moves forward and never leaves the file, so it ends whatever the records say; each cluster is
looked at as a whole, and a payload area lies exactly where the lengths of the records put it (COW-29, COW-35).
"""

import re
from array import array
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from snapd.block.store import Store, read_bytes
from snapd.cow.cursor import Cursor
from snapd.cow.errors import CowError
from snapd.cow.format import DATA_TYPES, FOOTER_SIZE, OP_SIZE_V2, OP_V2, OpType
from snapd.cow.header import Header
from snapd.cow.parse.parsed import End, name_labels

RECORD = np.dtype(
    [("type", "u1"), ("compression", "u1"), ("data_length", "<u2"), ("new_block", "<u8"), ("source", "<u8")]
)
_READ_AHEAD_BYTES = 64 << 10
_RECORDS_AT_ONCE = 8192
_PLAIN = frozenset((OpType.COPY, OpType.REPLACE, OpType.ZERO, OpType.XOR, OpType.LABEL, OpType.SEQUENCE))
_NOT_PLAIN = re.compile(b"[^" + re.escape(bytes(sorted(_PLAIN))) + b"]")


class StreamWalk:
    """One walk over the stream of a file of `size` bytes.

    Afterwards `records` has all records that count, the label's included and the footer not, and `cursor` lies behind
    the last of them.
    """

    def __init__(self, store: Store, header: Header, size: int, label: int | None) -> None:
        self.records = bytearray()
        self.cursor = Cursor.at(header.sequence_start, header.cluster_ops)
        self._store = store
        self._size = size
        self._label = label
        self._window = b""
        self._window_start = 0
        # Records that follow each other without payloads between them: their first, its offset, and its data_pos.
        self._first, self._offset, self._data_pos = array("Q"), array("Q"), array("Q")

    def run(self) -> End:
        """Walk to the footer or the label; V11 to V15, V20, V22 and V26 where neither is reached."""
        step = self._pass_area if self.cursor.cluster_ops else self._pass_one
        while (end := step()) is None:
            pass
        return end

    def record_offset(self, index: int) -> int:
        """The byte offset of a record."""
        piece = int(np.searchsorted(np.frombuffer(self._first, dtype="<u8"), index, side="right")) - 1
        return self._offset[piece] + OP_SIZE_V2 * (index - self._first[piece])

    def data_positions(self) -> npt.NDArray[np.uint64]:
        """For every record where its payload lies, or would lie."""
        length = np.frombuffer(self.records, dtype=RECORD)["data_length"]
        position = np.cumsum(length, dtype=np.uint64)
        position -= length
        first = np.frombuffer(self._first, dtype="<u8").astype(np.int64)
        # The last piece may have no record.
        first = first[first < len(length)]
        base = np.frombuffer(self._data_pos, dtype="<u8")[: len(first)] - position[first]
        position += np.repeat(base, np.diff(first, append=len(length)))
        return position

    def _pass_area(self) -> End | None:
        """Pass the records of a cluster up to the first that is special, and that one."""
        cursor = self.cursor
        room = cursor.cluster_ops - cursor.used
        if not room:
            raise CowError(
                f"{cursor.used} records and no cluster op behind them", statement="COW-28", offset=cursor.op_pos
            )
        count = min(room, _RECORDS_AT_ONCE, (self._size - cursor.op_pos) // OP_SIZE_V2)
        if count <= 0:
            self._refuse_unfinished()
        area = self._read(cursor.op_pos, count * OP_SIZE_V2)
        special = _NOT_PLAIN.search(area[::OP_SIZE_V2])
        plain = special.start() if special else count
        if self._label is not None:
            records = np.frombuffer(area, dtype=RECORD)[:plain]
            found = np.flatnonzero((records["type"] == OpType.LABEL) & (records["source"] == self._label))
            if len(found):
                self._keep(area, int(found[0]) + 1)
                return End.LABEL
        self._keep(area, plain)
        return self._pass_special(area[plain * OP_SIZE_V2 :]) if special else None

    def _keep(self, area: bytes, count: int) -> None:
        """Take the first `count` records of an op area, which are plain."""
        self._begin_piece()
        kept = area[: count * OP_SIZE_V2]
        self.records += kept
        self.cursor.pass_plain(count, sum(kept[2::OP_SIZE_V2]) + (sum(kept[3::OP_SIZE_V2]) << 8))

    def _pass_one(self) -> End | None:
        """Pass one record of a stream without clusters, and its payload."""
        cursor = self.cursor
        if self._size - cursor.op_pos < OP_SIZE_V2:
            self._refuse_unfinished()
        record = self._read(cursor.op_pos, OP_SIZE_V2)
        kind, _, data_length, _, source = OP_V2.unpack(record)
        if kind == OpType.SEQUENCE:
            # The next record lies where the list would be.
            message = "a sequence op in a stream without clusters"
            raise CowError(message, statement="COW-26", offset=cursor.op_pos)
        if kind not in _PLAIN:
            return self._pass_special(record)
        self._begin_piece()
        self.records += record
        cursor.pass_record(kind, data_length, source)
        return End.LABEL if kind == OpType.LABEL and source == self._label else None

    def _pass_special(self, area: bytes) -> End | None:
        """Pass the first record of what is left of an op area: a cluster op, the footer, or nothing that is valid."""
        cursor = self.cursor
        kind, _, data_length, new_block, source = OP_V2.unpack_from(area)
        if kind == OpType.CLUSTER and cursor.cluster_ops:
            offset, data_end = cursor.op_pos, cursor.data_pos
            self.records += area[:OP_SIZE_V2]
            cursor.pass_record(kind, data_length, source)
            if data_length or cursor.op_pos != data_end:
                message = f"the cluster op leads to byte {cursor.op_pos}, the cluster's payloads end at {data_end}"
                raise CowError(message, statement="V26", offset=offset)
            if data_end > self._size:
                message = f"the cluster ends at byte {data_end}, the file has {self._size}"
                raise self._cut_off(message, "V26", offset)
            return None
        if kind == OpType.FOOTER:
            if cursor.op_pos + FOOTER_SIZE > self._size:
                message = f"a footer of {self._size - cursor.op_pos} bytes, not {FOOTER_SIZE}"
                raise CowError(message, statement="V13", offset=cursor.op_pos)
            if (new_block, source) != (cursor.records * OP_SIZE_V2, cursor.records):
                message = f"the footer counts {source} records in {new_block} bytes, there are {cursor.records}"
                raise CowError(message, statement="V14", offset=cursor.op_pos)
            if self._label is not None:
                raise self._no_label()
            return End.FINISHED
        if not any(area):
            # The rest of an op area that was never written to (COW-40).
            self._refuse_unfinished()
        raise CowError(f"unknown op type {kind}", statement="V22", offset=cursor.op_pos)

    def _refuse_unfinished(self) -> NoReturn:
        """The file ends, or has no more records, and neither footer nor label was met."""
        if self._label is not None:
            raise self._no_label()
        position = self.cursor.op_pos
        if position > self._size:
            message = f"the payload ends at byte {position}, the file has {self._size}"
            last = sum(kind in DATA_TYPES for kind in self.records[::OP_SIZE_V2]) - 1
            raise self._cut_off(message, "V20", self._offset[-1], op_index=last)
        if self._size - position < OP_SIZE_V2 and position != self._size:
            raise self._cut_off(f"a record of {self._size - position} bytes", "V11", position)
        raise self._cut_off("no footer", "V12", position)

    def _cut_off(self, message: str, statement: str, offset: int, *, op_index: int | None = None) -> CowError:
        hint = f"; the file is unfinished: it can be read up to a label, {name_labels(self._labels())}"
        message += hint * (self._label is None)
        return CowError(message, statement=statement, offset=offset, op_index=op_index)

    def _no_label(self) -> CowError:
        message = f"no label {self._label}: {name_labels(self._labels())}"
        return CowError(message, statement="V15", offset=self.cursor.op_pos)

    def _labels(self) -> list[int]:
        records = np.frombuffer(self.records, dtype=RECORD)
        labels: list[int] = records["source"][records["type"] == OpType.LABEL].tolist()
        return labels

    def _begin_piece(self) -> None:
        self._first.append(self.cursor.records)
        self._offset.append(self.cursor.op_pos)
        self._data_pos.append(self.cursor.data_pos)

    def _read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, out of a window that is read ahead."""
        start = offset - self._window_start
        if not 0 <= start <= len(self._window) - length:
            self._window = read_bytes(self._store, offset, min(max(length, _READ_AHEAD_BYTES), self._size - offset))
            self._window_start, start = offset, 0
        return self._window[start : start + length]

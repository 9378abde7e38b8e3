"""Reading version 3: sequence, resume points and ops in regions of their own (section 5).

Invariant: nothing is read, and no memory taken, for a header field before the file is known to be that long.
"""

import numpy as np
import numpy.typing as npt

from snapd.block.store import Store, read_bytes
from snapd.cow.errors import CowError, Tolerance
from snapd.cow.format import OP_SIZE_V3, RESUME_POINT_SIZE
from snapd.cow.header import Header
from snapd.cow.parse.checks import OpChecks, check_sequence, note_all
from snapd.cow.parse.optable import OpTable
from snapd.cow.parse.parsed import End, Label, Parsed, name_labels


def read_regions(store: Store, header: Header, size: int, *, label: int | None, tolerance: Tolerance | None) -> Parsed:
    """The file of `size` bytes, cut at `label`, checked; strict without a `tolerance`."""
    sequence = _read_sequence(store, header, size)
    points = _Points(store, header, size)
    count = header.op_count if label is None else points.ops_before(label, lenient=tolerance is not None)
    if tolerance is not None:
        points.note_too_far(tolerance)
    ops = _read_ops(store, header, size, count)
    OpChecks(header, size, lambda index: header.ops_start + OP_SIZE_V3 * index, tolerance).run(ops)
    check_sequence(sequence, ops, lambda index: header.sequence_start + 4 * index, whole=label is None)
    ops.payload.flags.writeable = False
    end = End.OPEN if label is None else End.LABEL
    return Parsed(header, ops, header.op_count, sequence, points.labels(label), end, None)


class _Points:
    """The resume points that are to be believed, and those of more ops than there are (V32).

    Labels grow from slot to slot and op counts do not shrink; what breaks this was left behind by an append at an older
    label, or is no point at all (COW-84, COW-85).
    """

    def __init__(self, store: Store, header: Header, size: int) -> None:
        slots = min(header.resume_point_count, header.resume_point_max)
        slots = min(slots, (size - header.resume_start) // RESUME_POINT_SIZE)
        raw = np.frombuffer(read_bytes(store, header.resume_start, slots * RESUME_POINT_SIZE), dtype="<u8")
        label, count = raw[0::2], raw[1::2]
        grows = np.ones(slots, dtype=np.bool_)
        grows[1:] = label[1:] > np.maximum.accumulate(label)[:-1]
        possible = grows & (count <= header.op_count)
        reached = np.maximum.accumulate(np.where(possible, count, 0))
        # Ops that get fewer again: here begins what an append at an older label has left behind.
        left_behind = possible & (count < reached)
        if left_behind.any():
            grows[left_behind.argmax() :] = False
        self._header = header
        self._slot = np.flatnonzero(grows)
        self._label, self._count = label[grows], count[grows]
        self._too_far = self._count > header.op_count

    def labels(self, last: int | None = None) -> tuple[Label, ...]:
        """The points that can be resumed at, up to the label `last`."""
        found = ~self._too_far if last is None else ~self._too_far & (self._label <= last)
        return tuple(map(Label, self._label[found].tolist(), self._count[found].tolist()))

    def ops_before(self, label: int, *, lenient: bool) -> int:
        """How many ops lie before a label (COW-86); V15 without that label, V32 if there are not so many."""
        found = np.flatnonzero(self._label == label)
        if not len(found):
            present = name_labels([point.label for point in self.labels()])
            raise CowError(f"no label {label}: {present}", statement="V15", offset=self._header.resume_start)
        index = int(found[0])
        if self._too_far[index] and not lenient:
            raise self._error(index)
        return min(int(self._count[index]), self._header.op_count)

    def note_too_far(self, tolerance: Tolerance) -> None:
        """Note every point of more ops than there are."""
        found = np.flatnonzero(self._too_far)
        note_all(tolerance, map(self._error, found.tolist()), len(found))

    def _error(self, index: int) -> CowError:
        message = f"label {self._label[index]} stands behind {self._count[index]} ops, there are"
        offset = self._header.resume_start + RESUME_POINT_SIZE * int(self._slot[index])
        return CowError(f"{message} {self._header.op_count}", statement="V32", offset=offset)


def _read_sequence(store: Store, header: Header, size: int) -> npt.NDArray[np.uint32]:
    start, length = header.sequence_start, 4 * header.sequence_data_count
    if start + length > size:
        message = f"a sequence of {header.sequence_data_count} blocks leaves the file of {size} bytes"
        raise CowError(message, statement="V11", offset=start)
    return np.frombuffer(read_bytes(store, start, length), dtype="<u4")


def _read_ops(store: Store, header: Header, size: int, count: int) -> OpTable:
    start, length = header.ops_start, count * OP_SIZE_V3
    if length and start + length > size:
        message = f"the op region ends at byte {start + length}, the file has {size}"
        raise CowError(message, statement="V11", offset=start)
    records = np.empty(length, dtype=np.uint8)
    if length:
        store.read_into(records.data, start)
    # Payloads follow each other in op order (COW-45).
    data_length = records.view("<u4")[0::4]
    payload = np.cumsum(data_length, dtype=np.uint64)
    payload -= data_length
    payload += np.uint64(header.data_start)
    return OpTable(records.data.toreadonly(), payload)

"""Writing a COW v3 file.

Order of writes (COW-95, COW-96; a stop after a step leaves what the third column says):

| step | action | a crash after it leaves |
| --- | --- | --- |
| 1 | header with op_count 0, zeroed scratch, flush | a valid, empty file |
| 2 | payloads and op records | the same: nothing counts before the header says so |
| 3 | flush | the same |
| 4 | header with the real op_count, flush | the finished file |

A file that must never be seen empty (`cow create`) is written under another name and renamed after step 4.
"""

import errno

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, Store
from snapd.cow.compress import CompressOption
from snapd.cow.errors import CowError
from snapd.cow.format import (
    MAX_OP_COUNT,
    MAX_UNIT,
    MIN_UNIT,
    PROGRESS,
    PROGRESS_OFFSET,
    SCRATCH_SIZE,
    Header,
    Op,
    OpType,
)

_WRITE_BYTES = 1 << 20


def check_unit_size(unit: int) -> None:
    """EINVAL unless `unit` is a legal largest replace unit in bytes (COW-112)."""
    if not MIN_UNIT <= unit <= MAX_UNIT or unit & (unit - 1):
        raise SnapdError(errno.EINVAL, f"unit of {unit} bytes: not a power of two from 4 to 256 KiB (COW-112)")


def unit_lengths(blocks: int, unit_blocks: int) -> list[int]:
    """How a run of `blocks` is cut into units: the largest power of two that fits, again and again (COW-113)."""
    lengths = [unit_blocks] * (blocks // unit_blocks)
    rest = blocks % unit_blocks
    while rest:
        lengths.append(1 << (rest.bit_length() - 1))
        rest -= lengths[-1]
    return lengths


class CowWriter:
    """Appends ops to a new file in merge order; the file counts from `finalize` on.

    Callers map no target block twice (COW-61) and put copies in an order that merges (COW-75).
    """

    def __init__(
        self,
        store: Store,
        *,
        op_count_max: int,
        option: CompressOption,
        unit: int = MIN_UNIT,
        scratch: bool = True,
    ) -> None:
        check_unit_size(unit)
        if not 0 <= op_count_max <= MAX_OP_COUNT:
            raise SnapdError(errno.EINVAL, f"{op_count_max} op slots: a file holds at most {MAX_OP_COUNT} (COW-49)")
        self._store = store
        self._header = Header(
            buffer_size=SCRATCH_SIZE if scratch else 0,
            op_count_max=op_count_max,
            compression=option.algorithm,
            max_compression_size=unit,
        )
        self._ops = bytearray()
        self._op_count = 0
        self._payloads = bytearray()
        self._data_end = self._header.data_start
        store.write(self._header.pack() + bytes(self._header.buffer_size), 0)
        store.flush()

    @property
    def size(self) -> int:
        """Bytes of the finished file (COW-132)."""
        return self._data_end

    def copy(self, new_block: int, source_block: int) -> None:
        """Target block `new_block` is source block `source_block`."""
        self._append(Op(OpType.COPY, new_block, 1, source_block, 0))

    def zero(self, new_block: int) -> None:
        """Target block `new_block` is all zeros."""
        self._append(Op(OpType.ZERO, new_block, 1, 0, 0))

    def replace(self, new_block: int, blocks: int, payload: Buffer) -> None:
        """`blocks` target blocks (a power of two) from `new_block`, stored as `payload`."""
        self._append(Op(OpType.REPLACE, new_block, blocks, self._data_end, len(payload)))
        self._payloads += payload
        self._data_end += len(payload)
        if len(self._payloads) >= _WRITE_BYTES:
            self._write_payloads()

    def finalize(self) -> None:
        """Make everything appended so far the durable content of the file (COW-92, COW-96)."""
        self._write_payloads()
        self._store.write(self._ops, self._header.ops_start)
        self._store.flush()
        self._store.write(self._header.with_ops(self._op_count).pack(), 0)
        self._store.flush()

    def _append(self, op: Op) -> None:
        if self._op_count >= self._header.op_count_max:
            raise CowError(
                f"all {self._header.op_count_max} op slots are used", statement="COW-127", number=errno.ENOSPC
            )
        self._ops += op.pack()
        self._op_count += 1

    def _write_payloads(self) -> None:
        if self._payloads:
            self._store.write(self._payloads, self._data_end - len(self._payloads))
            self._payloads = bytearray()


def mark_merged(store: Store, op_count: int) -> None:
    """Durably say in a COW of `op_count` ops that all of them are in the base (COW-145, COW-146)."""
    store.write(PROGRESS.pack(op_count), PROGRESS_OFFSET)
    store.flush()

"""Where the next record and the next payload of a version 1 or 2 stream lie (COW-35).

Reader and writer walk a stream with the same two positions, so neither can disagree with the other about a layout.
"""

from dataclasses import dataclass

from snapd.cow.format import OP_SIZE_V2, OpType


@dataclass(slots=True)
class Cursor:
    """Byte positions in the file; `records` counts all records passed, `used` those in the current cluster."""

    cluster_ops: int
    op_pos: int
    data_pos: int
    records: int = 0
    used: int = 0

    @classmethod
    def at(cls, start: int, cluster_ops: int) -> "Cursor":
        """The cursor at the beginning of a stream whose first record lies at `start`."""
        return cls(cluster_ops, start, start + OP_SIZE_V2 * max(cluster_ops, 1))

    @property
    def cluster_start(self) -> int:
        """Where the op area of the current cluster begins."""
        return self.op_pos - OP_SIZE_V2 * self.used

    @property
    def has_data(self) -> bool:
        """Whether the current cluster has payloads."""
        return bool(self.cluster_ops) and self.data_pos > self.cluster_start + OP_SIZE_V2 * self.cluster_ops

    @property
    def is_full(self) -> bool:
        """Whether the next record must be a cluster op (COW-31)."""
        return bool(self.cluster_ops) and self.cluster_ops - self.used < 2

    def pass_plain(self, count: int, data_bytes: int) -> None:
        """Go on behind `count` records of a cluster, none of them a cluster op, whose payloads have `data_bytes`."""
        self.records += count
        self.used += count
        self.op_pos += OP_SIZE_V2 * count
        self.data_pos += data_bytes

    def pass_record(self, kind: int, data_length: int, source: int) -> None:
        """Go on behind a record and its payload, as the table of COW-35 says."""
        self.records += 1
        self.used += 1
        if kind == OpType.CLUSTER:
            self.op_pos += OP_SIZE_V2 + source
            self.data_pos += data_length + self.cluster_ops * OP_SIZE_V2
            self.used = 0
        elif self.cluster_ops:
            self.op_pos += OP_SIZE_V2
            self.data_pos += data_length
        else:
            self.op_pos += OP_SIZE_V2 + (data_length if kind in (OpType.REPLACE, OpType.XOR) else 0)
            self.data_pos += data_length + OP_SIZE_V2

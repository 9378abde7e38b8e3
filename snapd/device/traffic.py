"""What a device has done for its clients since the host's start: counts, bytes and latencies by kind of request."""

from typing import Any

from snapd.block.bio import BioOp
from snapd.device.latency import LatencyHistogram


class Traffic:
    """Counted by the exports when the answer is ready to leave; a latency runs from the request's arrival to there."""

    def __init__(self) -> None:
        self.reads = 0
        self.read_bytes = 0
        self.writes = 0
        self.write_bytes = 0
        self.flushes = 0
        self.discards = 0
        self.zeroes = 0
        self.errors = 0
        self._read_latency = LatencyHistogram()
        self._write_latency = LatencyHistogram()
        self._flush_latency = LatencyHistogram()

    def count_reads(self, count: int, length: int, us: int, errors: int = 0) -> None:
        """`count` reads of `length` bytes together, answered after `us` microseconds; `errors` of them failed."""
        self.reads += count
        self.read_bytes += length
        self.errors += errors
        self._read_latency.add(us, count)

    def count(self, op: BioOp, length: int, us: int, *, failed: bool) -> None:
        """One request that is not a read."""
        self.errors += failed
        if op is BioOp.WRITE:
            self.writes += 1
            self.write_bytes += length
            self._write_latency.add(us)
        elif op is BioOp.FLUSH:
            self.flushes += 1
            self._flush_latency.add(us)
        elif op is BioOp.DISCARD:
            self.discards += 1
        else:
            self.zeroes += 1

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `stats` reply."""
        return {
            "reads": self.reads,
            "read_bytes": self.read_bytes,
            "writes": self.writes,
            "write_bytes": self.write_bytes,
            "flushes": self.flushes,
            "discards": self.discards,
            "zeroes": self.zeroes,
            "errors": self.errors,
            "read_latency": self._read_latency.buckets(),
            "write_latency": self._write_latency.buckets(),
            "flush_latency": self._flush_latency.buckets(),
        }

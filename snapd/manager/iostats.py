"""Rates and latencies of a device: the difference of what its host said at two moments.

A host that was started anew between them has counted from zero; then the figures are since its start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snapd.device.latency import difference, percentile

Counters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Latency:
    """Of `count` requests, in microseconds; all 0 when there were none."""

    count: int = 0
    p50_us: float = 0.0
    p95_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0

    @classmethod
    def of(cls, buckets: Sequence[Sequence[int]]) -> "Latency":
        """From a histogram of `snapd.device.latency`."""
        count = sum(of_bucket for _, of_bucket in buckets)
        p50, p95, p99, largest = (percentile(buckets, fraction) for fraction in (0.5, 0.95, 0.99, 1.0))
        return cls(count, p50, p95, p99, largest)


@dataclass(frozen=True, slots=True)
class IoStats:
    """`counters` as the host said them last; rates (a second) and latencies are about the `period_ms` before."""

    counters: Counters
    period_ms: int
    reads_per_second: float
    read_bytes_per_second: float
    writes_per_second: float
    write_bytes_per_second: float
    read_latency: Latency
    write_latency: Latency
    flush_latency: Latency


def io_stats(now: Counters, before: Counters | None = None) -> IoStats:
    """Since `before`, or since the start of the host."""
    if before is not None and (before["pid"] != now["pid"] or before["uptime_ms"] > now["uptime_ms"]):
        before = None
    start: Counters = before or {}
    period_ms = int(now["uptime_ms"]) - int(start.get("uptime_ms", 0))

    def rate(name: str) -> float:
        return (int(now[name]) - int(start.get(name, 0))) * 1000 / period_ms if period_ms > 0 else 0.0

    def latency(name: str) -> Latency:
        return Latency.of(difference(now[name], start.get(name, ())))

    return IoStats(
        counters=now,
        period_ms=period_ms,
        reads_per_second=rate("reads"),
        read_bytes_per_second=rate("read_bytes"),
        writes_per_second=rate("writes"),
        write_bytes_per_second=rate("write_bytes"),
        read_latency=latency("read_latency"),
        write_latency=latency("write_latency"),
        flush_latency=latency("flush_latency"),
    )

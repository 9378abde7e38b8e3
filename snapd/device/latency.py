"""Latencies as a histogram: cheap to add to, small to send, exact to an eighth.

The bucket of a value is its highest four bits: below 16 us every microsecond has its own, above it each bucket is at
most an eighth of its value wide.
"""

from collections.abc import Sequence

_FINE = 8


class LatencyHistogram:
    """Counts of microseconds since the host's start."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, us: int, count: int = 1) -> None:
        """Count `count` requests that took `us` microseconds."""
        shift = max(0, us.bit_length() - 4)
        bucket = shift * _FINE + (us >> shift)
        self._counts[bucket] = self._counts.get(bucket, 0) + count

    def buckets(self) -> list[list[int]]:
        """`[upper bound in us, count]` of each bucket that has any, ascending."""
        return [[_upper(bucket), count] for bucket, count in sorted(self._counts.items())]


def _upper(bucket: int) -> int:
    shift = max(0, bucket // _FINE - 1)
    return (bucket - shift * _FINE + 1) << shift


def percentile(buckets: Sequence[Sequence[int]], fraction: float) -> float:
    """The latency in us that `fraction` (0 to 1) of the counted requests did not exceed; 0 for none."""
    total = sum(count for _, count in buckets)
    wanted = fraction * total
    seen = 0
    for upper, count in buckets:
        seen += count
        if count and seen >= wanted:
            return float(upper)
    return 0.0


def difference(later: Sequence[Sequence[int]], earlier: Sequence[Sequence[int]]) -> list[list[int]]:
    """What was counted between two histograms of one host."""
    before = {bucket[0]: bucket[1] for bucket in earlier}
    return [[upper, count - before.get(upper, 0)] for upper, count in later if count > before.get(upper, 0)]

"""The latency histogram: exact to an eighth, small, and subtractable; and the counters of a device."""

import json
import random

import pytest

from snapd.block.bio import BioOp
from snapd.device.latency import LatencyHistogram, difference, percentile
from snapd.device.traffic import Traffic


@pytest.mark.parametrize("us", [*range(2000), 10**5, 10**6 + 7, 2**31, 2**40 + 1])
def test_bucket_of_a_value(us: int) -> None:
    """The bound is above the value, by no more than an eighth or one microsecond; the bucket below would not do."""
    histogram = LatencyHistogram()
    histogram.add(us)
    ((upper, count),) = histogram.buckets()
    assert count == 1
    assert us < upper <= us + max(1, us // 8 + 1)


def test_buckets_ascend_and_do_not_overlap() -> None:
    histogram = LatencyHistogram()
    for us in range(5000):
        histogram.add(us)
    uppers = [upper for upper, _ in histogram.buckets()]
    assert uppers == sorted(set(uppers))
    before = 0
    for upper, count in histogram.buckets():
        # Every microsecond once.
        assert count == min(upper, 5000) - before
        before = upper
    assert len(uppers) < 100


def test_percentiles_of_a_random_load() -> None:
    """Against the sorted values themselves."""
    choice = random.Random(5)
    values = [int(choice.lognormvariate(6, 2)) for _ in range(10_000)]
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for fraction in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = values[max(0, int(fraction * len(values) + 0.999999) - 1)]
        assert exact < percentile(histogram.buckets(), fraction) <= exact + exact / 8 + 1


def test_percentile_of_nothing() -> None:
    assert percentile([], 0.99) == 0.0


def test_difference_is_what_came_between() -> None:
    histogram, between = LatencyHistogram(), LatencyHistogram()
    histogram.add(10, 5)
    histogram.add(700, 2)
    earlier = histogram.buckets()
    for us, count in ((10, 1), (90_000, 3)):
        histogram.add(us, count)
        between.add(us, count)
    assert difference(histogram.buckets(), earlier) == between.buckets()
    assert difference(earlier, earlier) == []


def test_traffic_is_counted_by_kind() -> None:
    traffic = Traffic()
    traffic.count_reads(3, 12_288, 50, errors=1)
    for op, length, failed in (
        (BioOp.WRITE, 512, False),
        (BioOp.WRITE, 1024, True),
        (BioOp.FLUSH, 0, False),
        (BioOp.DISCARD, 4096, False),
        (BioOp.WRITE_ZEROES, 4096, True),
    ):
        traffic.count(op, length, 100, failed=failed)
    counted = json.loads(json.dumps(traffic.to_dict()))
    latencies = {name: counted.pop(name) for name in ("read_latency", "write_latency", "flush_latency")}
    assert counted == {
        "reads": 3,
        "read_bytes": 12_288,
        "writes": 2,
        "write_bytes": 1536,
        "flushes": 1,
        "discards": 1,
        "zeroes": 1,
        "errors": 3,
    }
    assert {name: sum(count for _, count in buckets) for name, buckets in latencies.items()} == {
        "read_latency": 3,
        "write_latency": 2,
        "flush_latency": 1,
    }

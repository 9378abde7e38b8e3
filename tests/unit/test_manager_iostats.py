"""Rates and percentiles as the difference of two answers of a device host."""

from typing import Any

import pytest

from snapd.manager.iostats import Latency, io_stats


def counters(pid: int, uptime_ms: int, reads: int, latency: list[list[int]]) -> dict[str, Any]:
    return {
        "pid": pid,
        "uptime_ms": uptime_ms,
        "reads": reads,
        "read_bytes": reads * 4096,
        "writes": 2 * reads,
        "write_bytes": 0,
        "read_latency": latency,
        "write_latency": [],
        "flush_latency": [[8, 1]],
    }


def test_since_the_start_of_the_host() -> None:
    stats = io_stats(counters(1, 2000, 100, [[10, 98], [500, 1], [9000, 1]]))
    assert (stats.period_ms, stats.reads_per_second, stats.writes_per_second) == (2000, 50, 100)
    assert stats.read_bytes_per_second == 50 * 4096
    assert stats.read_latency == Latency(100, 10, 10, 500, 9000)
    assert stats.write_latency == Latency()
    assert stats.flush_latency == Latency(1, 8, 8, 8, 8)


def test_between_two_answers() -> None:
    before = counters(1, 2000, 100, [[10, 98], [500, 1], [9000, 1]])
    stats = io_stats(counters(1, 2500, 110, [[10, 98], [500, 11], [9000, 1]]), before)
    assert (stats.period_ms, stats.reads_per_second) == (500, 20)
    assert stats.read_latency == Latency(10, 500, 500, 500, 500)
    assert stats.flush_latency.count == 0


@pytest.mark.parametrize("now", [counters(2, 5000, 20, [[10, 20]]), counters(1, 100, 20, [[10, 20]])])
def test_a_host_that_was_replaced_counts_from_zero(now: dict[str, Any]) -> None:
    """The former host's counters are not subtracted from the new one's."""
    stats = io_stats(now, counters(1, 2000, 100, [[10, 100]]))
    assert stats.period_ms == now["uptime_ms"]
    assert stats.read_latency.count == 20
    assert stats.reads_per_second == 20 * 1000 / now["uptime_ms"]


def test_two_answers_at_once_have_no_rate() -> None:
    before = counters(1, 2000, 100, [])
    assert io_stats(before, before).reads_per_second == 0

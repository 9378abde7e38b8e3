"""What snapctl prints of devices: lines that stay in their columns, and figures in words."""

import json

import pytest

from snapd.api.v1 import devices_pb2
from snapd.ctl.device_records import (
    WATCH_HEADING,
    device_record,
    device_row,
    format_time,
    stats_record,
    stats_summary,
    watch_line,
    where,
)
from snapd.ctl.output import Format, show_rows

DEVICE = devices_pb2.Device(
    name="devices/disk",
    state=devices_pb2.DEVICE_STATE_SERVING,
    route=devices_pb2.ROUTE_WORKER,
    policy=devices_pb2.POLICY_FAIL_FAST,
    export=devices_pb2.EXPORT_KIND_LOOP,
    attach_state=devices_pb2.ATTACH_STATE_ATTACHED,
    store_path="/store",
    size_bytes=3 << 20,
    nbd_uri="nbd+unix:///?socket=/s",
    worker_restarts=2,
    host_restarts=1,
)
LATENCY = devices_pb2.Latency(count=9, p50_us=90, p95_us=1500, p99_us=2e6, max_us=3e6)
STATS = devices_pb2.DeviceStats(
    name="devices/disk",
    state=devices_pb2.DEVICE_STATE_SERVING,
    attach_state=devices_pb2.ATTACH_STATE_ATTACHED,
    worker_restarts=2,
    host_restarts=1,
    io=devices_pb2.IoStats(
        period_ms=1000,
        in_flight=3,
        queued=4,
        reads=9,
        read_bytes=9 * 4096,
        reads_per_second=9,
        read_bytes_per_second=9 * 4096,
        writes_per_second=1,
        read_latency=LATENCY,
    ),
)
BLIND = devices_pb2.DeviceStats(name="devices/disk", state=devices_pb2.DEVICE_STATE_RESTARTING)


@pytest.mark.parametrize(("us", "text"), [(0, "0us"), (999, "999us"), (1500, "1.5ms"), (2_500_000, "2.5s")])
def test_times(us: float, text: str) -> None:
    assert format_time(us) == text


def test_a_line_of_watch() -> None:
    """In flight, queue, IOPS, MB/s, latencies of the busier direction, restarts of worker and host."""
    line = watch_line(STATS)
    assert line.split() == ["disk", "SERVING", "ATTACHED", "3", "4", "10", "0.0", "90us", "1.5ms", "2.0s", "3"]
    assert len(line) == len(WATCH_HEADING) == len(watch_line(BLIND))
    assert watch_line(BLIND).split() == ["disk", "RESTARTING", *"--------", "0"]


def test_the_record_of_statistics_names_all_figures() -> None:
    record = stats_record(STATS)
    assert (record["reads"], record["in_flight"], record["read_p99_us"]) == (9, 3, 2e6)
    assert record["write_p50_us"] is None
    assert "reads" not in stats_record(BLIND)
    json.dumps(record)


def test_statistics_in_words() -> None:
    summary = stats_summary(STATS)
    assert summary["reads"] == "9, 36 KiB; 9.0/s, 36 KiB/s"
    assert summary["read latency"] == "p50 90us  p95 1.5ms  p99 2.0s  max 3.0s"
    assert summary["write latency"] is None
    assert "being replaced" in str(stats_summary(BLIND)["counters"])


def test_where_a_client_goes() -> None:
    """The most special that there is."""
    device = devices_pb2.Device(nbd_uri="nbd+unix:///?socket=/s")
    assert where(device) == "nbd+unix:///?socket=/s"
    device.nbd_tcp_uri = "nbd://127.0.0.1:1"
    assert where(device) == "nbd://127.0.0.1:1"
    device.loop_path = "/dev/loop3"
    assert where(device) == "/dev/loop3"


def test_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns in line, sizes in words; JSON is a list of whole records."""
    show_rows([device_row(DEVICE), device_row(devices_pb2.Device(name="devices/a-longer-name"))], Format.TABLE)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "state", "attach", "route", "size", "restarts", "serves", "at"]
    assert first.split()[:6] == ["disk", "SERVING", "ATTACHED", "WORKER", "3", "MiB"]
    assert heading.index("state") == first.index("SERVING") == second.index("UNSPECIFIED")
    show_rows([], Format.TABLE)
    assert capsys.readouterr().out == ""
    show_rows([device_record(DEVICE)], Format.JSON)
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["policy"], record["export"], record["attach_state"]) == ("FAIL_FAST", "LOOP", "ATTACHED")

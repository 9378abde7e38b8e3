"""Devices of the API and what they did, as the records that the verbs print."""

from snapd.api.v1 import devices_pb2
from snapd.ctl.records import enum_name
from snapd.ctl.sizes import format_size

_NO_LATENCY = ("-", "-", "-")


def device_record(device: devices_pb2.Device) -> dict[str, object]:
    """One device, flat; what is not there is None."""
    return {
        "name": device.name,
        "state": enum_name(devices_pb2.DeviceState, device.state),
        "snapshot": device.snapshot or None,
        "store_path": device.store_path or None,
        "route": enum_name(devices_pb2.Route, device.route),
        "policy": enum_name(devices_pb2.Policy, device.policy),
        "export": enum_name(devices_pb2.ExportKind, device.export),
        "read_only": device.read_only,
        "size_bytes": device.size_bytes,
        "nbd_uri": device.nbd_uri or None,
        "nbd_tcp_uri": device.nbd_tcp_uri or None,
        "loop_path": device.loop_path or None,
        "dm_path": device.dm_path or None,
        "daemon_socket": device.daemon_socket or None,
        "attach_state": _attach_state(device.attach_state),
        "attach_timeout_ms": device.attach_timeout_ms if device.HasField("attach_timeout_ms") else None,
        "queued": device.queued,
        "in_flight": device.in_flight,
        "host_pid": device.host_pid or None,
        "host_restarts": device.host_restarts,
        "worker_pid": device.worker_pid or None,
        "worker_restarts": device.worker_restarts,
    }


def device_row(device: devices_pb2.Device) -> dict[str, object]:
    """The same as one line of a list."""
    return {
        "name": device.name.removeprefix("devices/"),
        "state": enum_name(devices_pb2.DeviceState, device.state),
        "attach": _attach_state(device.attach_state),
        "route": enum_name(devices_pb2.Route, device.route),
        "size_bytes": device.size_bytes,
        "restarts": device.worker_restarts + device.host_restarts,
        "serves": device.snapshot or device.store_path or device.daemon_socket,
        "at": where(device) or None,
    }


def where(device: devices_pb2.Device) -> str:
    """What a client opens, the most special that there is."""
    return device.loop_path or device.dm_path or device.nbd_tcp_uri or device.nbd_uri


def stats_record(stats: devices_pb2.DeviceStats) -> dict[str, object]:
    """What one device did, flat; without counters it is only its state."""
    record: dict[str, object] = {
        "name": stats.name,
        "state": enum_name(devices_pb2.DeviceState, stats.state),
        "attach_state": _attach_state(stats.attach_state),
        "worker_pid": stats.worker_pid or None,
        "worker_restarts": stats.worker_restarts,
        "host_restarts": stats.host_restarts,
    }
    if not stats.HasField("io"):
        return record
    io = stats.io
    record |= {"period_seconds": io.period_ms / 1000}
    record |= {field.name: getattr(io, field.name) for field in io.DESCRIPTOR.fields if 2 <= field.number <= 15}
    record |= {
        "reads_per_second": round(io.reads_per_second, 1),
        "read_bytes_per_second": round(io.read_bytes_per_second),
        "writes_per_second": round(io.writes_per_second, 1),
        "write_bytes_per_second": round(io.write_bytes_per_second),
    }
    for kind in ("read", "write", "flush"):
        latency = getattr(io, f"{kind}_latency")
        for figure in ("p50_us", "p95_us", "p99_us", "max_us"):
            record[f"{kind}_{figure}"] = getattr(latency, figure) if latency.count else None
    return record


WATCH_HEADING = (
    f"{'device':<16} {'state':<10} {'attach':<10} {'flight':>6} {'queue':>6} {'IOPS':>8} {'MB/s':>8}"
    f" {'p50':>8} {'p95':>8} {'p99':>8} {'restarts':>8}"
)


def watch_line(stats: devices_pb2.DeviceStats) -> str:
    """What one device did in a tick, in the columns of `WATCH_HEADING`; latencies are those of the busier direction."""
    head = (
        f"{stats.name.removeprefix('devices/'):<16} {enum_name(devices_pb2.DeviceState, stats.state):<10}"
        f" {_attach_state(stats.attach_state) or '-':<10}"
    )
    restarts = stats.worker_restarts + stats.host_restarts
    if not stats.HasField("io"):
        return f"{head} {'-':>6} {'-':>6} {'-':>8} {'-':>8} {'-':>8} {'-':>8} {'-':>8} {restarts:>8}"
    io = stats.io
    busier = max(io.read_latency, io.write_latency, key=lambda latency: latency.count)
    figures = (busier.p50_us, busier.p95_us, busier.p99_us)
    latencies = [format_time(us) for us in figures] if busier.count else _NO_LATENCY
    iops = io.reads_per_second + io.writes_per_second
    megabytes = (io.read_bytes_per_second + io.write_bytes_per_second) / 1e6
    return (
        f"{head} {io.in_flight:>6} {io.queued:>6} {iops:>8.0f} {megabytes:>8.1f}"
        f" {latencies[0]:>8} {latencies[1]:>8} {latencies[2]:>8} {restarts:>8}"
    )


def stats_summary(stats: devices_pb2.DeviceStats) -> dict[str, object]:
    """What one device did, in words: a line for each kind of request."""
    record = stats_record(stats)
    if not stats.HasField("io"):
        return {**record, "counters": "none: the device host is being replaced, or the kernel serves the device"}
    io = stats.io
    keep = ("name", "state", "attach_state", "worker_pid", "worker_restarts", "host_restarts", "period_seconds")
    return {
        **{key: record[key] for key in keep},
        **{key: record[key] for key in ("queued", "in_flight", "in_flight_bytes", "connections", "errors")},
        "reads": _did(io.reads, io.read_bytes, io.reads_per_second, io.read_bytes_per_second),
        "read latency": _latency(io.read_latency),
        "passed down": f"{io.reads_passed_down} reads, {io.reads_to_worker} to the worker",
        "writes": _did(io.writes, io.write_bytes, io.writes_per_second, io.write_bytes_per_second),
        "write latency": _latency(io.write_latency),
        "flushes": io.flushes,
        "flush latency": _latency(io.flush_latency),
        "discards": io.discards,
        "zeroes": io.zeroes,
    }


def format_time(us: float) -> str:
    """`850us`, `12.4ms`, `3.1s`."""
    if us < 1000:
        return f"{us:.0f}us"
    return f"{us / 1000:.1f}ms" if us < 1e6 else f"{us / 1e6:.1f}s"


def _attach_state(state: devices_pb2.AttachState.ValueType) -> str | None:
    return enum_name(devices_pb2.AttachState, state) if state else None


def _did(count: int, count_bytes: int, per_second: float, bytes_per_second: float) -> str:
    if not count:
        return "0"
    return f"{count}, {format_size(count_bytes)}; {per_second:.1f}/s, {format_size(round(bytes_per_second))}/s"


def _latency(latency: devices_pb2.Latency) -> str | None:
    if not latency.count:
        return None
    figures = (("p50", latency.p50_us), ("p95", latency.p95_us), ("p99", latency.p99_us), ("max", latency.max_us))
    return "  ".join(f"{name} {format_time(us)}" for name, us in figures)

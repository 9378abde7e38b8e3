"""Devices, their statistics and what is asked of their exports, between the manager's terms and the API's."""

import errno
from typing import Any

from snapd.api.v1 import devices_pb2
from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager.backends import ExportRequest
from snapd.manager.catalog import DeviceStats
from snapd.manager.iostats import IoStats, Latency
from snapd.manager.records import ExportKind, has_attach_timeout
from snapd.manager.status import DeviceStatus
from snapd.rpc.names import device_name, snapshot_name

_COUNTERS = (
    *("queued", "in_flight", "in_flight_bytes", "connections"),
    *("reads", "read_bytes", "writes", "write_bytes", "flushes", "discards", "zeroes", "errors"),
    *("reads_passed_down", "reads_to_worker"),
)


def device_message(status: DeviceStatus) -> devices_pb2.Device:
    """One device."""
    record, report = status.record, status.report
    counters = report.counters or {}
    return devices_pb2.Device(
        name=device_name(record.id),
        state=devices_pb2.DeviceState.Value(f"DEVICE_STATE_{report.state}"),
        nbd_uri=report.nbd_uri,
        host_pid=report.host_pid,
        worker_pid=report.worker_pid,
        worker_restarts=report.worker_restarts,
        host_restarts=report.host_restarts,
        snapshot="" if record.snapshot is None else snapshot_name(*record.snapshot),
        store_path=record.store_path,
        route=devices_pb2.Route.Value(f"ROUTE_{record.route.name}"),
        policy=devices_pb2.Policy.Value(f"POLICY_{record.export.policy.name}"),
        read_only=record.read_only,
        size_bytes=record.size_bytes,
        export=devices_pb2.ExportKind.Value(f"EXPORT_KIND_{record.export.kind.name}"),
        nbd_tcp_uri=report.nbd_tcp_uri,
        loop_path=report.loop_path,
        dm_path=report.dm_path,
        daemon_socket=report.daemon_socket,
        attach_state=_attach_state(report.attach_state),
        attach_timeout_ms=record.export.attach_timeout_ms if has_attach_timeout(record) else None,
        queued=int(counters.get("queued", 0)),
        in_flight=int(counters.get("in_flight", 0)),
    )


def stats_message(stats: DeviceStats) -> devices_pb2.DeviceStats:
    """What one device did."""
    report = stats.report
    return devices_pb2.DeviceStats(
        name=device_name(stats.record.id),
        state=devices_pb2.DeviceState.Value(f"DEVICE_STATE_{report.state}"),
        attach_state=_attach_state(report.attach_state),
        worker_pid=report.worker_pid,
        worker_restarts=report.worker_restarts,
        host_restarts=report.host_restarts,
        io=None if stats.io is None else _io_message(stats.io),
    )


def export_request(settings: devices_pb2.ExportSettings, policy: devices_pb2.Policy.ValueType) -> ExportRequest:
    """What a client asks for; EINVAL for a number that the API does not have."""
    kind = _chosen(devices_pb2.ExportKind, "EXPORT_KIND", settings.kind)
    return ExportRequest(
        kind=None if kind is None else ExportKind[kind],
        tcp_address=settings.tcp_address,
        policy=None if (name := _chosen(devices_pb2.Policy, "POLICY", policy)) is None else Policy[name],
    )


def asked_route(number: devices_pb2.Route.ValueType) -> Route:
    """The route of a new device; EINVAL when there is none, or no such one."""
    name = _chosen(devices_pb2.Route, "ROUTE", number)
    if name is None:
        raise SnapdError(errno.EINVAL, "route is not set: RAW, WORKER or EXTERNAL")
    return Route[name]


def _chosen(enum: Any, prefix: str, number: int) -> str | None:
    """The name of an enum's value without its prefix; None when it is not set."""
    if not number:
        return None
    if number not in enum.values():
        raise SnapdError(errno.EINVAL, f"{prefix} has no value {number}")
    return str(enum.Name(number)).removeprefix(f"{prefix}_")


def _attach_state(state: str) -> devices_pb2.AttachState.ValueType:
    name = "UNSPECIFIED" if state == "none" else state.upper()
    return devices_pb2.AttachState.Value(f"ATTACH_STATE_{name}")


def _io_message(io: IoStats) -> devices_pb2.IoStats:
    return devices_pb2.IoStats(
        period_ms=io.period_ms,
        **{name: int(io.counters[name]) for name in _COUNTERS},
        reads_per_second=io.reads_per_second,
        read_bytes_per_second=io.read_bytes_per_second,
        writes_per_second=io.writes_per_second,
        write_bytes_per_second=io.write_bytes_per_second,
        read_latency=_latency_message(io.read_latency),
        write_latency=_latency_message(io.write_latency),
        flush_latency=_latency_message(io.flush_latency),
    )


def _latency_message(latency: Latency) -> devices_pb2.Latency:
    return devices_pb2.Latency(
        count=latency.count,
        p50_us=latency.p50_us,
        p95_us=latency.p95_us,
        p99_us=latency.p99_us,
        max_us=latency.max_us,
    )

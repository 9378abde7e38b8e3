"""The start message's contents, and the bounded log."""

import errno
import json
from typing import Any

import pytest

from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, DeviceConfig, Policy, Route
from snapd.proc.log import LINES_PER_SECOND, MAX_LINE_CHARACTERS, Log

GOOD: dict[str, Any] = {
    "device": "d",
    "route": "snapshot",
    "read_only": True,
    "snapshot": "0" * 32,
    "size_bytes": 4096,
}
RAW: dict[str, Any] = {"device": "d", "route": "raw", "read_only": False, "size_bytes": 512}
ALWAYS = ["control_listener", "arena"]
NEEDED = {
    Route.SNAPSHOT: ["base", "cow", "extent_map", "shared_map", "undo_directory", "worker_fence"],
    Route.RAW: ["base"],
    Route.WORKER: ["base", "worker_fence"],
    Route.EXTERNAL: ["daemon_listener"],
}


def test_defaults_are_the_services() -> None:
    """DMU-184: 10 s of grace and 30 s for a request."""
    config = DeviceConfig.from_dict(GOOD)
    assert (config.attach_timeout_ms, config.restart_grace_ms, config.request_timeout_ms) == (4000, 10_000, 30_000)
    assert config.policy is Policy.RESTART


@pytest.mark.parametrize(
    "raw",
    [
        GOOD,
        RAW,
        {**RAW, "route": "worker", "policy": "fail_fast"},
        {**RAW, "route": "external", "read_only": True, "attach_timeout_ms": 0},
    ],
)
def test_what_is_sent_is_what_is_read(raw: dict[str, Any]) -> None:
    """The form goes through JSON twice: at the start, and when the host is adopted."""
    config = DeviceConfig.from_dict(json.loads(json.dumps(raw)))
    assert DeviceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert {name: config.to_dict()[name] for name in raw} == raw


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size_bytes": 4097}, "size_bytes"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"size_bytes": True}, "size_bytes"),
        ({"snapshot": "nonsense"}, "UUID"),
        ({"attach_timeout_ms": -1}, "attach_timeout_ms"),
        ({"request_timeout_ms": 1.5}, "request_timeout_ms"),
        ({"colour": "red"}, "colour"),
        ({"route": "scenic"}, "route"),
        ({"route": 1}, "route"),
        ({"policy": "hope"}, "policy"),
        ({"read_only": 1}, "read_only"),
        ({"read_only": False}, "read-only"),
        ({"device": None}, "device"),
        ({"size_bytes": -4096}, "size_bytes"),
    ],
)
def test_bad_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SnapdError, match=named) as error:
        DeviceConfig.from_dict({**GOOD, **change})
    assert error.value.errno == errno.EINVAL


def test_config_that_is_no_object() -> None:
    with pytest.raises(SnapdError, match="not an object"):
        DeviceConfig.from_dict(["d"])


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_missing_field_is_named(missing: str) -> None:
    with pytest.raises(SnapdError, match=missing):
        DeviceConfig.from_dict({name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize("route", Route)
def test_descriptors_a_route_needs(route: Route) -> None:
    """One that is missing is named; others may be there."""
    names = ALWAYS + NEEDED[route] + ["nbd_listener", "nbd_tcp_listener", "fuse"]
    given = Descriptors.from_message(names, range(100, 100 + len(names)))
    given.check(route)
    assert (given.names, given.fds) == (names, [*range(100, 100 + len(names))])
    assert given["arena"] == 101
    for missing in ALWAYS + NEEDED[route]:
        fewer = {name: given[name] for name in names if name != missing}
        with pytest.raises(SnapdError, match=f"route {route} without descriptor {missing}") as error:
            Descriptors(fewer).check(route)
        assert error.value.errno == errno.EINVAL
        assert Descriptors(fewer).get(missing) is None


@pytest.mark.parametrize(
    ("names", "count", "named"),
    [
        (["base"], 2, "2 descriptors"),
        (["base", "cow"], 1, "1 descriptors"),
        (["base", "base"], 2, "2 descriptors"),
        (None, 0, "0 descriptors"),
        ("base", 4, "4 descriptors"),
        (["base", "window"], 2, "window"),
        ([7], 1, "7"),
    ],
)
def test_bad_names_of_descriptors(names: Any, count: int, named: str) -> None:
    with pytest.raises(SnapdError, match=named) as error:
        Descriptors.from_message(names, range(count))
    assert error.value.errno == errno.EINVAL


def test_log_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    clock = ManualClock()
    log = Log("name", clock)
    for i in range(LINES_PER_SECOND + 5):
        log.line(f"line {i}\n" + "x" * 1000)
    clock.advance(1000)
    log.line("next second")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == LINES_PER_SECOND + 2
    assert lines[0].startswith("name: line 0 xxx")
    assert len(lines[0]) == len("name: ") + MAX_LINE_CHARACTERS
    assert lines[-2:] == ["name: 5 more lines were left out", "name: next second"]

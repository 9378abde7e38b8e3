"""The start message's contents, and the bounded log."""

import errno
from typing import Any

import pytest

from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.device.config import Descriptors, DeviceConfig
from snapd.proc.log import LINES_PER_SECOND, MAX_LINE_CHARACTERS, Log

GOOD: dict[str, Any] = {"device": "d", "snapshot": "0" * 32, "size_bytes": 4096}


def test_defaults_are_the_services() -> None:
    """DMU-184: 10 s of grace and 30 s for a request."""
    config = DeviceConfig.from_dict(GOOD)
    assert (config.attach_timeout_ms, config.restart_grace_ms, config.request_timeout_ms) == (4000, 10_000, 30_000)
    assert DeviceConfig.from_dict(config.to_dict()) == config


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
    ],
)
def test_bad_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SnapdError, match=named) as error:
        DeviceConfig.from_dict({**GOOD, **change})
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_missing_field_is_named(missing: str) -> None:
    with pytest.raises(SnapdError, match=missing):
        DeviceConfig.from_dict({name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize("count", [0, 7, 9])
def test_number_of_descriptors(count: int) -> None:
    assert Descriptors.from_message(list(range(8))).control_listener == 7
    with pytest.raises(SnapdError, match=f"{count} descriptors"):
        Descriptors.from_message(list(range(count)))


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

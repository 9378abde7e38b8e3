"""How a device is exported: what is asked for, what this host can do, and what is refused."""

import errno
import socket
from dataclasses import replace

import pytest

from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager.backends import BackEnds, ExportRequest
from snapd.manager.dmsetup import DmSettings
from snapd.manager.records import ExportKind, ExportRecord
from snapd.manager.tcpaddress import address_of, listen_tcp, parse_tcp_address

ALL = BackEnds("", "", DmSettings())
NO_DM = replace(ALL, no_dm="the kernel has none")
ONLY_NBD = replace(NO_DM, no_loop="it takes root")
AUTO = ExportRequest(ExportKind.AUTO)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", ("127.0.0.1", 10809)),
        ("127.5.5.5:0", ("127.5.5.5", 0)),
        ("localhost:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_loopback_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_tcp_address(text) == address


@pytest.mark.parametrize("text", ["", ":1", "127.0.0.1", "127.0.0.1:", "::1:5", "host:1", "127.0.0.1:65536", "[]:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(SnapdError) as caught:
        parse_tcp_address(text)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("text", ["0.0.0.0:1", "192.168.1.1:10809", "[::]:1", "[2001:db8::1]:1", "10.0.0.1:0"])
def test_other_addresses_are_refused_for_want_of_tls(text: str) -> None:
    """Nothing on this wire says who asks, or hides what is read."""
    with pytest.raises(SnapdError, match="TLS") as caught:
        parse_tcp_address(text)
    assert (caught.value.errno, caught.value.reason) == (errno.EPERM, "TCP_WITHOUT_TLS")


def test_port_0_is_the_one_that_was_free() -> None:
    with listen_tcp("localhost:0") as listener:
        host, port = parse_tcp_address(address_of(listener))
        assert port
        socket.create_connection((host, port), 10).close()
        with pytest.raises(SnapdError, match="listen at") as caught:
            listen_tcp(address_of(listener))
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("back_ends", "route", "kind"),
    [
        (ALL, Route.SNAPSHOT, ExportKind.DM),
        (ALL, Route.WORKER, ExportKind.DM),
        # These have no worker of ours for a node.
        (ALL, Route.RAW, ExportKind.LOOP),
        (ALL, Route.EXTERNAL, ExportKind.LOOP),
        (NO_DM, Route.SNAPSHOT, ExportKind.LOOP),
        (ONLY_NBD, Route.SNAPSHOT, ExportKind.NBD),
        (replace(ALL, no_loop="x"), Route.RAW, ExportKind.NBD),
    ],
)
def test_auto_is_the_best_there_is(back_ends: BackEnds, route: Route, kind: ExportKind) -> None:
    assert back_ends.settle(AUTO, route).kind is kind


def test_auto_keeps_what_a_tcp_address_needs() -> None:
    """A device of device-mapper has no NBD export."""
    asked = ExportRequest(ExportKind.AUTO, "127.0.0.1:1")
    assert ALL.settle(asked, Route.SNAPSHOT) == ExportRecord(ExportKind.LOOP, "127.0.0.1:1")


def test_the_default_is_nbd_with_restarts() -> None:
    assert ALL.settle(ExportRequest(), Route.SNAPSHOT) == ExportRecord(ExportKind.NBD, "", Policy.RESTART)


@pytest.mark.parametrize(
    ("back_ends", "kind", "route", "said"),
    [
        (ONLY_NBD, ExportKind.LOOP, Route.RAW, "it takes root"),
        (NO_DM, ExportKind.DM, Route.SNAPSHOT, "the kernel has none"),
        (ALL, ExportKind.DM, Route.RAW, "route raw needs a device host"),
        (ALL, ExportKind.DM, Route.EXTERNAL, "route external needs a device host"),
    ],
)
def test_the_impossible_is_refused_with_its_reason(
    back_ends: BackEnds, kind: ExportKind, route: Route, said: str
) -> None:
    with pytest.raises(SnapdError, match=said) as caught:
        back_ends.settle(ExportRequest(kind), route)
    assert (caught.value.errno, caught.value.reason) == (errno.EOPNOTSUPP, "NO_BACK_END")


def test_dm_has_no_tcp_address() -> None:
    with pytest.raises(SnapdError, match="no NBD export") as caught:
        ALL.settle(ExportRequest(ExportKind.DM, "127.0.0.1:1"), Route.SNAPSHOT)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        (ExportRequest(), True),
        (AUTO, True),
        (ExportRequest(ExportKind.NBD, "localhost:77", Policy.FAIL_FAST), True),
        (ExportRequest(tcp_address="127.0.0.1:0"), True),
        (ExportRequest(ExportKind.LOOP), False),
        (ExportRequest(policy=Policy.RESTART), False),
        (ExportRequest(tcp_address="127.0.0.1:78"), False),
        (ExportRequest(tcp_address="[::1]:77"), False),
    ],
)
def test_whether_what_runs_is_what_is_asked_for(request_: ExportRequest, met: bool) -> None:
    """What is left open is met by anything."""
    assert request_.is_met_by(ExportRecord(ExportKind.NBD, "127.0.0.1:77", Policy.FAIL_FAST)) is met


def test_an_address_is_not_met_by_none() -> None:
    assert not ExportRequest(tcp_address="127.0.0.1:0").is_met_by(ExportRecord())

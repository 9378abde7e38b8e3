"""The rules of the control plane that need no process: ids, names, arrows between states, paths, error codes."""

import errno
from pathlib import Path

import grpc
import pytest

from snapd.block.errors import SnapdError
from snapd.manager.paths import ServicePaths
from snapd.manager.records import check_id
from snapd.manager.states import UpdateState, check_transition
from snapd.proc.deaths import DeathCount
from snapd.rpc.errors import code_of
from snapd.rpc.names import parse_snapshot, parse_update
from snapd.rpc.settings import Settings


@pytest.mark.parametrize("text", ["a", "0", "a-b", "x" * 63])
def test_legal_ids(text: str) -> None:
    assert check_id("update", text) == text


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a_b", "a/b", "x" * 64, "ä", "a\n"])
def test_illegal_ids_are_named(text: str) -> None:
    with pytest.raises(SnapdError, match="update id") as caught:
        check_id("update", text)
    assert caught.value.errno == errno.EINVAL


def test_names() -> None:
    assert parse_update("updates/u") == "u"
    assert parse_snapshot("updates/u/snapshots/s") == ("u", "s")


@pytest.mark.parametrize("name", ["", "u", "updates/", "updates/u/snapshots/s", "snapshots/s"])
def test_wrong_update_names(name: str) -> None:
    with pytest.raises(SnapdError, match="not the name of an update"):
        parse_update(name)


@pytest.mark.parametrize("name", ["", "updates/u", "updates//snapshots/s", "updates/u/snapshots/", "a/u/snapshots/s"])
def test_wrong_snapshot_names(name: str) -> None:
    with pytest.raises(SnapdError, match="not the name of a snapshot"):
        parse_snapshot(name)


def test_arrows_between_states() -> None:
    """UNDO-8: only the arrows of the state table exist; confirm is reached from MERGED alone."""
    allowed = {
        (UpdateState.CREATED, UpdateState.SEALED),
        (UpdateState.CREATED, UpdateState.MERGING),
        (UpdateState.SEALED, UpdateState.MERGING),
        (UpdateState.MERGING, UpdateState.MERGED),
        (UpdateState.MERGING, UpdateState.FAILED),
        (UpdateState.FAILED, UpdateState.MERGING),
        (UpdateState.MERGED, UpdateState.CONFIRMED),
    }
    for state in UpdateState:
        for to in UpdateState:
            if state is to or (state, to) in allowed:
                check_transition("u", state, to)
                continue
            with pytest.raises(SnapdError, match=f"update u is {state}") as caught:
                check_transition("u", state, to)
            assert caught.value.errno == errno.EBUSY


def test_a_long_state_directory_gets_short_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "r"
    short.mkdir()
    monkeypatch.setattr("snapd.manager.paths._runtime_directory", lambda: str(short))
    state = tmp_path / ("x" * 100)
    paths = ServicePaths(str(state))
    assert paths.run.parent == short
    assert ServicePaths(str(state)).run == paths.run
    assert ServicePaths(str(tmp_path / ("y" * 100))).run != paths.run


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """DMU-188: who can put a socket there can answer reads."""
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(SnapdError, match="writable by nobody else"):
        ServicePaths(str(state))


def test_a_crash_loop_is_five_deaths_within_a_minute() -> None:
    deaths = DeathCount()
    assert [deaths.is_crash_loop(ms) for ms in (0, 1000, 2000, 3000)] == [False] * 4
    assert deaths.is_crash_loop(59_999)
    assert deaths.total == 5
    assert not deaths.is_crash_loop(61_000)
    slow = DeathCount()
    assert not any(slow.is_crash_loop(ms) for ms in range(0, 300_000, 15_000))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EINVAL, grpc.StatusCode.INVALID_ARGUMENT),
        (errno.ERANGE, grpc.StatusCode.OUT_OF_RANGE),
        (errno.ENODEV, grpc.StatusCode.NOT_FOUND),
        (errno.ENXIO, grpc.StatusCode.NOT_FOUND),
        (errno.EPERM, grpc.StatusCode.PERMISSION_DENIED),
        (errno.EALREADY, grpc.StatusCode.ALREADY_EXISTS),
        (errno.EBUSY, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.EROFS, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.EOPNOTSUPP, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.ENOTCONN, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.EUCLEAN, grpc.StatusCode.FAILED_PRECONDITION),
        (errno.ENOSPC, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errno.ENOMEM, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errno.ETIMEDOUT, grpc.StatusCode.ABORTED),
        (errno.EBADMSG, grpc.StatusCode.DATA_LOSS),
        (errno.EAGAIN, grpc.StatusCode.UNAVAILABLE),
        (errno.EIO, grpc.StatusCode.INTERNAL),
    ],
)
def test_errno_to_status(number: int, code: grpc.StatusCode) -> None:
    assert code_of(SnapdError(number, "")) is code


@pytest.mark.parametrize("listen", ["tcp:1", "unix:", "/path", "unix:/" + "x" * 107])
def test_a_wrong_listen_address_is_named(listen: str) -> None:
    with pytest.raises(SnapdError, match="listen") as caught:
        Settings.of(listen=listen)
    assert caught.value.errno == errno.EINVAL


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPD_LISTEN", "unix:/env.sock")
    monkeypatch.setenv("SNAPD_STATE_DIR", "/env")
    settings = Settings.of(listen="unix:/option.sock", state_dir=None)
    assert (settings.socket_path, str(settings.state_dir)) == ("/option.sock", "/env")

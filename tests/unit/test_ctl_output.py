"""How snapctl reads and prints sizes, results and errors."""

import errno
import io
import json
import sys

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from snapd.block.errors import SnapdError
from snapd.ctl.app import main
from snapd.ctl.errors import reported, usage
from snapd.ctl.output import Format, show
from snapd.ctl.progress import progress_bar
from snapd.ctl.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        ("1.5GiB", 3 << 29),
        ("2TiB", 2 << 40),
        (" 7MiB ", 7 << 20),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Plain bytes, or a number with a unit of 1024."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "64KB", "64k", "-1", "1.5", "0.3KiB", "1e3", "64KiBs", "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    """EINVAL that quotes the text; nothing is rounded or guessed."""
    with pytest.raises(SnapdError) as caught:
        parse_size(text)
    assert caught.value.errno == errno.EINVAL
    assert repr(text) in str(caught.value)


@given(st.integers(0, 1 << 50))
def test_printed_sizes_are_close(size: int) -> None:
    """At most two decimals away from the truth, and exact where it is a whole number."""
    number, unit = format_size(size).split()
    scale = 1 if unit == "bytes" else 1024 ** ("KiB", "MiB", "GiB", "TiB").index(unit) * 1024
    assert abs(float(number) * scale - size) <= 0.005 * scale
    if "." not in number:
        assert int(number) * scale == size


def test_a_record_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One aligned line a field; sizes, yes and no, seconds and nothing in words; lists with one item a line."""
    record = {"image_bytes": 3 << 20, "ok": True, "seconds": 1.239, "damage": (), "name": None, "labels": ["a", "b"]}
    show(record, Format.TABLE)
    assert capsys.readouterr().out == (
        "image    3 MiB\nok       yes\nseconds  1.24\ndamage   -\nname     -\nlabels   a\n         b\n"
    )


def test_a_record_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same record with its own names and numbers."""
    record = {"image_bytes": 3 << 20, "ok": True, "damage": ["a"], "name": None}
    show(record, Format.JSON)
    assert json.loads(capsys.readouterr().out) == record


@pytest.mark.parametrize("error", [SnapdError(errno.EBUSY, "c: in use"), OSError(errno.ENOSPC, "c: in use")])
def test_expected_errors_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, `snapctl: ...` on standard error, nothing on standard output."""
    with pytest.raises(SystemExit) as caught, reported():
        raise error
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("snapctl: ")
    assert captured.err.count("\n") == 1


def test_our_own_faults_keep_their_traceback() -> None:
    """Only what the user can be told is shortened."""
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_errors_about_an_option_are_usage() -> None:
    """They name the option and exit with 2."""
    with pytest.raises(typer.BadParameter, match="three") as caught, usage("--unit"):
        raise SnapdError(errno.EINVAL, "three")
    assert caught.value.exit_code == 2
    assert caught.value.param_hint == "--unit"


@pytest.mark.parametrize("arguments", [["--help"], ["cow", "--help"], ["cow", "create", "--help"]])
def test_help_is_exit_code_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Help comes on standard output."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "Usage: snapctl" in capsys.readouterr().out


def test_no_bar_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal the bar is silent."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("working") as progress:
        progress(1, 2)
    assert stream.getvalue() == ""


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal it goes to standard error, never to standard output."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("working") as progress:
        progress(1, 2)
        progress(2, 2)
    assert "working" in stream.getvalue()
    assert capsys.readouterr().out == ""

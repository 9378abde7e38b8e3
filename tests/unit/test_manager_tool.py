"""Programs of the system: their ends, their words, and that nobody waits for one that does not end."""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.manager.dmsetup import DmSettings, DmSetup
from snapd.manager.tool import run_tool

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Makes a shell script."""

    def make(text: str) -> str:
        path = tmp_path / "dmsetup"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
        return str(path)

    return make


def test_code_and_words(script: Script) -> None:
    """Both streams; 128 + signal as a shell says it; no input to wait for."""
    path = script('read nothing; echo out "$@"; echo error >&2; exit 3')
    assert asyncio.run(run_tool([path, "a", "b"], 30)) == (3, "out a b\nerror")
    assert asyncio.run(run_tool([script("kill -9 $$")], 30)) == (137, "")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(SnapdError, match="no program no-such-program") as caught:
        asyncio.run(run_tool(["no-such-program"], 30))
    assert caught.value.errno == errno.ENOENT


def test_a_program_that_does_not_end_is_killed(script: Script) -> None:
    with pytest.raises(SnapdError, match="no end") as caught:
        asyncio.run(run_tool([script("exec sleep 1000")], 0.05))
    assert caught.value.errno == errno.ETIMEDOUT


def test_much_output_stops_nobody(script: Script) -> None:
    code, said = asyncio.run(run_tool([script("head -c 1000000 /dev/zero | tr '\\0' x")], 30))
    assert (code, len(said)) == (0, 64 << 10)


def dmsetup(path: str) -> DmSetup:
    return DmSetup(DmSettings(path))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo 'linear v1.4.0'; echo 'user   v1.0.0'", ""),
        ("echo 'linear v1.4.0'; echo 'userspace v1.0.0'", "no dm-user target"),
        ("echo 'cannot open control' >&2; echo 'Command failed.' >&2; exit 1", "cannot open control"),
    ],
)
def test_whether_there_is_dm_user(script: Script, text: str, why: str) -> None:
    """An empty answer is yes; else it says why not."""
    found = asyncio.run(dmsetup(script(text)).has_dm_user())
    assert why in found
    assert bool(found) is bool(why)


def test_no_command_is_no_dm_user() -> None:
    assert "no program" in asyncio.run(dmsetup("no-such-program").has_dm_user())


def test_the_line_of_a_table(script: Script, tmp_path: Path) -> None:
    """DMU-161: from 0, in sectors, twice, and the name of the node."""
    path = script(f'echo "$@" > {tmp_path}/said')
    asyncio.run(dmsetup(path).load("d", 1 << 20, "node", read_only=True))
    assert (tmp_path / "said").read_text() == "load d --readonly --table 0 2048 user 0 2048 node\n"


def test_a_removal_is_tried_again_while_it_is_busy(script: Script, tmp_path: Path) -> None:
    """DMU-174: a request in flight is enough for EBUSY, and is over soon."""
    count = tmp_path / "count"
    path = script(
        f"echo x >> {count}; [ $(wc -l < {count}) -ge 3 ] || {{ echo 'Device or resource busy' >&2; exit 1; }}"
    )
    asyncio.run(dmsetup(path).remove("d"))
    assert count.read_text() == "x\n" * 3


def test_other_failures_are_not_tried_again(script: Script, tmp_path: Path) -> None:
    count = tmp_path / "count"
    path = script(f"echo x >> {count}; echo 'ioctl failed: No such device' >&2; echo 'Command failed.' >&2; exit 1")
    with pytest.raises(SnapdError, match="dmsetup remove d: ioctl failed: No such device") as caught:
        asyncio.run(dmsetup(path).remove("d"))
    assert caught.value.errno == errno.EIO
    assert count.read_text() == "x\n"

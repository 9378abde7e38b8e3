"""Other people's programs, as the tests run them."""

import os
import shutil
import subprocess

import pytest

TIMEOUT_S = 100
# An ordinary user's search path may lack those of the administrator; nbdsh needs the system's Python.
PATH = f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ.get('PATH', '')}"


def need(tool: str) -> str:
    """The program's path; without it the test is skipped."""
    path = shutil.which(tool, path=PATH)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def need_root() -> None:
    """Mounting is for root; for others the test is skipped."""
    if os.geteuid():
        pytest.skip("only root may mount")


def run(tool: str, *arguments: str, directory: str | None = None, code: int = 0) -> str:
    """Run a program to its end, which must be `code`; returns its standard output."""
    result = subprocess.run(
        [need(tool), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=directory,
        check=False,
        env=os.environ | {"PATH": PATH},
    )
    assert result.returncode == code, f"{tool} {arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout

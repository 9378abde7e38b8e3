"""Who holds a fence: found by pid and start time, so that a number that was given out again is nobody."""

import json
import os
from pathlib import Path

import pytest

from snapd.proc import fence


@pytest.fixture
def fence_fd(tmp_path: Path) -> int:
    return os.open(tmp_path / "fence", os.O_RDWR | os.O_CREAT, 0o600)


def test_the_recorded_process_is_found(fence_fd: int) -> None:
    fence.record(fence_fd, os.getpid())
    found = fence.holder(fence_fd)
    assert found is not None
    pid, pidfd = found
    os.close(pidfd)
    os.close(fence_fd)
    assert pid == os.getpid()


@pytest.mark.parametrize(
    "identity",
    [
        b"",
        b"not JSON",
        b"{}",
        b"[]",
        json.dumps({"pid": os.getpid()}).encode(),
        json.dumps({"pid": os.getpid(), "start_time": 1}).encode(),
        json.dumps({"pid": 1 << 22, "start_time": 1}).encode(),
    ],
    # Not by content: a pid would be another one in every process that collects the tests.
    ids=["nothing", "not JSON", "no fields", "a list", "no start time", "another start time", "no such process"],
)
def test_nobody_is_found(fence_fd: int, identity: bytes) -> None:
    """DMU-185: nobody ever held it, or its pid belongs to somebody else now; then nobody is killed."""
    os.pwrite(fence_fd, identity, 0)
    assert fence.holder(fence_fd) is None
    assert fence.evict(fence_fd)
    os.close(fence_fd)

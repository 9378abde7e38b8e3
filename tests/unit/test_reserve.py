"""Room for the records on a full file system."""

import os
from pathlib import Path

import pytest

from snapd.manager.reserve import Reserve


def test_it_takes_its_room_at_once_and_gives_it_up(tmp_path: Path) -> None:
    path = tmp_path / "reserve"
    reserve = Reserve(str(path))
    assert path.stat().st_blocks * 512 >= 1 << 20
    reserve.release()
    assert not path.exists()
    reserve.release()
    reserve.restore()
    assert path.stat().st_blocks * 512 >= 1 << 20


def test_a_torn_one_is_made_whole(tmp_path: Path) -> None:
    path = tmp_path / "reserve"
    path.write_bytes(b"short")
    Reserve(str(path))
    assert path.stat().st_size == 1 << 20


def test_without_room_there_is_none_and_nobody_minds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "reserve"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        reserve = Reserve(str(path))
        assert not path.exists()
    reserve.restore()
    assert path.stat().st_size == 1 << 20

"""A new file is under its name whole or not at all."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.block.newfile import new_file, new_pair


def test_new_content_replaces_the_old_as_a_whole(tmp_path: Path) -> None:
    """Until the end the old content is there, then the new, and no `.part` is left."""
    path = tmp_path / "out"
    path.write_bytes(b"old content")
    with new_file(str(path), inputs=[]) as store:
        store.write(b"new", 0)
        assert path.read_bytes() == b"old content"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    """Whatever stops the writing, a Ctrl-C too, nothing has changed."""
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def write_and_fail(error: BaseException) -> None:
        with new_file(str(path), inputs=[]) as store:
            store.write(b"new", 0)
            raise error

    for error in (SnapdError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_and_fail(error)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["out"]


def test_a_leftover_part_is_replaced(tmp_path: Path) -> None:
    """What a killed writer left is not part of the new content."""
    (tmp_path / "out.part").write_bytes(b"x" * 1000)
    with new_file(str(tmp_path / "out"), inputs=[]) as store:
        store.write(b"new", 0)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_durable_before_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is flushed before the rename and the directory after it."""
    calls: list[str] = []

    def recorded(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            first = arguments[0]
            kind = "directory" if isinstance(first, int) and stat.S_ISDIR(os.fstat(first).st_mode) else "file"
            calls.append(f"{name} {kind}")
            real(*arguments)

        return call

    monkeypatch.setattr("snapd.block.newfile.os.fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr("snapd.block.newfile.os.rename", recorded("rename", os.rename))
    with new_file(str(tmp_path / "out"), inputs=[]) as store:
        store.write(b"new", 0)
    assert calls == ["fsync file", "rename file", "fsync directory"]


def test_a_failed_flush_puts_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not have reached the disk gets no name."""

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr("snapd.block.newfile.os.fsync", fail)
    with pytest.raises(SnapdError, match="flush "), new_file(str(tmp_path / "out"), inputs=[]) as store:
        store.write(b"new", 0)
    assert os.listdir(tmp_path) == []


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    """The second gets EBUSY and disturbs nothing."""
    path = str(tmp_path / "out")
    with new_file(path, inputs=[]) as store:
        store.write(b"first", 0)
        with pytest.raises(SnapdError) as caught, new_file(path, inputs=[]):
            pytest.fail("must not be entered")
        assert caught.value.errno == errno.EBUSY
    assert (tmp_path / "out").read_bytes() == b"first"


def test_a_locked_file_is_not_replaced(tmp_path: Path) -> None:
    """A file that serves as a COW or a base stays."""
    path = tmp_path / "out"
    path.write_bytes(b"in use")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SnapdError) as caught, new_file(str(path), inputs=[]):
            pytest.fail("must not be entered")
    assert caught.value.errno == errno.EBUSY
    assert path.read_bytes() == b"in use"


@pytest.mark.parametrize("name", ["out", "out.part"])
def test_an_input_is_not_replaced(tmp_path: Path, name: str) -> None:
    """EINVAL when the output, or what it is written to first, is an input, by whatever name."""
    source = tmp_path / "source"
    source.write_bytes(b"precious")
    os.link(source, tmp_path / name)
    with pytest.raises(SnapdError) as caught, new_file(str(tmp_path / "out"), inputs=[str(source)]):
        pytest.fail("must not be entered")
    assert caught.value.errno == errno.EINVAL
    assert source.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    """A device, a directory or a link in the way is an error and stays."""
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    before = path.lstat()
    with pytest.raises(SnapdError) as caught, new_file(str(path), inputs=[]):
        pytest.fail("must not be entered")
    assert caught.value.errno == errno.EINVAL
    assert path.lstat() == before


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """The system's error, with the path in it."""
    with (
        pytest.raises(SnapdError, match=r"nowhere/out\.part: No such file"),
        new_file(str(tmp_path / "nowhere" / "out"), inputs=[]),
    ):
        pytest.fail("must not be entered")


def names(folder: Path) -> dict[str, bytes]:
    """What lies under the two final names."""
    return {name: (folder / name).read_bytes() for name in ("out", "out.side") if (folder / name).exists()}


def test_a_pair_replaces_both(tmp_path: Path) -> None:
    """Until the end the old ones are there, then the new ones, and nothing else."""
    before = {"out": b"old", "out.side": b"old side"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with new_pair(str(tmp_path / "out"), str(tmp_path / "out.side"), inputs=[]) as (store, side):
        store.write(b"new", 0)
        side.write(b"new side", 0)
        assert names(tmp_path) == before
    assert names(tmp_path) == {"out": b"new", "out.side": b"new side"}
    assert sorted(os.listdir(tmp_path)) == ["out", "out.side"]


@pytest.mark.parametrize("had", [{}, {"out": b"old"}, {"out": b"old", "out.side": b"old side"}, {"out.side": b"stray"}])
def test_a_companion_never_lies_beside_another_file(
    tmp_path: Path, had: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the publication stops: the old pair, or either file alone, or the new pair, and each step is durable."""
    real = {name: getattr(os, name) for name in ("unlink", "rename", "fsync")}
    allowed = [had, {"out": b"new"}, {"out": b"new", "out.side": b"new side"}, {k: had[k] for k in had if k == "out"}]
    trace: list[str] = []

    def steps(stop_at: int) -> Callable[[str], Callable[..., None]]:
        def step(name: str) -> Callable[..., None]:
            def call(*arguments: str | int) -> None:
                if name == "unlink" and str(arguments[0]).endswith(".part"):
                    # Only a process that lives on cleans up.
                    return
                if len(trace) == stop_at:
                    raise KeyboardInterrupt
                real[name](*arguments)
                trace.append(name)

            return call

        return step

    seen = []
    for stop_at in range(10):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        for name, content in had.items():
            (folder / name).write_bytes(content)
        trace.clear()
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in real:
                patched.setattr(f"snapd.block.newfile.os.{name}", steps(stop_at)(name))
            with new_pair(str(folder / "out"), str(folder / "out.side"), inputs=[]) as (store, side):
                store.write(b"new", 0)
                side.write(b"new side", 0)
        assert names(folder) in allowed
        seen.append(names(folder))
    assert seen[0] == had
    assert seen[-1] == {"out": b"new", "out.side": b"new side"}
    removal = ["unlink", "fsync"] if "out.side" in had else []
    assert trace == ["fsync", "fsync", *removal, "rename", "fsync", "rename", "fsync"]


def test_an_error_leaves_the_old_pair(tmp_path: Path) -> None:
    """And no `.part` of either."""
    before = {"out": b"old", "out.side": b"old side"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)

    def write_and_fail() -> None:
        with new_pair(str(tmp_path / "out"), str(tmp_path / "out.side"), inputs=[]) as (store, _):
            store.write(b"new", 0)
            raise SnapdError(errno.ENOSPC, "full")

    with pytest.raises(SnapdError, match="full"):
        write_and_fail()
    assert names(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "out.side"]


def test_a_companion_has_to_be_a_file(tmp_path: Path) -> None:
    """What is in its way is an error before anything is written."""
    (tmp_path / "out.side").mkdir()
    with (
        pytest.raises(SnapdError, match="not a regular file"),
        new_pair(str(tmp_path / "out"), str(tmp_path / "out.side"), inputs=[]),
    ):
        pytest.fail("must not be entered")
    assert os.listdir(tmp_path) == ["out.side"]

"""The demo's images: real file systems, the same on every build."""

import errno
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.ctl import demo_images
from snapd.ctl.demo_images import build_images

SIZE = 16 << 20
TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
needs_e2fsprogs = pytest.mark.skipif(shutil.which("mke2fs", path=TOOLS) is None, reason="e2fsprogs is not installed")


def listing(image: Path) -> str:
    """Every inode of the root directory, and the release file, as debugfs sees them."""
    debugfs = shutil.which("debugfs", path=TOOLS)
    assert debugfs is not None
    outputs = [
        subprocess.run([debugfs, "-R", request, image], capture_output=True, text=True, check=True).stdout
        for request in ("ls -l /", "cat /etc/os-release", "stat /etc/os-release")
    ]
    return "".join(outputs)


@needs_e2fsprogs
def test_two_builds_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither time, nor umask, nor the order in which a file system lists names matters."""
    builds = []
    for number, umask in ((1, 0o022), (2, 0o077)):
        folder = tmp_path / str(number)
        folder.mkdir()
        before = os.umask(umask)
        try:
            monkeypatch.setenv("TZ", ("UTC", "Asia/Tokyo")[number - 1])
            old, new, summary = build_images(folder, SIZE)
        finally:
            os.umask(before)
        assert sorted(os.listdir(folder)) == ["new.img", "old.img"]
        builds.append((old.read_bytes(), new.read_bytes(), summary))
    assert builds[0] == builds[1]


@needs_e2fsprogs
def test_images_are_an_old_and_a_new_release(tmp_path: Path) -> None:
    """Clean ext4 of the size asked for, owned by root, well filled, and different in every way the summary says."""
    old, new, summary = build_images(tmp_path, SIZE)
    for image, release in ((old, 1), (new, 2)):
        assert image.stat().st_size == SIZE
        e2fsck = shutil.which("e2fsck", path=TOOLS)
        assert e2fsck is not None
        subprocess.run([e2fsck, "-fn", image], check=True, capture_output=True)
        text = listing(image)
        assert f"VERSION_ID={release}" in text
        assert "User:     0   Group:     0" in text
    assert min(summary.changed, summary.grown, summary.moved, summary.deleted, summary.added) > 0
    assert summary.content_bytes > SIZE // 4
    assert old.read_bytes() != new.read_bytes()


@needs_e2fsprogs
def test_unreadable_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be opened, links and compiled caches are no part of the images; nothing else is missing."""
    library = tmp_path / "library"
    (library / "__pycache__").mkdir(parents=True)
    (library / "__pycache__" / "a.pyc").write_bytes(b"x")
    for number in range(100):
        (library / f"m{number:03}.py").write_bytes(bytes([number]) * 5000)
    (library / "dangling.py").symlink_to("nowhere")
    (library / "link.py").symlink_to("m001.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(library))
    real = open

    def refuse_one(path: str | Path, mode: str) -> object:
        if str(path).endswith("m050.py"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, mode)

    monkeypatch.setattr(demo_images, "open", refuse_one, raising=False)
    _, _, summary = build_images(tmp_path, SIZE)
    assert summary.files + summary.added == 2 * 99


@pytest.mark.parametrize("size", [0, 1 << 20, (16 << 20) + 4096])
def test_odd_sizes_are_refused(tmp_path: Path, size: int) -> None:
    """EINVAL before anything is written."""
    with pytest.raises(SnapdError, match=f"image of {size} bytes"):
        build_images(tmp_path, size)
    assert os.listdir(tmp_path) == []


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOENT that says what to install; the system directories are searched too."""
    searched = []

    def nowhere(name: str, path: str) -> None:
        searched.append(path)
        assert name == "mke2fs"

    monkeypatch.setattr(shutil, "which", nowhere)
    with pytest.raises(SnapdError, match="mke2fs is not installed") as caught:
        build_images(tmp_path)
    assert caught.value.errno == errno.ENOENT
    assert searched[0].endswith("/usr/sbin:/sbin")


@needs_e2fsprogs
def test_a_failing_tool_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO with the tool's last words, and no image."""
    monkeypatch.setattr(demo_images, "_CONTENT_SHARE", 3.0)
    with pytest.raises(SnapdError, match="mke2fs failed") as caught:
        build_images(tmp_path, SIZE)
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []

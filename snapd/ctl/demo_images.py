"""The demo's two images: real ext4 file systems, an old and a new release of the same system.

Their content is what every machine has that runs this: Python's own library. The new release has files of it
changed, grown, moved, deleted and added. Nothing depends on the clock, on chance or on who builds: the same machine
content gives the same bytes.
"""

import errno
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from snapd.block.errors import SnapdError

IMAGE_BYTES = 256 << 20
MIN_IMAGE_BYTES = 16 << 20

# Half full: room for the journal, the inode tables and what the new release adds.
_CONTENT_SHARE = 0.55
_ADDED_EVERY = 30
_MAX_FILE_BYTES = 4 << 20
_RELEASE_TIME = 1_700_000_000
_UUID = "5eed0001-0d1e-4a11-8000-0a7a5a9d0001"
_HASH_SEED = "5eed0002-0d1e-4a11-8000-0a7a5a9d0001"
_FIRST_FREE_INODE = 12
_TOOL_TIMEOUT_S = 300
_STAMP = b"# changed in release 2\n"


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """What is in the images, in files; `content_bytes` is the old release's."""

    image_bytes: int
    content_bytes: int
    files: int
    changed: int
    grown: int
    moved: int
    deleted: int
    added: int


@dataclass(frozen=True, slots=True)
class _File:
    path: PurePosixPath
    content: bytes


def build_images(directory: Path, size_bytes: int = IMAGE_BYTES) -> tuple[Path, Path, ImageSummary]:
    """Build `old.img` and `new.img` in the existing `directory`, replacing what is there.

    `size_bytes` is the size of each, a multiple of 1 MiB from 16 MiB. Needs no privileges. Errors: EINVAL for the
    size; ENOENT without mke2fs, debugfs or e2fsck; EIO when one of them fails; else the system's.
    """
    if size_bytes < MIN_IMAGE_BYTES or size_bytes % (1 << 20):
        raise SnapdError(errno.EINVAL, f"image of {size_bytes} bytes: not a multiple of 1 MiB from 16 MiB")
    tools = [_tool(name) for name in ("mke2fs", "debugfs", "e2fsck")]
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".demo-") as scratch:
            return _build(Path(scratch), directory, size_bytes, tools)
    except OSError as error:
        raise SnapdError.from_os(error, f"build the demo's images in {directory}") from error


def _build(scratch: Path, directory: Path, size_bytes: int, tools: Sequence[str]) -> tuple[Path, Path, ImageSummary]:
    library = list(_take(_library_files(), int(size_bytes * _CONTENT_SHARE)))
    # Whatever the machine has, the old release lacks some of it.
    added = library[_ADDED_EVERY - 1 :: _ADDED_EVERY]
    old = [file for index, file in enumerate(library, 1) if index % _ADDED_EVERY]
    new, kinds = _next_release(old, added)
    images = []
    for name, release, files in (("old", 1, old), ("new", 2, new)):
        tree = scratch / name
        inodes = _write_tree(tree, [*files, _os_release(release)])
        image = scratch / f"{name}.img"
        _make_image(tree, image, size_bytes, inodes, tools)
        shutil.rmtree(tree)
        images.append(image)
    for image in images:
        image.replace(directory / image.name)
    summary = ImageSummary(size_bytes, sum(len(file.content) for file in old), len(old), **kinds, added=len(added))
    return directory / "old.img", directory / "new.img", summary


def _library_files() -> Iterator[_File]:
    """The library's regular files in a fixed order; what cannot be read is left out, and so are compiled caches."""
    for name in ("stdlib", "platlib"):
        root = sysconfig.get_path(name)
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - {"__pycache__", "site-packages"})
            for file in sorted(files):
                path = os.path.join(folder, file)
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                try:
                    with open(path, "rb") as opened:
                        content = opened.read(_MAX_FILE_BYTES + 1)
                except OSError:
                    continue
                if len(content) <= _MAX_FILE_BYTES:
                    yield _File(PurePosixPath("usr/lib", name, os.path.relpath(path, root)), content)


def _take(files: Iterator[_File], size_bytes: int) -> Iterator[_File]:
    """The next files, until they would take up `size_bytes` on a file system of 4 KiB blocks."""
    while size_bytes > 0 and (file := next(files, None)):
        size_bytes -= 4096 + (len(file.content) + 4095) // 4096 * 4096
        yield file


def _next_release(files: list[_File], added: list[_File]) -> tuple[list[_File], dict[str, int]]:
    """The new release's files, and how many were changed, grown, moved and deleted."""
    release = []
    kinds = {"changed": 0, "grown": 0, "moved": 0, "deleted": 0}
    for index, file in enumerate(files):
        half = len(file.content) // 2
        if index % 40 == 7:
            file = _File(file.path, file.content[:half] + _STAMP + file.content[half + len(_STAMP) :])
            kinds["changed"] += 1
        elif index % 60 == 11:
            file = _File(file.path, file.content + _STAMP + file.content[:half])
            kinds["grown"] += 1
        elif index % 50 == 13:
            file = _File(PurePosixPath("opt/moved", file.path), file.content)
            kinds["moved"] += 1
        elif index % 70 == 17:
            kinds["deleted"] += 1
            continue
        release.append(file)
    release += [_File(PurePosixPath("opt/added", file.path), file.content) for file in added]
    return release, kinds


def _os_release(release: int) -> _File:
    text = f'NAME="snapd demo"\nID=snapd-demo\nVERSION_ID={release}\n'
    return _File(PurePosixPath("etc/os-release"), text.encode())


def _write_tree(root: Path, files: list[_File]) -> int:
    """Write the files below `root`; returns how many inodes they and their directories take."""
    root.mkdir()
    for file in files:
        path = root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
    inodes = 0
    # Bottom up, as an entry made later would set its directory's time again.
    for folder, folders, names in os.walk(root, topdown=False):
        for name in names:
            _settle(os.path.join(folder, name), 0o644)
        _settle(folder, 0o755)
        inodes += len(folders) + len(names)
    return inodes


def _settle(path: str, mode: int) -> None:
    os.chmod(path, mode)
    os.utime(path, (_RELEASE_TIME, _RELEASE_TIME))


def _make_image(tree: Path, image: Path, size_bytes: int, inodes: int, tools: Sequence[str]) -> None:
    mke2fs, debugfs, e2fsck = tools
    with open(image, "xb") as file:
        file.truncate(size_bytes)
    options = f"hash_seed={_HASH_SEED},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    # An inode for every 8 KiB: the library is many small files.
    layout = ["-t", "ext4", "-b", "4096", "-i", "8192", "-U", _UUID, "-L", "snapd-demo", "-E", options]
    _run([mke2fs, "-q", "-F", *layout, "-d", str(tree), str(image)])
    # mke2fs takes owner and change time from the tree, where only root could set the one and nobody the other.
    fields = (("uid", "0"), ("gid", "0"), ("ctime", f"@{_RELEASE_TIME}"), ("ctime_extra", "0"))
    numbers = [2, *range(_FIRST_FREE_INODE, _FIRST_FREE_INODE + inodes)]
    script = image.with_suffix(".debugfs")
    script.write_text("".join(f"sif <{number}> {name} {value}\n" for number in numbers for name, value in fields))
    _run([debugfs, "-w", "-f", str(script), str(image)])
    _run([e2fsck, "-fn", str(image)])


def _tool(name: str) -> str:
    """Where the tool is; an ordinary user's path often lacks the system directories."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise SnapdError(errno.ENOENT, f"{name} is not installed: the demo's images need e2fsprogs")
    return found


def _run(command: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC", "E2FSPROGS_FAKE_TIME": str(_RELEASE_TIME)}
    try:
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SnapdError(errno.ETIMEDOUT, f"{command[0]} did not end within {_TOOL_TIMEOUT_S} s") from error
    if result.returncode:
        lines = result.stdout.decode(errors="replace").strip().splitlines()
        raise SnapdError(errno.EIO, f"{command[0]} failed ({result.returncode}): {lines[-1] if lines else 'no output'}")

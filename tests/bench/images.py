"""Two ext4 images of one machine, before and after a large update: what the figures of `cow create` are measured on.

    .venv/bin/python tests/bench/images.py DIRECTORY [MIB]

writes `old.img` and `new.img`. The content is this machine's own /usr, filled up with seeded synthetic files where it
has too little, so the pair differs from machine to machine, but is the same bytes on every run of one. It needs
e2fsprogs and no privileges. The new image is the old one after an update, not a second build, so that what did not
change stays where it was. Each file has one fate, drawn from the seed:

| share of the files | fate | what a diff can make of it |
| --- | --- | --- |
| 30 % | edited in place, up to 8 bytes every 1500 or (a third of them) every 20 000 bytes | XOR at the same place |
| 10 % | a few bytes inserted near its front, written again | XOR with a moved source |
| 6 % | moved: written again under another name | copies |
| 5 % | deleted | nothing |
| 20 % | added: not in the old image | replaces |
| 29 % | kept | nothing |
"""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from random import Random
from typing import NamedTuple

IMAGE_BYTES = 768 << 20
BLOCK_BYTES = 4096
_ROOTS = ("/usr/bin", "/usr/lib", "/usr/share")
# What is added and written again must find room beside what is there.
_CONTENT_SHARE = 0.72
# So that no few files decide what an image is made of.
_LARGEST_FILES = 48
_SYNTHETIC_BYTES = 256 << 10
_SEED = 20
_TIME = "1700000000"
_UUID = "5eed0003-0d1e-4a11-8000-0a7a5a9d0001"
_HASH_SEED = "5eed0004-0d1e-4a11-8000-0a7a5a9d0001"
_PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")
_EXTENT = re.compile(r"^ *\d+/ *\d+ +\d+/ *\d+ +(\d+) - +(\d+) +(\d+) -", re.MULTILINE)
_MAX_EDIT_BYTES = 8
_DENSE_GAP, _SPARSE_GAP = 1500, 20_000


class Fate(Enum):
    """What the update does to a file; the value is its share of the files in percent."""

    EDITED = 30
    SHIFTED = 10
    MOVED = 6
    DELETED = 5
    ADDED = 20
    KEPT = 29


class _File(NamedTuple):
    """A file on the host, at `path`, that gets the flat name `name` in the image's directory of its fate."""

    path: Path
    name: str
    size: int
    fate: Fate


def build_images(directory: Path, size_bytes: int = IMAGE_BYTES) -> tuple[Path, Path]:
    """Build `old.img` and `new.img`, each of `size_bytes` (64 MiB or more), in `directory`; returns their paths."""
    old, new = directory / "old.img", directory / "new.img"
    random = Random(_SEED)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        files = list(_files(Path(scratch), int(size_bytes * _CONTENT_SHARE), random))
        _make_old(old, size_bytes, files)
        shutil.copyfile(old, new)
        _debugfs(new, _update_script(files, Path(scratch), random))
    _edit_in_place(new, [file for file in files if file.fate is Fate.EDITED], random)
    for image in (old, new):
        _run("e2fsck", "-fn", str(image))
    return old, new


def _files(scratch: Path, size_bytes: int, random: Random) -> Iterator[_File]:
    """Files of `size_bytes` in all, an equal part from each root, the rest synthetic; in a fixed order."""
    fates, shares = list(Fate), [fate.value for fate in Fate]
    left = size_bytes
    number = 0
    most = size_bytes // _LARGEST_FILES
    for root in _ROOTS:
        share = size_bytes // len(_ROOTS)
        for path in _walk(root, most):
            size = path.stat().st_size
            room = -(-size // BLOCK_BYTES) * BLOCK_BYTES
            if room > share:
                continue
            share -= room
            left -= room
            number += 1
            yield _File(path, f"{number}-{path.name}", size, random.choices(fates, shares)[0])
    while left > 0:
        number += 1
        path = scratch / f"synthetic{number}"
        # Half noise, half a repeated line: compresses about as well as programs do.
        pieces = (random.randbytes(512) + random.randbytes(32) * 16 for _ in range(_SYNTHETIC_BYTES >> 10))
        path.write_bytes(b"".join(pieces))
        left -= _SYNTHETIC_BYTES
        yield _File(path, f"{number}-{path.name}", _SYNTHETIC_BYTES, random.choices(fates, shares)[0])


def _walk(root: str, most: int) -> Iterator[Path]:
    """The readable regular files below `root` of at most so many bytes that are not empty, sorted."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            # debugfs takes names with other characters for something else.
            is_plain = _PLAIN.fullmatch(str(path)) and path.is_file() and not path.is_symlink()
            if is_plain and os.access(path, os.R_OK) and 0 < path.stat().st_size <= most:
                yield path


def _make_old(image: Path, size_bytes: int, files: list[_File]) -> None:
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    options = f"hash_seed={_HASH_SEED},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    # An inode for every 8 KiB: half of a system's files are small.
    layout = ("-t", "ext4", "-b", str(BLOCK_BYTES), "-i", "8192", "-U", _UUID, "-E", options)
    _run("mke2fs", "-q", "-F", *layout, str(image))
    folders = [f"mkdir /{fate.name}" for fate in Fate]
    _debugfs(image, folders + [_write(file.path, file) for file in files if file.fate is not Fate.ADDED])


def _update_script(files: list[_File], scratch: Path, random: Random) -> list[str]:
    """What debugfs must do to the old image, but for the edits in place."""
    script = []
    for file in files:
        if file.fate in (Fate.DELETED, Fate.SHIFTED, Fate.MOVED):
            script.append(f"rm /{file.fate.name}/{file.name}")
        if file.fate is Fate.SHIFTED:
            content = file.path.read_bytes()
            at = min(random.randrange(BLOCK_BYTES), file.size)
            shifted = scratch / file.name
            shifted.write_bytes(content[:at] + random.randbytes(random.randrange(1, 100)) + content[at:])
            script.append(_write(shifted, file))
        elif file.fate in (Fate.ADDED, Fate.MOVED):
            script.append(_write(file.path, file, "new-"))
    return script


def _write(path: Path, file: _File, prefix: str = "") -> str:
    return f"write {path} /{file.fate.name}/{prefix}{file.name}"


def _edit_in_place(image: Path, files: list[_File], random: Random) -> None:
    """Overwrite bytes of the files where their blocks lie."""
    listings = _debugfs(image, [f"ex /{file.fate.name}/{file.name}" for file in files]).split("debugfs: ex ")[1:]
    with open(image, "r+b") as opened:
        for file, listing in zip(files, listings, strict=True):
            gap = random.choice((_DENSE_GAP, _DENSE_GAP, _SPARSE_GAP))
            extents = [tuple(map(int, found)) for found in _EXTENT.findall(listing)]
            for first, last, physical in extents:
                length = min((last + 1) * BLOCK_BYTES, file.size) - first * BLOCK_BYTES
                opened.seek(physical * BLOCK_BYTES)
                content = bytearray(opened.read(length))
                _sprinkle(content, gap, random)
                opened.seek(physical * BLOCK_BYTES)
                opened.write(content)


def _sprinkle(content: bytearray, gap: int, random: Random) -> None:
    """Overwrite a few bytes every `gap` bytes on average."""
    at = int(random.expovariate(1 / gap))
    while at < len(content):
        edit = random.randbytes(min(random.randint(1, _MAX_EDIT_BYTES), len(content) - at))
        content[at : at + len(edit)] = edit
        at += math.ceil(random.expovariate(1 / gap))


def _debugfs(image: Path, script: list[str]) -> str:
    """Run the commands and return what they print; RuntimeError when one failed, which debugfs tells in words only."""
    with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as file:
        file.write("\n".join(script) + "\n")
        file.flush()
        output, complaints = _run("debugfs", "-w", "-f", file.name, str(image))
    # Its version is all that it has to say when everything worked.
    lines = complaints.splitlines()
    if len(lines) > 1:
        raise RuntimeError(f"debugfs: {lines[1]}")
    return output


def _run(tool: str, *arguments: str) -> tuple[str, str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    # All times inside the images are this one, or no two builds would be the same.
    environment = {**os.environ, "PATH": path, "LC_ALL": "C", "TZ": "UTC", "E2FSPROGS_FAKE_TIME": _TIME}
    result = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=True)
    return result.stdout, result.stderr


if __name__ == "__main__":
    size = int(sys.argv[2]) << 20 if len(sys.argv) > 2 else IMAGE_BYTES
    for built in build_images(Path(sys.argv[1]), size):
        print(built)

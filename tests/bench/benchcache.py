"""Where the data that figures are measured on is kept between runs.

It lies in `$XDG_CACHE_HOME/ota-snapd-bench` (else `~/.cache/ota-snapd-bench`), a directory for each kind. Whatever made
it is part of its stamp, so another generator makes it anew; to be rid of it, delete the directory.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash


def kept(name: str, made_by: Iterable[str | None], make: Callable[[Path], None]) -> Path:
    """The directory `name`, filled by `make` unless these source files (modules' `__file__`) have filled it before."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ota-snapd-bench" / name
    stamp = directory / "stamp"
    expected = xxhash.xxh3_64_hexdigest(b"".join(Path(path).read_bytes() for path in made_by if path))
    if not stamp.exists() or stamp.read_text() != expected:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        make(directory)
        stamp.write_text(expected)
    return directory


def warm(paths: Iterable[Path]) -> None:
    """Read all of the files once, so that nothing measured waits for a disk."""
    piece = bytearray(1 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass

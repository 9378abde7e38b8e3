"""`snapctl cow extract`: the new image, from a COW and its base, as a file.

Invariant: the file under the final name is the whole image; one damaged unit, and there is none.
"""

import os
import time
from dataclasses import dataclass

from snapd.block.lock import locked_store
from snapd.block.newfile import new_file
from snapd.block.store import Readable, Store
from snapd.cow.claim import check_unclaimed
from snapd.cow.diff import Progress
from snapd.cow.history import holds_new_image
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView

_PIECE_BYTES = 1 << 20
_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was written."""

    image_bytes: int
    seconds: float


def extract_image(
    cow_path: _Path, base_path: _Path, out_path: _Path, size_bytes: int | None, progress: Progress
) -> ExtractReport:
    """Write the new image to `out_path`, which is replaced as a whole.

    Its size is `size_bytes`, else the base's or the end of the last op behind it (COW-213). COW and base are locked
    meanwhile. Errors: EINVAL for a size no multiple of the block size or an output that is an input; `CowError` for
    what `CowFile` and `CowView` refuse; EBUSY for a file in use or a merge that has begun. The old
    `out_path` stays as it was then.
    """
    begin = time.monotonic()
    inputs = [os.fspath(cow_path), os.fspath(base_path)]
    with (
        locked_store(cow_path) as payloads,
        locked_store(base_path) as base,
        new_file(os.fspath(out_path), inputs=inputs) as out,
    ):
        cow = CowFile.parse(payloads)
        # Copies must be read from the old image, not from a base that a merge has begun to overwrite (UNDO-4).
        check_unclaimed(cow_path)
        merged = holds_new_image(cow, cow_path, payloads, base)
        block_map = cow.block_map(base.size(), size_bytes, merged=merged)
        view = CowView(block_map, payloads, source=base, base=base)
        copy_image(view, view.size, out, progress)
        return ExtractReport(view.size, time.monotonic() - begin)


def copy_image(image: Readable, size: int, out: Store, progress: Progress) -> None:
    """Copy `size` bytes of `image` to `out` in pieces of at most 1 MiB."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for offset in range(0, size, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, size - offset)]
        image.read_into(piece, offset)
        out.write(piece, offset)
        progress(offset + len(piece), size)

"""`snapctl cow extract`: the new image, from a COW and its base, as a file.

Invariant: the file under the final name is the whole image; one damaged unit, and there is none.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from snapd.block.lock import locked_store
from snapd.block.newfile import new_file
from snapd.block.store import Readable, Store
from snapd.cow.claim import check_unclaimed
from snapd.cow.digests import load_digests, table_path
from snapd.cow.history import holds_new_image
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Progress

_PIECE_BYTES = 1 << 20
_THREADS = 2
_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was written; `digests` are "checked", "ignored" or "none", `tolerated` the first of `tolerated_faults`."""

    image_bytes: int
    seconds: float
    digests: str
    tolerated_faults: int = 0
    tolerated: tuple[str, ...] = ()


def extract_image(
    cow_path: _Path,
    base_path: _Path,
    out_path: _Path,
    size_bytes: int | None,
    progress: Progress,
    *,
    label: int | None = None,
    lenient: bool = False,
    ignore_digests: bool = False,
) -> ExtractReport:
    """Write the new image to `out_path`, which is replaced as a whole.

    Its size is `size_bytes`, else what the digests table says, else the base's or the end of the last op behind it
    (COW-213). Every block is compared with its digest where there is a table (COW-216). With a `label` the ops before
    it count; a `lenient` extraction says what it let pass (COW-208). COW and base are locked meanwhile.
    Errors: EINVAL for a size no multiple of the block size or an output that is an input; `CowError` for
    what `CowFile` and `CowView` refuse; EBUSY for a file in use or a merge that has begun. The old
    `out_path` stays as it was then.
    """
    begin = time.monotonic()
    inputs = [os.fspath(cow_path), table_path(cow_path), os.fspath(base_path)]
    with (
        locked_store(cow_path) as payloads,
        locked_store(base_path) as base,
        new_file(os.fspath(out_path), inputs=inputs) as out,
    ):
        cow = CowFile.parse(payloads, label=label, lenient=lenient)
        # Copies must be read from the old image, not from a base that a merge has begun to overwrite (UNDO-4).
        check_unclaimed(cow_path)
        merged = holds_new_image(cow, cow_path, payloads, base)
        digests = None if ignore_digests else load_digests(cow_path, cow)
        extent_map = cow.extent_map(base.size(), size_bytes, merged=merged, digests=digests)
        size = extent_map.block_count * extent_map.block_size
        copy_image(lambda: CowView(extent_map, payloads, source=base, base=base), size, out, progress, threads=_THREADS)
        return ExtractReport(
            image_bytes=size,
            seconds=time.monotonic() - begin,
            digests="ignored" if ignore_digests else "none" if digests is None else "checked",
            tolerated_faults=cow.tolerated.count,
            tolerated=tuple(cow.tolerated.notes),
        )


def copy_image(open_image: Callable[[], Readable], size: int, out: Store, progress: Progress, *, threads: int) -> None:
    """Copy `size` bytes of an image to `out` in pieces of at most 1 MiB; each thread opens the image for itself."""

    def copy_piece(offset: int, state: tuple[Readable, memoryview]) -> int:
        image, buffer = state
        piece = buffer[: min(_PIECE_BYTES, size - offset)]
        image.read_into(piece, offset)
        out.write(piece, offset)
        return offset + len(piece)

    pool: OrderedPool[tuple[Readable, memoryview], int] = OrderedPool(
        threads, in_flight=2 * threads, make_state=lambda: (open_image(), memoryview(bytearray(_PIECE_BYTES)))
    )
    for done in pool.run(partial(copy_piece, offset) for offset in range(0, size, _PIECE_BYTES)):
        progress(done, size)

"""`snapctl cow create`: two images on disk become a COW file and its digests table on disk.

Invariant: nothing incomplete ever lies under the final names, and no table beside a COW that it was not made for. What
lies there has been parsed again and merges in order.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from snapd.block.lock import locked_store
from snapd.block.newfile import new_pair
from snapd.block.store import Store
from snapd.cow.claim import check_unclaimed
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.diff import Diff
from snapd.cow.digests import DigestLog, table_path
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.parse.mergeorder import order_fault
from snapd.cow.parse.reader import CowFile
from snapd.cow.progress import Progress
from snapd.cow.write.writer import create_writer

_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CreateReport:
    """What a creation made of the target's blocks."""

    source_bytes: int
    target_bytes: int
    cow_bytes: int
    ops: int
    unchanged_blocks: int
    zero_blocks: int
    copy_blocks: int
    xor_blocks: int
    replace_blocks: int
    seconds: float


def create_cow(
    source_path: _Path, target_path: _Path, out_path: _Path, options: CreateOptions, progress: Progress
) -> CreateReport:
    """Write the COW that turns the source image into the target image, and its digests table (COW-216).

    Both replace what lies there as a whole. The images are locked meanwhile. Errors: EINVAL for image sizes, a
    compression level or an output that is one of the images; EBUSY for a file in use, or an output that somebody
    merges; else the system's. The old files stay as they were then.
    """
    begin = time.monotonic()
    # A merge that has begun can be finished only with the file it was begun with.
    check_unclaimed(out_path)
    inputs = [os.fspath(source_path), os.fspath(target_path)]
    with locked_images(source_path, target_path) as (source, target):
        diff = Diff(source, target, options, progress)
        with new_pair(os.fspath(out_path), table_path(out_path), inputs=inputs) as (out, table):
            with contextlib.closing(create_writer(out, options.writer_options(diff.target_blocks))) as writer:
                counts = diff.write(writer)
                writer.finalize()
            cow = CowFile.parse(out)
            if fault := order_fault(cow):
                raise CowError(f"the ops just written do not merge: {fault}", statement="COW-76")
            log = DigestLog.create(table, block_size=BLOCK_SIZE)
            log.put(0, diff.target_digests)
            log.finish(op_count=cow.op_count, ops_digest=cow.ops_digest, target_blocks=diff.target_blocks)
        return CreateReport(
            source_bytes=source.size(),
            target_bytes=target.size(),
            cow_bytes=cow.size,
            ops=cow.op_count,
            **asdict(counts),
            seconds=time.monotonic() - begin,
        )


@contextlib.contextmanager
def locked_images(source_path: _Path, target_path: _Path) -> Iterator[tuple[Store, Store]]:
    """Source and target under their locks; the same file may be both."""
    with contextlib.ExitStack() as stack:
        source = target = stack.enter_context(locked_store(source_path))
        # One file can be locked only once; the difference of an image and itself is a COW without ops.
        if not os.path.exists(target_path) or not os.path.samefile(source_path, target_path):
            target = stack.enter_context(locked_store(target_path))
        yield source, target

"""`snapctl cow create`: two images on disk become a COW file on disk.

Invariant: nothing incomplete ever lies under the final name, and what lies there has been parsed again and merges
in order.
"""

import contextlib
import os
import time
from dataclasses import asdict, dataclass

from snapd.block.lock import locked_store
from snapd.block.newfile import new_file
from snapd.cow.claim import check_unclaimed
from snapd.cow.compress import CompressOption
from snapd.cow.diff import Diff, Progress
from snapd.cow.errors import CowError
from snapd.cow.mergeorder import order_fault
from snapd.cow.reader import CowFile
from snapd.cow.writer import CowWriter

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
    replace_blocks: int
    seconds: float


def create_cow(
    source_path: _Path, target_path: _Path, out_path: _Path, option: CompressOption, unit: int, progress: Progress
) -> CreateReport:
    """Write the COW that turns the source image into the target image; replaces `out_path` as a whole.

    `unit` is the largest replace unit in bytes (COW-112); `progress` gets (bytes done, bytes in all). The images are
    locked meanwhile. Errors: EINVAL for image sizes, option or an output that is one of the images; EBUSY for a file
    in use, or an output that somebody merges; else the system's. The old `out_path` stays as it was then.
    """
    begin = time.monotonic()
    # A merge that has begun can be finished only with the file it was begun with.
    check_unclaimed(out_path)
    inputs = [os.fspath(source_path), os.fspath(target_path)]
    with contextlib.ExitStack() as stack:
        source = target = stack.enter_context(locked_store(source_path))
        # One file can be locked only once; the difference of an image and itself is a COW without ops.
        if not os.path.exists(target_path) or not os.path.samefile(source_path, target_path):
            target = stack.enter_context(locked_store(target_path))
        diff = Diff(source, target, progress)
        out = stack.enter_context(new_file(os.fspath(out_path), inputs=inputs))
        writer = CowWriter(out, op_count_max=diff.target_blocks, option=option, unit=unit)
        counts = diff.write(writer, option, unit)
        writer.finalize()
        cow = CowFile.parse(out)
        if fault := order_fault(cow):
            raise CowError(f"the ops just written do not merge: {fault}", statement="COW-76")
        return CreateReport(
            source_bytes=source.size(),
            target_bytes=target.size(),
            cow_bytes=writer.size,
            ops=cow.header.op_count,
            **asdict(counts),
            seconds=time.monotonic() - begin,
        )

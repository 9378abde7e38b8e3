"""`snapctl cow estimate`: how large a COW between two images will be, without writing it (COW-130 to COW-134)."""

import contextlib
import os
import time
from dataclasses import asdict, dataclass

from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.diff import Diff
from snapd.cow.digests import table_size
from snapd.cow.progress import Progress
from snapd.cow.verbs.create import locked_images
from snapd.cow.write.writer import create_writer

_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class EstimateReport:
    """What a creation with the same options would write; `op_slots` is None in version 2, which has none."""

    source_bytes: int
    target_bytes: int
    cow_bytes: int
    digests_bytes: int
    ops: int
    op_slots: int | None
    unchanged_blocks: int
    zero_blocks: int
    copy_blocks: int
    xor_blocks: int
    replace_blocks: int
    seconds: float


def estimate_cow(source_path: _Path, target_path: _Path, options: CreateOptions, progress: Progress) -> EstimateReport:
    """The exact size of what `create_cow` would write: the same diff, with its payloads counted and dropped.

    The images are locked meanwhile. Errors: as from `create_cow`.
    """
    begin = time.monotonic()
    with locked_images(source_path, target_path) as (source, target):
        diff = Diff(source, target, options, progress)
        with contextlib.closing(create_writer(None, options.writer_options(diff.target_blocks))) as writer:
            counts = diff.write(writer)
            writer.finalize()
        return EstimateReport(
            source_bytes=source.size(),
            target_bytes=target.size(),
            cow_bytes=writer.size,
            digests_bytes=table_size(diff.target_blocks),
            ops=writer.op_count,
            op_slots=writer.op_count_max if options.version == 3 else None,
            **asdict(counts),
            seconds=time.monotonic() - begin,
        )

"""Writing COW files: a new one, or on from a label or the end of one that is there.

The writers are `writer_v2` and `writer_v3`, which say in what order they write and what a crash leaves; what they have
in common is `basewriter`.
"""

import errno
from typing import TYPE_CHECKING

from snapd.block.store import Store
from snapd.cow.compress import CompressOption
from snapd.cow.format import DEFAULT_CLUSTER_OPS, MIN_UNIT, PROGRESS, PROGRESS_OFFSET, Compression, OpType
from snapd.cow.write.basewriter import CowWriter
from snapd.cow.write.callchecks import refused
from snapd.cow.write.writer_v2 import WriterV2
from snapd.cow.write.writer_v3 import WriterV3
from snapd.cow.write.writeroptions import WriterOptions, check_unit_size, unit_lengths

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile
    from snapd.cow.write.targetdigests import TargetDigests

__all__ = [
    "CowWriter",
    "WriterOptions",
    "append_options",
    "append_writer",
    "check_unit_size",
    "create_writer",
    "mark_merged",
    "unit_lengths",
]


def create_writer(store: Store | None, options: WriterOptions, digests: "TargetDigests | None" = None) -> CowWriter:
    """A writer of a new file in place of whatever `store` holds (COW-90); it is durably begun.

    Without a store it is an estimate: every call works and nothing is kept (COW-130). Errors: EINVAL for options that
    no file can have, before anything is written; the store's.
    """
    _check_digests(options, digests)
    return (WriterV3 if options.version == 3 else WriterV2).create(store, options, digests)


def append_writer(
    store: Store,
    cow: "CowFile",
    compression: CompressOption,
    *,
    threads: int = 1,
    digests: "TargetDigests | None" = None,
) -> CowWriter:
    """A writer that goes on behind what `cow`, a parse of `store`, keeps: up to its label, or all (COW-87, COW-88).

    What lies behind the label is given up at once and durably (COW-95). `digests` are those of a log that was cut
    back to the same state before. Errors, with nothing changed: those of `append_options`; else the store's.
    """
    options = append_options(cow, compression, threads=threads)
    _check_digests(options, digests)
    return (WriterV3 if options.version == 3 else WriterV2).append(store, cow, options, digests)


def append_options(cow: "CowFile", compression: CompressOption, *, threads: int = 1) -> WriterOptions:
    """What a writer that goes on with `cow` writes: all is the file's but level and threads (COW-87, COW-88).

    Errors: EINVAL for a file that was not parsed strictly, and for another compression than the file's (COW-89);
    EBUSY for one whose merge has begun (COW-148); EOPNOTSUPP for version 1.
    """
    header = cow.header
    if cow.tolerated.count:
        raise refused("a file that breaks the rules is not appended to", "COW-208")
    if header.version == 1:
        raise refused("version 1 files are only read", "COW-3", errno.EOPNOTSUPP)
    if header.num_merge_ops or cow.window_done:
        raise refused(f"{header.num_merge_ops} ops are merged, nothing can be added", "COW-148", errno.EBUSY)
    # Before its first payload a version 2 file has no compression yet.
    carries = header.version == 3 or bool(((cow.ops.type == OpType.REPLACE) | (cow.ops.type == OpType.XOR)).any())
    if carries and compression.algorithm != header.compression:
        file = Compression(header.compression).name.lower()
        raise refused(f"compression {compression.algorithm.name.lower()}, the file has {file}", "COW-89")
    return WriterOptions(
        version=header.version,
        compression=compression,
        block_size=header.block_size,
        unit=header.max_unit if header.version == 3 else MIN_UNIT,
        cluster_ops=DEFAULT_CLUSTER_OPS if header.version == 3 else header.cluster_ops,
        op_count_max=header.op_count_max,
        threads=threads,
    )


def mark_merged(store: Store, op_count: int) -> None:
    """Durably say in a COW of `op_count` ops that all of them are in the base (COW-145, COW-146)."""
    store.write(PROGRESS.pack(op_count), PROGRESS_OFFSET)
    store.flush()


def _check_digests(options: WriterOptions, digests: "TargetDigests | None") -> None:
    if digests is not None and digests.block_size != options.block_size:
        raise refused(f"digests of {digests.block_size} bytes, blocks of {options.block_size}", "COW-216")

"""`snapctl cow info`: the facts of a COW file, read from its header and op records."""

import os
from dataclasses import dataclass

import numpy as np

from snapd.block.lock import locked_store
from snapd.cow.format import Compression, OpType
from snapd.cow.reader import CowFile


@dataclass(frozen=True, slots=True)
class CowInfo:
    """What a COW file holds; `changed_bytes` is what its ops cover, `payload_bytes` what they take up."""

    version: int
    file_bytes: int
    block_size_bytes: int
    compression: str
    unit_bytes: int
    scratch_bytes: int
    ops: int
    op_slots: int
    merged_ops: int
    copy_ops: int
    zero_ops: int
    replace_ops: int
    changed_bytes: int
    payload_bytes: int
    highest_target_block: int | None


def cow_info(path: str | os.PathLike[str]) -> CowInfo:
    """Parse and check the file (`CowError`), and describe it."""
    with locked_store(path) as store:
        cow = CowFile.parse(store)
    header = cow.header
    ops = {kind: int(np.count_nonzero(cow.type == kind)) for kind in OpType}
    return CowInfo(
        version=3,
        file_bytes=cow.size,
        block_size_bytes=header.block_size,
        compression=Compression(header.compression).name.lower(),
        unit_bytes=header.max_compression_size,
        scratch_bytes=header.buffer_size,
        ops=header.op_count,
        op_slots=header.op_count_max,
        merged_ops=header.num_merge_ops,
        copy_ops=ops[OpType.COPY],
        zero_ops=ops[OpType.ZERO],
        replace_ops=ops[OpType.REPLACE],
        changed_bytes=int(cow.blocks.sum()) * header.block_size,
        payload_bytes=int(cow.data_length.sum()),
        highest_target_block=cow.highest_target_block if header.op_count else None,
    )

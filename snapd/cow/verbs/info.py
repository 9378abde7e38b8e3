"""`snapctl cow info`: the facts of a COW file, read from its header, its records and its digests table.

Shows what a merge or an append would refuse as well: a begun merge, a cut or open file and, when it is asked to be
lenient, what a strict parse does not let pass (COW-208).
"""

import os
from dataclasses import dataclass

import numpy as np

from snapd.block.lock import locked_store
from snapd.block.store import Store
from snapd.cow.digests import DigestTable, load_digests
from snapd.cow.errors import CowError
from snapd.cow.format import FOOTER_SIZE, Compression, OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.mapbuild import build_extent_map
from snapd.cow.parse.mergeorder import order_fault
from snapd.cow.parse.parsed import End, Label
from snapd.cow.parse.reader import CowFile
from snapd.cow.parse.walk import RECORD, StreamWalk

_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CowInfo:
    """What a COW file holds; `changed_bytes` is what its ops cover, `payload_bytes` what they take up.

    `merge` is "not begun", "begun", "begun, a window is done" (COW-217) or "merged"; `ordered_merge` is "accepted" or
    says why not (COW-76). `digests` is "none", "label" (there are none of unchanged blocks before the end), "final" or
    "refused: why". `tolerated` are the first of `tolerated_faults`. None stands for what a version does not have.
    """

    version: int
    file_bytes: int
    header_bytes: int
    end: End
    footer_bytes: int
    block_size_bytes: int
    cluster_ops: int | None
    compression: str
    unit_bytes: int
    scratch_bytes: int
    ops: int
    op_slots: int | None
    copy_ops: int
    replace_ops: int
    zero_ops: int
    xor_ops: int
    label_records: int | None
    cluster_records: int | None
    sequence_records: int | None
    merged_ops: int
    merge: str
    labels: tuple[Label, ...]
    sequence_blocks: int
    changed_bytes: int
    payload_bytes: int
    highest_target_block: int | None
    ordered_merge: str
    digests: str
    target_bytes: int | None
    target_digest: str | None
    tolerated_faults: int
    tolerated: tuple[str, ...]


def cow_info(path: _Path, *, label: int | None = None, lenient: bool = False) -> tuple[CowInfo, ExtentMap]:
    """Parse and check the file (`CowError`), up to `label` if there is one; its facts, and the map of its image."""
    with locked_store(path) as store:
        cow = CowFile.parse(store, label=label, lenient=lenient)
        records = _metadata_records(store, cow, label)
        digests, state = _digests(path, cow)
    header, ops = cow.header, cow.ops
    count = {kind: int(np.count_nonzero(ops.type == kind)) for kind in OpType}
    info = CowInfo(
        version=header.version,
        file_bytes=cow.size,
        header_bytes=header.size,
        end=cow.end,
        footer_bytes=FOOTER_SIZE if cow.end is End.FINISHED else 0,
        block_size_bytes=header.block_size,
        cluster_ops=header.cluster_ops if header.version < 3 else None,
        compression=Compression(header.compression).name.lower(),
        unit_bytes=header.max_unit,
        scratch_bytes=header.buffer_size,
        ops=len(ops),
        op_slots=header.op_count_max if header.version == 3 else None,
        copy_ops=count[OpType.COPY],
        replace_ops=count[OpType.REPLACE],
        zero_ops=count[OpType.ZERO],
        xor_ops=count[OpType.XOR],
        label_records=records.get(OpType.LABEL),
        cluster_records=records.get(OpType.CLUSTER),
        sequence_records=records.get(OpType.SEQUENCE),
        merged_ops=header.num_merge_ops,
        merge=_merge_state(cow),
        labels=cow.labels,
        sequence_blocks=len(cow.sequence),
        changed_bytes=int(ops.blocks.sum()) * header.block_size,
        payload_bytes=int(ops.data_length.sum()),
        highest_target_block=cow.highest_target_block if len(ops) else None,
        ordered_merge=ordered_merge(cow),
        digests=state,
        target_bytes=None if digests is None else digests.target_bytes,
        target_digest=None if digests is None or digests.target_digest is None else digests.target_digest.hex(),
        tolerated_faults=cow.tolerated.count,
        tolerated=tuple(cow.tolerated.notes),
    )
    return info, image_map(cow, digests)


def image_map(cow: CowFile, digests: DigestTable | None) -> ExtentMap:
    """The map of the image where no base is known: it ends with the digests table, else with the last op."""
    size = cow.target_size(0)
    if digests is not None and digests.target_bytes is not None:
        if digests.target_bytes < size:
            message = f"digests table: of a target of {digests.target_bytes} bytes, the ops write up to byte {size}"
            raise CowError(message, statement="COW-216")
        size = digests.target_bytes
    return build_extent_map(cow, size // cow.header.block_size, merged=False, digests=None)


def ordered_merge(cow: CowFile) -> str:
    """ "accepted", or why an ordered merge does not take the file (COW-74, COW-76)."""
    if cow.end is End.LABEL:
        return "not known: only the ops before the label were read"
    if cow.tolerated.count:
        return "refused: a merge tolerates no fault (COW-208)"
    fault = order_fault(cow)
    return f"refused: {fault}" if fault else "accepted"


def _metadata_records(store: Store, cow: CowFile, label: int | None) -> dict[OpType, int]:
    """How many records of a version 1 or 2 stream map no block; version 3 has none of that kind."""
    if cow.header.version == 3:
        return {}
    walk = StreamWalk(store, cow.header, cow.size, label)
    walk.run()
    kinds = np.frombuffer(walk.records, dtype=RECORD)["type"]
    return {kind: int(np.count_nonzero(kinds == kind)) for kind in (OpType.LABEL, OpType.CLUSTER, OpType.SEQUENCE)}


def _merge_state(cow: CowFile) -> str:
    if cow.is_merged:
        return "merged"
    if not cow.has_begun:
        return "not begun"
    return "begun, a window is done (COW-142)" if cow.window_done else "begun"


def _digests(path: _Path, cow: CowFile) -> tuple[DigestTable | None, str]:
    """The table and its state in a word; one that is of no use does not keep the facts of the COW from being shown."""
    try:
        digests = load_digests(path, cow)
    except CowError as error:
        return None, f"refused: {error}"
    if digests is None:
        return None, "none"
    return digests, "final" if digests.is_final else "label"

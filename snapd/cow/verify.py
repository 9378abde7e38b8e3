"""`snapctl cow verify`: whether every byte of a COW file is usable, and by which kind of merge.

A file that breaks the merge order is refused by an ordered merge and is no less exact in a reversible one (COW-210):
the report keeps the two apart, and only `ok` asks for both.
"""

import os
from dataclasses import dataclass

import numpy as np

from snapd.block.lock import locked_store
from snapd.block.store import Store, read_bytes
from snapd.cow.compress import Decoder
from snapd.cow.diff import Progress
from snapd.cow.errors import CowError
from snapd.cow.format import OP_SIZE, Compression, Op, OpType
from snapd.cow.mergeorder import order_fault
from snapd.cow.reader import CowFile

_SHOWN_DAMAGE = 10


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result; `damage` describes the first ten of `damaged_ops`, a merge is `accepted` or its refusal told."""

    ok: bool
    ops: int
    payload_bytes: int
    damaged_ops: int
    damage: tuple[str, ...]
    ordered_merge: str
    reversible_merge: str


def verify_cow(
    path: str | os.PathLike[str], base_path: str | os.PathLike[str] | None, progress: Progress
) -> VerifyReport:
    """Check structure (rows V1 to V29), sizes against the base (V30), merge order (V31) and every payload (COW-103).

    Errors: `CowError` for a file whose structure or sizes are wrong; EBUSY for one in use.
    """
    with locked_store(path) as store:
        cow = CowFile.parse(store)
        if base_path is not None:
            with locked_store(base_path) as base:
                cow.block_map(base.size())
        damaged_ops, damage = _decode_all(cow, store, progress)
    fault = order_fault(cow)
    ordered = f"refused: {fault}" if fault else "accepted"
    reversible = "accepted"
    if damaged_ops:
        ordered = reversible = "refused: damaged payloads"
    return VerifyReport(
        ok=not damaged_ops and not fault,
        ops=cow.header.op_count,
        payload_bytes=int(cow.data_length.sum()),
        damaged_ops=damaged_ops,
        damage=tuple(damage),
        ordered_merge=ordered,
        reversible_merge=reversible,
    )


def _decode_all(cow: CowFile, store: Store, progress: Progress) -> tuple[int, list[str]]:
    """How many payloads do not decode, and the first few complaints."""
    decoder = Decoder(Compression(cow.header.compression))
    total, done = int(cow.data_length.sum()), 0
    damaged, damage = 0, []
    for index in np.flatnonzero(cow.type == OpType.REPLACE).data:
        op = Op.unpack(cow.ops, OP_SIZE * index)
        try:
            decoder.decode(
                read_bytes(store, op.source, op.data_length), op.blocks * cow.header.block_size, op_index=index
            )
        except CowError as error:
            damaged += 1
            if damaged <= _SHOWN_DAMAGE:
                damage.append(str(error))
        done += op.data_length
        progress(done, total)
    return damaged, damage

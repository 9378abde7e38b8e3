"""A corpus out of the reference writer's files, where they are: the ops of each that fit over our base, as drafts.

They are megabytes long, most of it scratch space; what is worth fuzzing are their records and payloads.
"""

import tarfile
from itertools import islice
from pathlib import Path

import model
from corpus import BASE
from draft import Draft, DraftOp, Seed
from modelread import Refused, read

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "cow-interop.tar.xz"
_MOST_OPS, _MOST_PAYLOAD_BYTES = 12, 4096


def reference_seeds() -> list[Seed]:
    """One seed a file; none where the files are not beside the checkout."""
    seeds = []
    if ARCHIVE.exists():
        with tarfile.open(ARCHIVE) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".cow") else None
                if file is not None:
                    seeds += _seed(Path(member.name).stem, file.read())
    return sorted(seeds, key=lambda seed: seed.name)


def _seed(name: str, raw: bytes) -> list[Seed]:
    try:
        reading = read(raw, lenient=True)
    except Refused:
        return []
    ops = [_draft(reading, op) for op in islice(filter(lambda op: _fits(reading, op), reading.ops), _MOST_OPS)]
    if not ops:
        return []
    blocks = {op.block for op in ops}
    draft = Draft(
        reading.version,
        reading.compression,
        reading.block_size,
        ops,
        cluster_ops=5 if "nocluster" not in name and reading.version < 3 else 0,
        sequence=[block for block in reading.sequence if block in blocks] if reading.version == 3 else [],
        points=[(label, min(before, len(ops))) for label, before in reading.labels[:4]],
        unit=max(reading.unit, 4096),
    )
    return [Seed(name, draft.build(), draft)]


def _fits(reading: model.Reading, op: model.Op) -> bool:
    last = {model.COPY: op.source, model.XOR: op.source // reading.block_size + 1}.get(op.kind, 0)
    return max(op.block + op.blocks, last + 1) * reading.block_size <= len(BASE) and op.length <= _MOST_PAYLOAD_BYTES


def _draft(reading: model.Reading, op: model.Op) -> DraftOp:
    payload = reading.data[op.payload : op.payload + op.length]
    source = None if op.kind == model.REPLACE else op.source
    return DraftOp(op.kind, op.block, source, payload, op.blocks.bit_length() - 1)

"""The seed corpus: small COW files of every version, algorithm and layout, which the fuzzing changes.

Most are drafts, which can be changed before they become bytes. Files that once showed a fault, kept in the folder
`corpus`, and those of our writer are bytes alone.
"""

import struct
from functools import partial
from pathlib import Path
from random import Random

from draft import Draft, DraftOp, Seed
from payloads import packed, unit
from rawcow import BROTLI, COPY, GZ, LABEL, LZ4, NONE, REPLACE, SEQUENCE, XOR, ZERO, ZSTD

from snapd.block.simdisk import SimDisk
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.digests import DigestLog
from snapd.cow.write.targetdigests import TargetDigests
from snapd.cow.write.writer import WriterOptions, create_writer

BASE = Random("base").randbytes(256 << 10)
"""The image that every COW is read over."""
REGRESSIONS = Path(__file__).parent / "corpus"


def own_seeds() -> list[Seed]:
    """The corpus of this folder, the same everywhere."""
    drafts = [*_regions(), *_streams()]
    written = [_written(version, algorithm) for version in (2, 3) for algorithm in ("lz4", "zstd")]
    return [Seed(name, draft.build(), draft) for name, draft in drafts] + _odd_headers() + written


def regressions() -> list[Seed]:
    """Files that once showed a fault."""
    seeds = []
    for path in sorted(REGRESSIONS.glob("*.cow")):
        table = path.with_suffix(".cow.digests")
        seeds.append(Seed(path.stem, path.read_bytes(), None, table.read_bytes() if table.exists() else None))
    return seeds


def _regions() -> list[tuple[str, Draft]]:
    """Version 3."""
    drafts = []
    for algorithm in (NONE, GZ, BROTLI, LZ4, ZSTD):
        for block_size in (512, 4096) if algorithm else (512,):
            ops = _ops(Random(f"3 {algorithm} {block_size}"), 3, algorithm, block_size)
            drafts.append((f"v3 {algorithm} {block_size}", Draft(3, algorithm, block_size, ops)))
    small = partial(_ops, version=3, algorithm=ZSTD, block_size=512)
    ops = small(Random(1))
    ordered = [one.block for one in ops if one.kind in (COPY, XOR)]
    mixed = ops[6:] + ops[:6]
    count = len(ops)
    drafts += [
        ("v3 empty", Draft(3)),
        ("v3 empty with slots", Draft(3, slots=9)),
        ("v3 sequence", Draft(3, ZSTD, ops=mixed, sequence=ordered)),
        ("v3 sequence of some", Draft(3, ZSTD, ops=mixed, sequence=[*ordered[:2], mixed[0].block])),
        ("v3 replace before copy", Draft(3, ZSTD, ops=mixed)),
        ("v3 labels", Draft(3, ZSTD, ops=ops, points=[(3, 2), (4, 5), (9, 5), (1 << 63, count)])),
        ("v3 stale labels", Draft(3, ZSTD, ops=ops, points=[(3, 2), (5, 4), (4, 3), (6, count + 3)])),
        ("v3 slots", Draft(3, ZSTD, ops=ops, slots=5, points=[(0, 0), (7, count)])),
        ("v3 window in progress", Draft(3, ZSTD, ops=ops, scratch=512, state=1)),
        ("v3 window done", Draft(3, ZSTD, ops=ops, scratch=512, state=2, merged=3)),
        ("v3 half merged", Draft(3, ZSTD, ops=ops, merged=4)),
        ("v3 merged", Draft(3, ZSTD, ops=ops, merged=count, points=[(1, 3)])),
        ("v3 longer than its base", Draft(3, ZSTD, 4096, _behind(Random(2), 3, ZSTD))),
        ("v3 large blocks", Draft(3, LZ4, 32768, _ops(Random(3), 3, LZ4, 32768), unit=262144)),
        ("v3 copies", Draft(3, ops=[DraftOp(COPY, block, block + 1) for block in range(40)])),
        ("v3 XORs", Draft(3, LZ4, ops=_xors(Random(4), 3, LZ4), slots=2)),
    ]
    return drafts


def _streams() -> list[tuple[str, Draft]]:
    """Versions 1 and 2."""
    drafts = []
    for algorithm in (NONE, GZ, BROTLI, LZ4, ZSTD):
        for cluster_ops in (0, 2, 5, 40):
            random = Random(f"2 {algorithm} {cluster_ops}")
            block_size = random.choice((512, 4096)) if algorithm else 512
            ops = _ops(random, 2, algorithm, block_size)
            drafts.append((f"v2 {algorithm} {cluster_ops}", Draft(2, algorithm, block_size, ops, cluster_ops)))
    labelled = _ops(Random(5), 2, LZ4, 512)
    labelled[2:2] = [DraftOp(LABEL, source=0)]
    labelled[7:7] = [DraftOp(LABEL, source=5), DraftOp(LABEL, source=5), DraftOp(LABEL, source=1 << 63)]
    labelled.append(DraftOp(LABEL, source=1 << 48))
    ops = _ops(Random(6), 2, GZ, 512)
    ordered = [one.block for one in ops if one.kind in (COPY, XOR)]
    half = len(ordered) // 2
    listed = [DraftOp(SEQUENCE, payload=_list(part)) for part in (ordered[:half], ordered[half:])]
    count = len(ops)
    drafts += [
        ("v2 empty", Draft(2)),
        ("v2 empty clustered", Draft(2, cluster_ops=4)),
        ("v2 labels", Draft(2, LZ4, ops=labelled)),
        ("v2 labels clustered", Draft(2, LZ4, ops=labelled, cluster_ops=6)),
        ("v2 unfinished", Draft(2, LZ4, ops=labelled, finish=False)),
        ("v2 unfinished clustered", Draft(2, LZ4, ops=labelled, cluster_ops=6, finish=False)),
        ("v2 sequence", Draft(2, GZ, ops=listed + ops[::-1], cluster_ops=5)),
        ("v2 window done", Draft(2, GZ, ops=ops, scratch=512, state=2)),
        ("v2 half merged", Draft(2, GZ, ops=ops, merged=2, scratch=512, state=1)),
        ("v2 merged", Draft(2, GZ, ops=ops, merged=count, cluster_ops=7)),
        ("v2 longer than its base", Draft(2, ZSTD, 4096, _behind(Random(7), 2, ZSTD), 3)),
        ("v2 XORs", Draft(2, BROTLI, ops=_xors(Random(8), 2, BROTLI), cluster_ops=9)),
        ("v1", Draft(1, GZ, ops=_ops(Random(9), 1, GZ, 512))),
        ("v1 clustered", Draft(1, NONE, ops=_ops(Random(10), 1, NONE, 512), cluster_ops=4)),
    ]
    return drafts


def _odd_headers() -> list[Seed]:
    """Headers of another version's size, which a lenient parse takes (V4)."""
    # None of these ops says where in the file anything lies.
    ops = [one for one in _ops(Random(11), 2, LZ4, 512) if one.kind != REPLACE]
    short, long = bytearray(Draft(2, LZ4, ops=ops).build()), bytearray(Draft(1, LZ4, ops=ops).build())
    short[12:14], long[12:14] = struct.pack("<H", 34), struct.pack("<H", 38)
    del short[34:38]
    long[34:34] = bytes(4)
    return [Seed("v2 with the header of v1", bytes(short)), Seed("v1 with the header of v2", bytes(long))]


def _ops(random: Random, version: int, algorithm: int, block_size: int) -> list[DraftOp]:
    """Ops that an ordered merge takes: XORs, copies downwards, then zeros and replaced blocks in any order."""
    blocks = len(BASE) // block_size
    at = random.randrange(max(1, blocks // 3))
    ops = []
    for _ in range(3):
        if version == 1:
            break
        payload = packed(algorithm, unit(random, block_size), version)
        ops.append(DraftOp(XOR, at, random.randrange(blocks // 2 * block_size, len(BASE) - block_size), payload))
        at += random.choice((1, 1, 2))
    for _ in range(3):
        ops.append(DraftOp(COPY, at, random.randrange(blocks // 2, blocks)))
        at += random.choice((1, 1, 2))
    last = []
    for index in range(6):
        exponent = random.randrange(4) if version == 3 and block_size < 32768 and index % 2 else 0
        if index % 3 == 2:
            last.append(DraftOp(ZERO, at, 0))
            exponent = 0
        else:
            payload = packed(algorithm, unit(random, block_size << exponent), version)
            last.append(DraftOp(REPLACE, at, payload=payload, exponent=exponent))
        at = min(at + (1 << exponent) + random.choice((0, 0, 1)), blocks - 9)
    last = list({one.block: one for one in last}.values())
    random.shuffle(last)
    return ops + last


def _behind(random: Random, version: int, algorithm: int) -> list[DraftOp]:
    """Ops for blocks behind the base."""
    blocks = len(BASE) // 4096
    content = [packed(algorithm, unit(random, 4096), version) for _ in range(2)]
    return [
        DraftOp(COPY, blocks + 1, 3),
        DraftOp(ZERO, blocks, 0),
        DraftOp(REPLACE, blocks + 2, payload=content[0]),
        DraftOp(REPLACE, blocks + 3, payload=content[1]),
    ]


def _xors(random: Random, version: int, algorithm: int) -> list[DraftOp]:
    """XOR blocks side by side, whose sources partly are."""
    at = random.randrange(1000, 100_000)
    ops = []
    for block in range(8):
        ops.append(DraftOp(XOR, block, at, packed(algorithm, unit(random, 512), version)))
        at += random.choice((512, 512, 513, 100))
    return ops


def _written(version: int, algorithm: str) -> Seed:
    """A file of our writer, with labels, and with its digests table."""
    disk, random = SimDisk(Random(0)), Random(f"{version} {algorithm}")
    cow, table, base = disk.store("cow"), disk.store("table"), disk.store("base", BASE)
    blocks = len(BASE) // 4096
    options = WriterOptions(
        version=version,
        compression=CompressOption.parse(algorithm),
        unit=16384 if version == 3 else 4096,
        max_blocks=blocks + 4,
        cluster_ops=6,
        scratch=False,
    )
    log = DigestLog.create(table, block_size=4096)
    writer = create_writer(cow, options, TargetDigests(log, base, blocks, blocks + 4))
    writer.sequence([20, 21, 3, 4, 5])
    writer.xor(20, packed(NONE, unit(random, 8192), version), 30, 77)
    writer.label(1)
    writer.copy(3, 40, 3)
    writer.zero(8, 2)
    writer.label(2)
    writer.raw(blocks - 3, b"".join(unit(random, 4096) for _ in range(7)))
    writer.finalize()
    writer.close()
    digests = read_bytes(table, 0, table.size())
    return Seed(f"v{version} {algorithm} of our writer", read_bytes(cow, 0, cow.size()), digests=digests)


def _list(blocks: list[int]) -> bytes:
    return struct.pack(f"<{len(blocks)}I", *blocks)

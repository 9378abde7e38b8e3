"""Hostile input: mutated files in bulk, each through everything that reads one; and what a parse may cost.

A failure names its case: `SNAPD_FUZZ_SEED=n pytest tests/fuzz` tries that one alone, `SNAPD_FUZZ_FILES=n` sets how many
are tried in all. How the files ended is counted and printed (`pytest -rP`).
"""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import tables
from corpus import regressions
from draft import Seed
from findings import Outcome, memory_file
from fuzz import PARSE_BYTES, PARSE_FACTOR, check_parse_memory
from rawcow import COPY, LABEL, Rec, header, op, raw_cow, raw_stream, sequence_of
from refseeds import ARCHIVE
from target import check

from snapd.cow.digests import DigestTable

PARTS = 4
FILES = int(os.environ.get("SNAPD_FUZZ_FILES", "8000"))
REFERENCE_PARTS = 2
REFERENCE_FILES = FILES // 10
SEED = os.environ.get("SNAPD_FUZZ_SEED")
COUNTED_FILES = 1000
"""From so many files on, each of the statements below must have been met."""
REGRESSION_BYTES = 32 << 20

PARSE = {f"V{row}" for row in range(1, 30) if row != 15}
PARSE |= {"COW-26", "COW-28", "COW-37", "COW-58", "COW-67", "COW-107", "COW-109"}
STATEMENTS = {
    "parse": PARSE,
    "parse to a label": {"V14", "V15", "V22", "V32"},
    "lenient parse": {"V18", "V20", "V22"},
    "tolerated": {"V4", "V18", "V27", "V28", "V32"},
    "map": {"V30", "COW-216", "UNDO-23", "UNDO-28"},
    "order": {"COW-74", "COW-75"},
    "digests": {"COW-216"},
    "read": {"COW-103", "COW-120", "COW-216"},
}


def fuzz(folder: Path, corpus: str, first: int, end: int) -> Outcome:
    """Run the numbers [first, end) in a process of their own; how the files ended."""
    report = folder / "report"
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("fuzz.py")), str(report)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([*command, corpus, str(first), str(end)], env=environment, check=False)
    assert done.returncode == 0, f"ended with {done.returncode} at SNAPD_FUZZ_SEED={report.read_text().strip()}"
    result = json.loads(report.read_text())
    outcome: Outcome = Counter({(stage, how): count for stage, how, count in result["outcome"]})
    seconds, grown = result["seconds"], result["growth_bytes"] >> 20
    print(f"{end - first} files in {seconds:.0f} s, the address space grew by {grown} MiB")
    for (stage, how), count in sorted(outcome.items()):
        print(f"{stage:<18} {how:<10} {count:>9}")
    assert not result["findings"], "\n".join(result["findings"])
    return outcome


def numbers(part: int, parts: int, files: int) -> tuple[int, int]:
    """The first and the end of the numbers of one part of all files; those of a replay are one, in the first part."""
    if SEED is not None:
        return int(SEED), int(SEED) + (not part)
    return files * part // parts, files * (part + 1) // parts


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files(part: int, tmp_path: Path) -> None:
    """COW-97, COW-103, COW-120, COW-216: read right or refused by a rule, as another reader says; no rule is missed."""
    outcome = fuzz(tmp_path, "own", *numbers(part, PARTS, FILES))
    if SEED is None and FILES // PARTS >= COUNTED_FILES:
        missed = {stage: wanted - {how for one, how in outcome if one == stage} for stage, wanted in STATEMENTS.items()}
        assert not any(missed.values()), f"never met: {missed}"


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the reference writer's files are not here")
@pytest.mark.parametrize("part", range(REFERENCE_PARTS))
def test_mutated_files_of_the_reference_writer(part: int, tmp_path: Path) -> None:
    """COW-97, COW-103, COW-120: the same for what it wrote."""
    fuzz(tmp_path, "reference", *numbers(part, REFERENCE_PARTS, REFERENCE_FILES))


@pytest.mark.parametrize("seed", regressions(), ids=lambda seed: seed.name)
def test_what_once_showed_a_fault(seed: Seed, tmp_path: Path) -> None:
    """V10, V16, COW-103, COW-209, COW-216: each of these files once took memory without bound or was read wrongly."""
    tracemalloc.start()
    try:
        check(seed.raw, seed.digests, Random(seed.name), tmp_path)
        assert tracemalloc.get_traced_memory()[1] <= REGRESSION_BYTES
    finally:
        tracemalloc.stop()


COUNT = 20_000
ASCENDING = list(range(COUNT))
SHUFFLED = Random(1).sample(ASCENDING, COUNT)
POINTS = b"".join(struct.pack("<QQ", label, 0) for label in ASCENDING)
LABELS = [Rec(LABEL, 0, label) for label in ASCENDING]
COPIES = [Rec(COPY, block, block + 1) for block in SHUFFLED]
LISTS = [sequence_of(*SHUFFLED[at : at + 2]) for at in range(0, COUNT, 2)]
LARGE = {
    "v3 ops": raw_cow([op(COPY, block, block + 1) for block in SHUFFLED]),
    "v3 overlapping ops": raw_cow([op(COPY, block // 2, block + 1) for block in SHUFFLED]),
    "v3 ops with a fault each": raw_cow([op(COPY, block, block + 1, reserved=1) for block in SHUFFLED]),
    "v3 sequence": raw_cow([op(COPY, block, block + 1) for block in ASCENDING], sequence=tuple(SHUFFLED)),
    "v3 sequence of nothing": raw_cow([], sequence=tuple(SHUFFLED)),
    "v3 resume points": header(resume_point_max=COUNT, resume_point_count=COUNT) + POINTS,
    "v2 ops": raw_stream(COPIES).raw,
    "v2 ops in small clusters": raw_stream(COPIES, cluster_ops=2).raw,
    "v2 ops in large clusters": raw_stream(COPIES, cluster_ops=1024).raw,
    "v2 labels": raw_stream(LABELS).raw,
    "v2 labels in clusters": raw_stream(LABELS, cluster_ops=1000).raw,
    "v2 sequence": raw_stream(LISTS + COPIES, cluster_ops=30).raw,
    "v2 without an end": raw_stream(COPIES).raw[:-84],
}


@pytest.mark.parametrize("name", LARGE)
def test_the_memory_of_a_parse_follows_from_the_length_of_the_file(name: str) -> None:
    """COW-97: whatever a file is full of, parsing it takes at most 16 times its length and 1 MiB."""
    raw = LARGE[name]
    for label in (None, COUNT - 1):
        for lenient in (False, True):
            check_parse_memory(raw, label=label, lenient=lenient)


@pytest.mark.parametrize(
    "changed",
    [
        {"sequence_data_count": (1 << 64) - 1},
        {"resume_point_count": (1 << 32) - 1, "resume_point_max": (1 << 32) - 1},
        {"op_count": (1 << 32) - 1, "op_count_max": (1 << 32) - 1},
        {"buffer_size": (1 << 32) - 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_header_that_claims_more_than_there_is(changed: dict[str, int]) -> None:
    """V11, V21: what a header says takes no memory before the file is known to be that long."""
    for label in (None, 7):
        check_parse_memory(header(**changed) + bytes(64), label=label)


@pytest.mark.parametrize("runs", ["one", "short", "empty"])
def test_the_memory_of_a_digests_table_follows_from_its_length(runs: str) -> None:
    """COW-216: the same for a table, however it is cut into runs and segments."""
    cut = {
        "one": [(0, COUNT)],
        "short": [(2 * block, 1) for block in ASCENDING],
        "empty": [(block, 0) for block in range(4 * COUNT)],
    }[runs]
    digests = [] if runs == "empty" else [7] * COUNT
    small = [tables.Segment(tables.LABEL, 1, 1) for _ in range(500)]
    raw = tables.build_table(4096, [*small, tables.Segment(tables.LABEL, 1, 1, cut, digests)])
    store = memory_file(raw)
    tracemalloc.start()
    try:
        DigestTable.load(store, op_count=1, ops_digest=1).dense(COUNT)
        assert tracemalloc.get_traced_memory()[1] <= PARSE_FACTOR * len(raw) + PARSE_BYTES
    finally:
        tracemalloc.stop()
        os.close(store.fd)

"""The digests table: believed only for the very ops it was made for, and never when it is not whole."""

from random import Random

import numpy as np
import pytest
from cowfiles import store

from snapd.block.simdisk import SimStore
from snapd.block.store import read_bytes
from snapd.cow.digests import DigestLog, DigestTable, block_digest
from snapd.cow.errors import CowError


def log_of(states: int) -> tuple[SimStore, DigestLog]:
    """A log with `states` labels: 1, 2, ..., each making two blocks known."""
    table = store()
    log = DigestLog.create(table, block_size=4096)
    for label in range(1, states + 1):
        log.put(2 * label, [label, label + 100])
        log.commit(op_count=label, ops_digest=label * 7, label=label)
    return table, log


def test_a_table_has_what_was_known_at_a_state() -> None:
    """COW-216: each label is a state of its own; later digests do not count in it."""
    table, _ = log_of(3)
    assert DigestTable.load(table, op_count=2, ops_digest=14).dense(9).tolist() == [0, 0, 1, 101, 2, 102, 0, 0, 0]
    assert not DigestTable.load(table, op_count=3, ops_digest=21).is_final


def test_the_end_knows_every_block_and_the_whole() -> None:
    """COW-216: hash and size of the whole target; a block that nobody told is an error that names it."""
    table, log = log_of(1)
    with pytest.raises(CowError, match="block 0 of the target is not known"):
        log.finish(op_count=1, ops_digest=7, target_blocks=4)
    log.put(0, np.array([8, 9], dtype=np.uint64))
    log.finish(op_count=1, ops_digest=7, target_blocks=4)
    final = DigestTable.load(table, op_count=1, ops_digest=7)
    assert final.target_bytes == 4 * 4096
    assert final.dense(4).tolist() == [8, 9, 1, 101]
    # A view of another size knows less, and does not fail.
    assert final.dense(3).tolist() == [8, 9, 1]
    assert final.dense(5).tolist() == [8, 9, 1, 101, 0]


def test_a_later_digest_of_a_block_wins() -> None:
    """COW-216: an append changes a block that was unchanged."""
    table, log = log_of(1)
    log.put(2, [77])
    log.commit(op_count=2, ops_digest=5, label=9)
    assert DigestTable.load(table, op_count=2, ops_digest=5).dense(4).tolist() == [0, 0, 77, 101]
    assert DigestTable.load(table, op_count=1, ops_digest=7).dense(4).tolist() == [0, 0, 1, 101]


@pytest.mark.parametrize(("op_count", "ops_digest"), [(2, 7), (1, 14), (4, 28)])
def test_other_ops_are_refused(op_count: int, ops_digest: int) -> None:
    """COW-216: neither another count nor another hash, and never a guess."""
    table, _ = log_of(3)
    with pytest.raises(CowError, match="COW-216"):
        DigestTable.load(table, op_count=op_count, ops_digest=ops_digest)


def test_reopening_cuts_what_came_later() -> None:
    """COW-216: an append cuts the table first; what is appended then stands in its place."""
    table, _ = log_of(3)
    log = DigestLog.reopen(table, op_count=1, ops_digest=7)
    assert not table.unflushed_sectors()
    with pytest.raises(CowError, match="other ops"):
        DigestTable.load(table, op_count=2, ops_digest=14)
    log.put(50, [5])
    log.commit(op_count=2, ops_digest=99, label=8)
    assert DigestTable.load(table, op_count=2, ops_digest=99).dense(6).tolist() == [0, 0, 1, 101, 0, 0]
    with pytest.raises(CowError, match="other ops"):
        DigestLog.reopen(table, op_count=3, ops_digest=21)
    assert DigestTable.load(table, op_count=2, ops_digest=99)


def test_any_flipped_byte_hides_its_segment_and_all_behind_it() -> None:
    """COW-216: the table is checksummed; what is damaged is not believed, what lies before it still is."""
    table, _ = log_of(3)
    ends = []
    for label in (1, 2, 3):
        twin, _ = log_of(label)
        ends.append(twin.size())
    random = Random(5)
    for at in range(table.size()):
        healthy = read_bytes(table, at, 1)
        table.write(bytes([healthy[0] ^ 1 << random.randrange(8)]), at)
        for label, end in zip((1, 2, 3), ends, strict=True):
            if at < end:
                with pytest.raises(CowError, match="COW-216"):
                    DigestTable.load(table, op_count=label, ops_digest=label * 7)
            else:
                assert DigestTable.load(table, op_count=label, ops_digest=label * 7)
        table.write(healthy, at)


def test_a_log_that_was_cut_off_has_its_whole_segments() -> None:
    """COW-216: a power cut during an append leaves the states before it, at any length."""
    table, _ = log_of(2)
    whole = read_bytes(table, 0, table.size())
    first, _ = log_of(1)
    for length in range(len(whole)):
        short = store(whole[:length])
        for label, end in ((1, first.size()), (2, len(whole))):
            if length >= end:
                assert DigestTable.load(short, op_count=label, ops_digest=label * 7)
                continue
            with pytest.raises(CowError, match="COW-216"):
                DigestTable.load(short, op_count=label, ops_digest=label * 7)


def test_no_digest_is_zero() -> None:
    """COW-216: zero says "not known", so no block may hash to it."""
    assert block_digest(bytes(4096)) != 0

"""What lies beside a COW: who merges it (UNDO-28), and which image a base holds."""

import errno
import os
from pathlib import Path
from uuid import UUID

import pytest
from cowfiles import block, image, store, written

from snapd.block.errors import SnapdError
from snapd.cow.claim import check_unclaimed, claim, claim_path, release
from snapd.cow.history import MergeRecord, digest_targets, holds_new_image, write_record
from snapd.cow.parse.reader import CowFile

ONE, TWO = UUID(int=1), UUID(int=2)


@pytest.fixture
def cow(tmp_path: Path) -> Path:
    path = tmp_path / "update.cow"
    path.write_bytes(b"")
    return path


def test_a_claim_keeps_everybody_else_away(cow: Path) -> None:
    """UNDO-28: its owner may claim again; others, and offline verbs, are refused and told who it is."""
    claim(cow, ONE, "/undo/one")
    claim(cow, ONE, "/undo/one")
    check_unclaimed(cow, ONE)
    for other in (TWO, None):
        with pytest.raises(SnapdError, match=f"{ONE}, undo store in /undo/one") as caught:
            check_unclaimed(cow, other)
        assert caught.value.errno == errno.EBUSY
    with pytest.raises(SnapdError):
        claim(cow, TWO, "/undo/two")
    with pytest.raises(SnapdError):
        release(cow, TWO)
    check_unclaimed(cow, ONE)


def test_a_released_claim_is_gone(cow: Path) -> None:
    claim(cow, ONE, "/undo")
    release(cow, ONE)
    release(cow, ONE)
    check_unclaimed(cow)
    assert os.listdir(cow.parent) == [cow.name]


def test_another_name_of_the_cow_is_the_same_claim(cow: Path) -> None:
    alias = cow.with_name("alias.cow")
    alias.symlink_to(cow)
    claim(alias, ONE, "/undo")
    with pytest.raises(SnapdError):
        check_unclaimed(cow)


def test_an_offline_merge_is_a_claim_of_nobody_in_particular(cow: Path) -> None:
    os.mkdir(claim_path(cow))
    with pytest.raises(SnapdError, match="an offline merge of it has begun"):
        claim(cow, ONE, "/undo")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"snapshot": 1}'])
def test_a_claim_that_cannot_be_read_counts(cow: Path, content: str) -> None:
    """In doubt somebody is merging."""
    Path(claim_path(cow)).write_text(content)
    with pytest.raises(SnapdError) as caught:
        check_unclaimed(cow, ONE)
    assert caught.value.errno == errno.EBUSY


def test_a_claim_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Without it the COW must not be merged."""
    with pytest.raises(SnapdError):
        claim(tmp_path / "nowhere" / "update.cow", ONE, "/undo")


OLD, NEW = image([1, 2, 3, 4]), image([2, 2, 9, 4])
PAYLOADS = written(("copy", 0, 1), ("replace", 2, block(9)))
COW = CowFile.parse(PAYLOADS)


def leave_record(cow: Path, ops_digest: int = COW.ops_digest) -> None:
    extent_map = COW.extent_map(len(OLD))
    digests = [digest_targets(extent_map, store(content)) for content in (OLD, NEW)]
    write_record(cow, MergeRecord(ops_digest, *digests))


def test_a_record_tells_the_old_image_from_the_new(cow: Path) -> None:
    """COW-145: what was merged into one base may be merged into another, and never again into its own."""
    leave_record(cow)
    assert not holds_new_image(COW, cow, PAYLOADS, store(OLD))
    assert holds_new_image(COW, cow, PAYLOADS, store(NEW))
    # Blocks without an op are none of the merge's business.
    assert holds_new_image(COW, cow, PAYLOADS, store(NEW[: 3 * 4096] + block(7)))


@pytest.mark.parametrize("number", [0, 2])
def test_a_base_that_is_neither_is_refused(cow: Path, number: int) -> None:
    leave_record(cow)
    changed = bytearray(NEW)
    changed[number * 4096 + 100] ^= 1
    with pytest.raises(SnapdError, match="neither the old nor the new image") as caught:
        holds_new_image(COW, cow, PAYLOADS, store(bytes(changed)))
    assert caught.value.errno == errno.EINVAL


def test_the_record_of_other_ops_says_nothing(cow: Path) -> None:
    """A COW that is replaced by another keeps its neighbours' names, not their meaning."""
    leave_record(cow, ops_digest=1)
    assert not holds_new_image(COW, cow, PAYLOADS, store(NEW))


def test_without_a_record_an_unmerged_cow_is_new_to_every_base(cow: Path) -> None:
    assert not holds_new_image(COW, cow, PAYLOADS, store(NEW))


def test_a_grown_image_is_told_by_what_lies_behind_the_old_end(cow: Path) -> None:
    """UNDO-23: behind its end the old image counts as zeros."""
    payloads = written(("replace", 4, block(5)))
    grown = CowFile.parse(payloads)
    extent_map = grown.extent_map(len(OLD))
    digests = [digest_targets(extent_map, store(content)) for content in (OLD, OLD + block(5))]
    write_record(cow, MergeRecord(grown.ops_digest, *digests))
    assert not holds_new_image(grown, cow, payloads, store(OLD))
    assert holds_new_image(grown, cow, payloads, store(OLD + block(5)))

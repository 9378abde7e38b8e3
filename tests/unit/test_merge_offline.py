"""`merge_offline` on real files: every step may be the last one, and the next call finishes or refuses."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.lock import open_locked
from snapd.block.store import read_bytes
from snapd.cow import history
from snapd.cow.claim import claim
from snapd.cow.compress import CompressOption
from snapd.cow.format import PROGRESS, PROGRESS_OFFSET
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import create_writer
from snapd.cow.write.writeroptions import WriterOptions
from snapd.merge import offline
from snapd.merge.engine import Merge
from snapd.merge.offline import MergeReport, merge_offline
from snapd.merge.undodir import UndoDirectory

BLOCK = 4096
BLOCKS = 64


class Stopped(Exception):
    """The call ends here, as if its process had died."""


class Case:
    """A base, a COW over it with every kind of op, and the image that it describes; the target is longer."""

    def __init__(self, directory: Path, seed: int = 0, *, grow: int = 2, version: int = 3) -> None:
        random = Random(seed)
        old = [random.randbytes(16) * 256 for _ in range(BLOCKS)]
        new = [*old, *(random.randbytes(BLOCK) for _ in range(grow))]
        self.cow, self.base = directory / f"c{seed}.cow", directory / f"base{seed}"
        self.base.write_bytes(b"".join(old))
        options = WriterOptions(
            version=version,
            compression=CompressOption.parse("zstd"),
            unit=64 << 10 if version == 3 else BLOCK,
            op_count_max=BLOCKS + grow,
        )
        fd = os.open(self.cow, os.O_RDWR | os.O_CREAT)
        with contextlib.closing(create_writer(FileStore(fd), options)) as writer:
            new[0:2] = old[1], old[0]
            writer.copy(0, 1)
            writer.copy(1, 0)
            below = b"".join(old)[3 * BLOCK + 100 : 4 * BLOCK + 100]
            new[3] = random.randbytes(BLOCK)
            writer.xor(3, bytes(one ^ other for one, other in zip(new[3], below, strict=True)), 3, 100)
            new[5] = bytes(BLOCK)
            writer.zero(5)
            new[8:24] = [random.randbytes(64) * 64 for _ in range(16)]
            writer.raw(8, b"".join(new[8:24]))
            writer.raw(30, old[30])
            writer.raw(BLOCKS, b"".join(new[BLOCKS:]))
            writer.finalize()
        os.close(fd)
        self.old, self.new = b"".join(old), b"".join(new)
        self.changed_blocks = 2 + 1 + 1 + 16 + grow

    @property
    def undo(self) -> Path:
        return Path(str(self.cow) + ".undo")

    @property
    def record(self) -> Path:
        return Path(str(self.cow) + ".merged")

    def merge(self, progress: Callable[[int, int], None] = lambda _done, _total: None) -> MergeReport:
        return merge_offline(str(self.cow), str(self.base), progress)

    def check_done(self) -> None:
        assert self.base.read_bytes() == self.new
        assert not self.undo.exists()
        fd = os.open(self.cow, os.O_RDONLY)
        assert CowFile.parse(FileStore(fd)).is_merged
        os.close(fd)

    def files(self) -> dict[str, bytes]:
        """Everything there is, to see that nothing has changed."""
        found = [self.cow, self.base, *(self.undo.iterdir() if self.undo.exists() else ())]
        return {str(path): path.read_bytes() for path in found}


@pytest.mark.parametrize("version", [2, 3])
def test_it_merges_in_place_and_says_what_it_did(tmp_path: Path, version: int) -> None:
    """UNDO-9, COW-145: the base is the new image, read back; C is marked; nothing is left behind."""
    case = Case(tmp_path, version=version)
    seen: list[tuple[int, int]] = []
    report = case.merge(lambda done, total: seen.append((done, total)))
    case.check_done()
    assert not report.already_merged
    assert report.changed_bytes == report.written_bytes == case.changed_blocks * BLOCK
    assert report.undo_bytes > 0
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_again_says_already_merged(tmp_path: Path) -> None:
    """COW-145: the second call checks the base, writes nothing."""
    case = Case(tmp_path)
    case.merge()
    before = case.files()
    report = case.merge()
    assert report.already_merged
    assert report.written_bytes == report.changed_bytes == report.undo_bytes == 0
    assert case.files() == before


def test_a_merged_cow_merges_again_into_another_old_base(tmp_path: Path) -> None:
    """A lab has many bases and one COW: what the first merge left beside it knows an old image when it sees one."""
    case = Case(tmp_path)
    case.merge()
    case.base.write_bytes(case.old)
    assert not case.merge().already_merged
    case.check_done()
    assert case.merge().already_merged


def test_a_base_that_is_neither_image_is_refused(tmp_path: Path) -> None:
    """Never claim success, and never merge, on a base that was the new image and has changed since."""
    case = Case(tmp_path)
    case.merge()
    changed = bytearray(case.new)
    changed[5 * BLOCK] ^= 1
    case.base.write_bytes(changed)
    before = case.files()
    with pytest.raises(SnapdError, match="neither the old nor the new image") as caught:
        case.merge()
    assert caught.value.errno == errno.EINVAL
    assert case.files() == before


def test_without_the_record_a_merged_cow_is_believed_only_on_its_own_base(tmp_path: Path) -> None:
    """COW-145: the first differing block is named; a base too short, too."""
    case = Case(tmp_path)
    case.merge()
    case.record.unlink()
    assert case.merge().already_merged
    case.base.write_bytes(case.old + bytes(2 * BLOCK))
    with pytest.raises(SnapdError, match=r"marked as merged, but block 5 of this base differs") as caught:
        case.merge()
    assert caught.value.errno == errno.EINVAL
    case.base.write_bytes(case.old)
    with pytest.raises(SnapdError, match="this base has only"):
        case.merge()


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    """EBADMSG, never "not merged"; the record of another COW's ops says nothing about this one."""
    case = Case(tmp_path)
    case.merge()
    good = case.record.read_bytes()
    case.record.write_bytes(good[:-3])
    with pytest.raises(SnapdError, match="not the record of a merge") as caught:
        case.merge()
    assert caught.value.errno == errno.EBADMSG
    case.record.write_bytes(b'{"ops": "1", "old": "", "new": ""}')
    assert case.merge().already_merged


def stop_in(monkeypatch: pytest.MonkeyPatch, target: object, name: str, *, after: bool) -> None:
    """Make the named function the last thing that happens."""
    original = getattr(target, name)

    def stopped(*arguments: object, **options: object) -> None:
        if after:
            original(*arguments, **options)
        raise Stopped

    monkeypatch.setattr(target, name, stopped)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["make", "run", "confirm", "record", "mark", "remove", "rmdir"])
def test_every_step_may_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool) -> None:
    """The table of the module: stopped before or after each step, the next call finishes."""
    case = Case(tmp_path)
    with monkeypatch.context() as patch:
        target, name = {
            "make": (offline, "_make_directory"),
            "run": (Merge, "run"),
            "confirm": (Merge, "confirm"),
            "record": (history, "write_record"),
            "mark": (history, "mark_merged"),
            "remove": (UndoDirectory, "remove"),
            "rmdir": (os, "rmdir"),
        }[step]
        stop_in(patch, target, name, after=after)
        with pytest.raises(Stopped):
            case.merge()
    report = case.merge()
    assert report.already_merged == ((step, after) == ("mark", True) or step in ("remove", "rmdir"))
    if not report.already_merged:
        assert report.changed_bytes == case.changed_blocks * BLOCK
    case.check_done()


def stop_in_merge(case: Case, calls: int) -> None:
    """End a call at its `calls`-th progress report."""

    def progress(_done: int, _total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Stopped

    with pytest.raises(Stopped):
        case.merge(progress)


@pytest.mark.parametrize("calls", [2, 3])
def test_a_wrong_base_on_resume_is_refused(tmp_path: Path, calls: int) -> None:
    """A base with the same size, another base or the old image put back, is not where the merge was begun."""
    case = Case(tmp_path)
    stop_in_merge(case, calls)
    begun = case.base.read_bytes()
    for other in (Random(9).randbytes(len(begun)), case.old + begun[len(case.old) :]):
        case.base.write_bytes(other)
        before = case.files()
        with pytest.raises(SnapdError, match="is this the right base") as caught:
            case.merge()
        assert caught.value.errno == errno.EINVAL
        assert case.files() == before
    case.base.write_bytes(begun[: len(case.old) - BLOCK])
    with pytest.raises(SnapdError, match="was begun on"):
        case.merge()
    case.base.write_bytes(begun)
    case.merge()
    case.check_done()


def test_the_undo_directory_of_another_cow_is_refused(tmp_path: Path) -> None:
    """UNDO-15: a COW replaced under its name does not go on with the other's merge."""
    case, other = Case(tmp_path), Case(tmp_path, 1, grow=1)
    stop_in_merge(case, 2)
    case.cow.write_bytes(other.cow.read_bytes())
    before = case.files()
    with pytest.raises(SnapdError, match="another COW") as caught:
        case.merge()
    assert caught.value.errno == errno.EINVAL
    assert case.files() == before


def test_a_damaged_state_file_is_refused(tmp_path: Path) -> None:
    """UNDO-29: EBADMSG, and nothing is touched."""
    case = Case(tmp_path)
    stop_in_merge(case, 2)
    state = case.undo / "state"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    before = case.files()
    with pytest.raises(SnapdError) as caught:
        case.merge()
    assert caught.value.errno == errno.EBADMSG
    assert case.files() == before


def test_both_images_are_readable_in_between(tmp_path: Path) -> None:
    """UNDO-3: until it is confirmed, base and undo store give the old image, as plain files."""
    case = Case(tmp_path)
    stop_in_merge(case, 3)
    undo = os.open(case.undo / "undo.cow", os.O_RDONLY)
    base = os.open(case.base, os.O_RDONLY)
    try:
        plain = CowFile.parse(FileStore(undo)).extent_map(len(case.old))
        view = CowView(plain, FileStore(undo), source=FileStore(base), base=FileStore(base))
        assert read_bytes(view, 0, len(case.old)) == case.old
        assert case.base.read_bytes() != case.old
    finally:
        os.close(undo)
        os.close(base)


@pytest.mark.parametrize("which", ["cow", "base"])
def test_files_in_use_are_refused(tmp_path: Path, which: str) -> None:
    """UNDO-28: both are locked; EBUSY while somebody else holds either."""
    case = Case(tmp_path)
    fd = open_locked(case.cow if which == "cow" else case.base)
    try:
        with pytest.raises(SnapdError) as caught:
            case.merge()
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBUSY
    assert not case.undo.exists()


@pytest.mark.parametrize("damage", ["progress", "scratch"])
def test_an_ordered_merge_that_has_begun_is_refused(tmp_path: Path, damage: str) -> None:
    """UNDO-28: O is gone already; finish that merge first."""
    case = Case(tmp_path)
    with open(case.cow, "r+b") as file:
        file.seek(PROGRESS_OFFSET if damage == "progress" else 78)
        file.write(PROGRESS.pack(2) if damage == "progress" else b"\2")
    with pytest.raises(SnapdError, match="UNDO-28") as caught:
        case.merge()
    assert caught.value.errno == errno.EBUSY
    assert case.base.read_bytes() == case.old
    assert not case.undo.exists()


def test_a_cow_that_a_service_merges_is_refused(tmp_path: Path) -> None:
    """UNDO-28: the claim beside the COW outlives every lock; nothing is touched, merged or not."""
    case = Case(tmp_path)
    claim(case.cow, uuid.UUID(int=7), tmp_path / "elsewhere")
    before = case.cow.read_bytes(), case.base.read_bytes(), case.undo.read_bytes()
    with pytest.raises(SnapdError, match="a service has begun to merge it") as caught:
        case.merge()
    assert caught.value.errno == errno.EBUSY
    assert (case.cow.read_bytes(), case.base.read_bytes(), case.undo.read_bytes()) == before


def test_a_cow_under_another_name_goes_on_with_its_own_merge(tmp_path: Path) -> None:
    """The undo directory lies beside the file itself, whatever link was named."""
    case = Case(tmp_path)
    stop_in_merge(case, 2)
    link = tmp_path / "link.cow"
    link.symlink_to(case.cow)
    merge_offline(str(link), str(case.base), lambda _done, _total: None)
    case.check_done()


def test_an_empty_cow_is_complete_at_once(tmp_path: Path) -> None:
    """COW-212: no ops, the target is the base."""
    case = Case(tmp_path)
    fd = os.open(tmp_path / "empty.cow", os.O_RDWR | os.O_CREAT)
    options = WriterOptions(compression=CompressOption.parse("none"), op_count_max=4)
    create_writer(FileStore(fd), options).finalize()
    os.close(fd)
    case.cow = tmp_path / "empty.cow"
    report = case.merge()
    assert not report.already_merged
    assert report.changed_bytes == report.written_bytes == 0
    assert case.base.read_bytes() == case.old
    assert not case.undo.exists()


def test_a_base_that_does_not_fit_is_refused_with_nothing_made(tmp_path: Path) -> None:
    """V30: copies from behind the base; and a base that is the COW itself."""
    case = Case(tmp_path)
    case.base.write_bytes(b"")
    with pytest.raises(SnapdError):
        case.merge()
    assert not case.undo.exists()
    with pytest.raises(SnapdError) as caught:
        merge_offline(str(case.cow), str(case.cow), lambda _done, _total: None)
    assert caught.value.errno in (errno.EBUSY, errno.EINVAL)

"""Creating, extracting, verifying and describing COW files by path."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from cowfiles import block, image, written

from snapd.block.errors import SnapdError
from snapd.block.store import read_bytes
from snapd.cow.claim import SUFFIX
from snapd.cow.compress import CompressOption
from snapd.cow.create import create_cow
from snapd.cow.errors import CowError
from snapd.cow.extract import extract_image
from snapd.cow.format import BLOCK_SIZE, PROGRESS, PROGRESS_OFFSET
from snapd.cow.info import cow_info
from snapd.cow.mergeorder import CopyOrder
from snapd.cow.verify import verify_cow

ZSTD = CompressOption.parse("zstd")
OLD = Random(1).randbytes(30 * BLOCK_SIZE)
NEW = OLD[5 * BLOCK_SIZE :] + bytes(3 * BLOCK_SIZE) + image(range(1, 40))


def quiet(_done: int, _total: int) -> None:
    """Progress nobody looks at."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `old`, `new` and the COW between them, `cow`."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    create_cow(tmp_path / "old", tmp_path / "new", tmp_path / "cow", ZSTD, 64 << 10, quiet)
    return tmp_path


def test_create_and_extract(folder: Path) -> None:
    """From two images to a COW to the new image; the file reserves slots for the target (COW-16)."""
    report = extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == NEW
    assert report.image_bytes == len(NEW)
    info = cow_info(folder / "cow")
    assert info.op_slots == len(NEW) // BLOCK_SIZE
    assert (info.version, info.compression, info.unit_bytes, info.scratch_bytes) == (3, "zstd", 64 << 10, 2 << 20)
    assert info.copy_ops + info.zero_ops + info.replace_ops == info.ops
    assert info.highest_target_block == len(NEW) // BLOCK_SIZE - 1


def test_report_counts_every_block(folder: Path) -> None:
    """What became of the target's blocks adds up, and the COW's size is the file's (COW-132)."""
    report = create_cow(folder / "old", folder / "new", folder / "again", ZSTD, 64 << 10, quiet)
    counted = report.unchanged_blocks + report.zero_blocks + report.copy_blocks + report.replace_blocks
    assert counted * BLOCK_SIZE == report.target_bytes == len(NEW)
    assert report.cow_bytes == (folder / "again").stat().st_size
    assert (folder / "again").read_bytes() == (folder / "cow").read_bytes()


def test_an_image_and_itself(folder: Path) -> None:
    """The same path twice is no deadlock: the result has no ops."""
    report = create_cow(folder / "old", folder / "old", folder / "none", ZSTD, 4096, quiet)
    assert report.ops == 0
    assert report.unchanged_blocks == 30


def test_a_file_that_does_not_merge_gets_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-154: what was written is read again, and with copies in a wrong order there is no file."""

    def ascending(order: CopyOrder, copy: Callable[[int, int], None]) -> None:
        for target in order._copies.tolist():
            copy(target, order._source[target])

    (folder / "up").write_bytes(OLD[: 3 * BLOCK_SIZE] + OLD[:-BLOCK_SIZE])
    monkeypatch.setattr(CopyOrder, "emit", ascending)
    with pytest.raises(CowError, match="COW-75"):
        create_cow(folder / "old", folder / "up", folder / "out", ZSTD, 4096, quiet)
    assert not {"out", "out.part"} & set(os.listdir(folder))


@pytest.mark.parametrize("which", ["old", "new"])
def test_create_refuses_what_is_in_use(folder: Path, which: str) -> None:
    """EBUSY for a locked image, and the COW that was there stays."""
    before = (folder / "cow").read_bytes()
    with (folder / which).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SnapdError) as caught:
            create_cow(folder / "old", folder / "new", folder / "cow", ZSTD, 4096, quiet)
    assert caught.value.errno == errno.EBUSY
    assert (folder / "cow").read_bytes() == before


@pytest.mark.parametrize("out", ["old", "new"])
def test_create_never_writes_over_an_image(folder: Path, out: str) -> None:
    """EINVAL when the output is one of the images."""
    with pytest.raises(SnapdError) as caught:
        create_cow(folder / "old", folder / "new", folder / out, ZSTD, 4096, quiet)
    assert caught.value.errno == errno.EINVAL
    assert ((folder / "old").read_bytes(), (folder / "new").read_bytes()) == (OLD, NEW)


def test_create_checks_the_sizes_before_it_writes(folder: Path) -> None:
    """COW-149: an odd image is an error that leaves no file."""
    (folder / "odd").write_bytes(b"x" * 5000)
    with pytest.raises(SnapdError, match="5000 bytes"):
        create_cow(folder / "old", folder / "odd", folder / "out", ZSTD, 4096, quiet)
    assert not {"out", "out.part"} & set(os.listdir(folder))


@pytest.mark.parametrize("out", ["cow", "old"])
def test_extract_never_writes_over_its_inputs(folder: Path, out: str) -> None:
    """EINVAL when the output is the base or the COW."""
    before = (folder / out).read_bytes()
    with pytest.raises(SnapdError) as caught:
        extract_image(folder / "cow", folder / "old", folder / out, None, quiet)
    assert caught.value.errno == errno.EINVAL
    assert (folder / out).read_bytes() == before


@pytest.mark.parametrize("which", ["cow", "old"])
def test_extract_takes_the_locks(folder: Path, which: str) -> None:
    """EBUSY while somebody holds the COW or the base."""
    with (folder / which).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SnapdError) as caught:
            extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert caught.value.errno == errno.EBUSY
    assert not (folder / "out").exists()


def test_extract_of_a_damaged_cow_leaves_nothing(folder: Path) -> None:
    """COW-120: one damaged unit, and the output that was there is still the one."""
    (folder / "out").write_bytes(b"before")
    with (folder / "cow").open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"\xff" * 10)
    with pytest.raises(CowError):
        extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == b"before"


def test_extract_sizes(folder: Path) -> None:
    """COW-213: `size` wins where the file does not contradict it."""
    larger = len(OLD) + 2 * BLOCK_SIZE
    (folder / "short").write_bytes(OLD[: 20 * BLOCK_SIZE])
    create_cow(folder / "old", folder / "short", folder / "c", ZSTD, 4096, quiet)
    extract_image(folder / "c", folder / "old", folder / "out", 20 * BLOCK_SIZE, quiet)
    assert (folder / "out").read_bytes() == OLD[: 20 * BLOCK_SIZE]
    extract_image(folder / "c", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == OLD
    for size in (larger, 5000, 0):
        with pytest.raises(SnapdError):
            extract_image(folder / "c", folder / "old", folder / "out", size, quiet)
    with pytest.raises(CowError, match="V30"):
        extract_image(folder / "cow", folder / "old", folder / "out", BLOCK_SIZE, quiet)


def test_extract_refuses_a_base_that_is_being_merged(folder: Path) -> None:
    """UNDO-4: beside an undo directory the base may hold half of each image, so copies cannot be read from it."""
    (folder / f"cow{SUFFIX}").mkdir()
    with pytest.raises(SnapdError, match="an offline merge of it has begun") as caught:
        extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert caught.value.errno == errno.EBUSY


def test_extract_of_a_merged_cow_is_the_base(folder: Path) -> None:
    """COW-65, COW-145: after the merge the new image is the base itself."""
    ops = cow_info(folder / "cow").ops
    with (folder / "cow").open("r+b") as file:
        file.seek(PROGRESS_OFFSET)
        file.write(PROGRESS.pack(ops))
    extract_image(folder / "cow", folder / "new", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == NEW
    assert cow_info(folder / "cow").merged_ops == ops


def test_verify_accepts_what_create_makes(folder: Path) -> None:
    """Structure, sizes, order and payloads of a created file are good for both merges."""
    report = verify_cow(folder / "cow", folder / "old", quiet)
    assert report.ok
    assert (report.ordered_merge, report.reversible_merge) == ("accepted", "accepted")
    assert report.damaged_ops == 0


def test_verify_tells_the_two_merges_apart(tmp_path: Path) -> None:
    """COW-210: a copy behind a replace fails the ordered merge; the report says that the reversible one takes it."""
    cow = written(("replace", 1, block(1)), ("copy", 2, 5))
    (tmp_path / "cow").write_bytes(read_bytes(cow, 0, cow.size()))
    report = verify_cow(tmp_path / "cow", None, quiet)
    assert not report.ok
    assert report.ordered_merge.startswith("refused: op 1")
    assert report.reversible_merge == "accepted"


def test_verify_decodes_every_payload(tmp_path: Path) -> None:
    """COW-103: damaged payloads are counted, the first ten are described, and no merge is offered."""
    units = [("replace", number, bytes([number, 1]) * 2048) for number in range(15)]
    cow = written(*units, compress="zstd")
    raw = bytearray(read_bytes(cow, 0, cow.size()))
    (tmp_path / "cow").write_bytes(raw)
    payload = cow_info(tmp_path / "cow").payload_bytes
    raw[-payload:] = bytes(payload)
    (tmp_path / "cow").write_bytes(raw)
    report = verify_cow(tmp_path / "cow", None, quiet)
    assert not report.ok
    assert report.damaged_ops == 15
    assert len(report.damage) == 10
    assert report.damage[0].startswith("op 0: ")
    assert report.reversible_merge.startswith("refused")


def test_verify_with_a_base_that_is_too_short(folder: Path) -> None:
    """V30: a copy from behind the base."""
    (folder / "small").write_bytes(OLD[: 4 * BLOCK_SIZE])
    with pytest.raises(CowError, match="V30"):
        verify_cow(folder / "cow", folder / "small", quiet)

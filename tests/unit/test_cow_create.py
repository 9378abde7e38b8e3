"""Creating, extracting, verifying and describing COW files by path."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from cowfiles import block, image, written

from snapd.block.errors import SnapdError
from snapd.block.lock import locked_store
from snapd.block.store import read_bytes
from snapd.cow.claim import SUFFIX
from snapd.cow.compress import CompressOption
from snapd.cow.diff.copyfind import NO_SOURCE
from snapd.cow.diff.copyorder import CopyOrder, OrderedRun
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.xormode import XorMode
from snapd.cow.digests import block_digest, load_digests
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE, PROGRESS, PROGRESS_OFFSET
from snapd.cow.parse.reader import CowFile
from snapd.cow.verbs.create import create_cow
from snapd.cow.verbs.estimate import estimate_cow
from snapd.cow.verbs.extract import extract_image
from snapd.cow.verbs.info import cow_info
from snapd.cow.verbs.verify import verify_cow

SMALL = CreateOptions(unit=4096)
OLD = Random(1).randbytes(30 * BLOCK_SIZE)
NEW = OLD[5 * BLOCK_SIZE :] + bytes(3 * BLOCK_SIZE) + image(range(1, 40))


def quiet(_done: int, _total: int) -> None:
    """Progress nobody looks at."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `old`, `new` and the COW between them, `cow`."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    create_cow(tmp_path / "old", tmp_path / "new", tmp_path / "cow", CreateOptions(), quiet)
    return tmp_path


def test_create_and_extract(folder: Path) -> None:
    """From two images to a COW to the new image; COW-16, COW-152: what it says of itself by default."""
    report = extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == NEW
    assert report.image_bytes == len(NEW)
    info = cow_info(folder / "cow")[0]
    assert info.op_slots == len(NEW) // BLOCK_SIZE
    assert (info.version, info.compression, info.unit_bytes, info.scratch_bytes) == (3, "zstd", 64 << 10, 2 << 20)
    assert info.copy_ops + info.zero_ops + info.replace_ops == info.ops
    assert info.highest_target_block == len(NEW) // BLOCK_SIZE - 1


def test_report_counts_every_block(folder: Path) -> None:
    """What became of the target's blocks adds up, and the COW's size is the file's (COW-132)."""
    report = create_cow(folder / "old", folder / "new", folder / "again", CreateOptions(), quiet)
    counted = report.unchanged_blocks + report.zero_blocks + report.copy_blocks + report.replace_blocks
    counted += report.xor_blocks
    assert counted * BLOCK_SIZE == report.target_bytes == len(NEW)
    assert report.cow_bytes == (folder / "again").stat().st_size
    for suffix in ("", ".digests"):
        assert (folder / f"again{suffix}").read_bytes() == (folder / f"cow{suffix}").read_bytes()


def test_an_image_and_itself(folder: Path) -> None:
    """The same path twice is no deadlock: the result has no ops."""
    report = create_cow(folder / "old", folder / "old", folder / "none", SMALL, quiet)
    assert report.ops == 0
    assert report.unchanged_blocks == 30


def test_a_file_that_does_not_merge_gets_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COW-154: what was written is read again, and with copies in a wrong order there is no file."""

    def ascending(order: CopyOrder, _weigh: object) -> Iterator[OrderedRun]:
        for target in np.flatnonzero(order._reads_array != NO_SOURCE).tolist():
            yield OrderedRun(target, 1, 1)

    (folder / "up").write_bytes(OLD[: 3 * BLOCK_SIZE] + OLD[:-BLOCK_SIZE])
    monkeypatch.setattr(CopyOrder, "emit", ascending)
    with pytest.raises(CowError, match="COW-75"):
        create_cow(folder / "old", folder / "up", folder / "out", SMALL, quiet)
    assert sorted(os.listdir(folder)) == ["cow", "cow.digests", "new", "old", "up"]


def test_the_digests_vouch_for_this_cow(folder: Path) -> None:
    """COW-216: the table beside the COW names its ops, is final, and has the digest of every block of the target."""
    with locked_store(folder / "cow") as store:
        table = load_digests(folder / "cow", CowFile.parse(store))
    assert table is not None
    assert (table.is_final, table.target_bytes) == (True, len(NEW))
    blocks = (NEW[at : at + BLOCK_SIZE] for at in range(0, len(NEW), BLOCK_SIZE))
    assert table.dense(len(NEW) // BLOCK_SIZE).tolist() == [block_digest(block) for block in blocks]


@pytest.mark.parametrize("stop", ["remove", "COW", "table"])
def test_a_stop_between_the_names_leaves_no_table_of_another_cow(
    folder: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COW-216: after each step of the publication the COW that lies there can be read, with its own table or none."""
    (folder / "third").write_bytes(image(range(50, 70)))
    steps = {"remove": 0, "COW": 1, "table": 2}
    calls: list[str] = []

    def count(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: str) -> None:
            if arguments[0].startswith(str(folder / "cow")):
                if len(calls) == steps[stop]:
                    raise KeyboardInterrupt
                calls.append(name)
            real(*arguments)

        return call

    with monkeypatch.context() as patched:
        patched.setattr("snapd.block.newfile.os.unlink", count("unlink", os.unlink))
        patched.setattr("snapd.block.newfile.os.rename", count("rename", os.rename))
        with pytest.raises(KeyboardInterrupt):
            create_cow(folder / "old", folder / "third", folder / "cow", SMALL, quiet)
    assert calls == ["unlink", "rename", "rename"][: steps[stop]]
    with locked_store(folder / "cow") as store:
        table = load_digests(folder / "cow", CowFile.parse(store))
    assert (table is None) == (stop != "remove")
    extract_image(folder / "cow", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes().startswith(image(range(50, 70)) if stop == "table" else NEW)
    create_cow(folder / "old", folder / "third", folder / "cow", SMALL, quiet)
    assert verify_cow(folder / "cow", folder / "old", quiet).ok


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("compress", ["zstd", "lz4", "gz", "brotli,3", "none"])
@pytest.mark.parametrize("xor", list(XorMode))
def test_an_estimate_is_the_size_of_the_file(folder: Path, version: int, compress: str, xor: XorMode) -> None:
    """COW-130 to COW-132: nothing is written, and every figure is what the creation then reports."""
    (folder / "new").write_bytes(b"12345" + OLD + NEW[:-5])
    options = CreateOptions(compression=CompressOption.parse(compress), version=version, xor=xor)
    before = sorted(os.listdir(folder))
    estimate = asdict(estimate_cow(folder / "old", folder / "new", options, quiet))
    assert sorted(os.listdir(folder)) == before
    report = asdict(create_cow(folder / "old", folder / "new", folder / "out", options, quiet))
    assert estimate.pop("op_slots") == (report["target_bytes"] // BLOCK_SIZE if version == 3 else None)
    assert estimate.pop("digests_bytes") == (folder / "out.digests").stat().st_size
    assert report["cow_bytes"] == (folder / "out").stat().st_size
    del estimate["seconds"], report["seconds"]
    assert estimate == report


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"version": 4}, "COW-3"),
        ({"compression": CompressOption.parse("gz,10")}, "levels -1 to 9"),
        ({"compression": CompressOption.parse("zstd,23")}, "zstd has the levels"),
        ({"unit": 5000}, "COW-112"),
        ({"unit": 512 << 10}, "COW-112"),
        ({"version": 2, "unit": 8192}, "COW-223"),
        ({"jobs": 0}, "0 jobs"),
        ({"jobs": 65}, "65 jobs"),
    ],
)
def test_options_that_cannot_be(arguments: dict[str, Any], match: str) -> None:
    """EINVAL, before there is any file."""
    with pytest.raises(SnapdError, match=match) as caught:
        CreateOptions(**arguments)
    assert caught.value.errno == errno.EINVAL


def test_units_by_version() -> None:
    """COW-223: 64 KiB unless told otherwise, in version 2 a block."""
    assert [CreateOptions(version=version).unit for version in (2, 3)] == [4096, 64 << 10]


@pytest.mark.parametrize("which", ["old", "new"])
def test_create_refuses_what_is_in_use(folder: Path, which: str) -> None:
    """EBUSY for a locked image, and the COW that was there stays."""
    before = (folder / "cow").read_bytes()
    with (folder / which).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SnapdError) as caught:
            create_cow(folder / "old", folder / "new", folder / "cow", SMALL, quiet)
    assert caught.value.errno == errno.EBUSY
    assert (folder / "cow").read_bytes() == before


@pytest.mark.parametrize("out", ["old", "new"])
def test_create_never_writes_over_an_image(folder: Path, out: str) -> None:
    """EINVAL when the output is one of the images."""
    with pytest.raises(SnapdError) as caught:
        create_cow(folder / "old", folder / "new", folder / out, SMALL, quiet)
    assert caught.value.errno == errno.EINVAL
    assert ((folder / "old").read_bytes(), (folder / "new").read_bytes()) == (OLD, NEW)


def test_create_checks_the_sizes_before_it_writes(folder: Path) -> None:
    """COW-149: an odd image is an error that leaves no file."""
    (folder / "odd").write_bytes(b"x" * 5000)
    with pytest.raises(SnapdError, match="5000 bytes"):
        create_cow(folder / "old", folder / "odd", folder / "out", SMALL, quiet)
    assert sorted(os.listdir(folder)) == ["cow", "cow.digests", "new", "odd", "old"]


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
    """COW-213: `size` wins where the file does not contradict it, then the digests table, then the base."""
    larger = len(OLD) + 2 * BLOCK_SIZE
    (folder / "short").write_bytes(OLD[: 20 * BLOCK_SIZE])
    create_cow(folder / "old", folder / "short", folder / "c", SMALL, quiet)
    extract_image(folder / "c", folder / "old", folder / "out", 20 * BLOCK_SIZE, quiet)
    assert (folder / "out").read_bytes() == OLD[: 20 * BLOCK_SIZE]
    extract_image(folder / "c", folder / "old", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == OLD[: 20 * BLOCK_SIZE]
    (folder / "c.digests").unlink()
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
    ops = cow_info(folder / "cow")[0].ops
    with (folder / "cow").open("r+b") as file:
        file.seek(PROGRESS_OFFSET)
        file.write(PROGRESS.pack(ops))
    extract_image(folder / "cow", folder / "new", folder / "out", None, quiet)
    assert (folder / "out").read_bytes() == NEW
    assert cow_info(folder / "cow")[0].merged_ops == ops


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
    payload = cow_info(tmp_path / "cow")[0].payload_bytes
    raw[-payload:] = bytes(payload)
    (tmp_path / "cow").write_bytes(raw)
    report = verify_cow(tmp_path / "cow", None, quiet, payloads=True)
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

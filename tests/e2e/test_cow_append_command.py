"""`snapctl cow append` as a real process: what it keeps, adds and refuses, and what a killed one leaves."""

import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offline import BLOCK, Call, blocks, done, failed, write_cow

from snapd.cow.digests import SUFFIX

OLD = blocks(60, 1)
# Blocks 4 to 7 moved, 8 and 9 zero, 10 to 29 new, 40 and 41 changed in a byte each; 70 blocks in all.
NEW = bytearray(OLD + blocks(8, 3) + bytes(2 * BLOCK))
NEW[4 * BLOCK : 8 * BLOCK] = OLD[30 * BLOCK : 34 * BLOCK]
NEW[8 * BLOCK : 10 * BLOCK] = bytes(2 * BLOCK)
NEW[10 * BLOCK : 30 * BLOCK] = blocks(20, 2)
NEW[40 * BLOCK + 5] ^= 1
NEW[41 * BLOCK + 5] ^= 1
# What another target had in blocks 50 and 51 lies behind the label.
OTHER = bytearray(NEW)
OTHER[50 * BLOCK : 52 * BLOCK] = blocks(2, 4)
CALLS: tuple[Call, ...] = (
    ("copy", 4, 4, 30),
    ("xor", 40, 2, 40 * BLOCK),
    ("label", 7, 0, 0),
    ("raw", 50, 2, 0),
    ("raw", 60, 10, 0),
)


@pytest.fixture(params=[2, 3])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The images, and `c` of another target, with digests; up to label 7 it fits to `new` as well."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    write_cow(tmp_path / "c", OLD, bytes(OTHER), *CALLS, version=request.param, digests=True)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images(folder: Path) -> tuple[str | Path, ...]:
    """The options that name them."""
    return "--source", folder / "old", "--target", folder / "new"


def append(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """The report of an append that succeeds."""
    report: dict[str, Any] = json.loads(done("append", folder / "c", *images(folder), *arguments, "-o", "json"))
    return report


def check(folder: Path) -> dict[str, Any]:
    """The COW over the old image is the new one, in every respect; returns the report of `verify`."""
    report: dict[str, Any] = json.loads(
        done("verify", folder / "c", "--base", folder / "old", "--payloads", "-o", "json")
    )
    done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o")
    assert (folder / "o").read_bytes() == NEW
    return report


def test_behind_a_label(folder: Path) -> None:
    """COW-87, COW-88, COW-216: what lay behind is gone; the digests go on, to the end."""
    report = append(folder, "--label", "7")
    assert (report["kept_ops"], report["has_digests"]) == (6, True)
    assert (report["zero_blocks"], report["replace_blocks"]) == (2 + 2, 20 + 8)
    info = json.loads(done("info", folder / "c", "-o", "json"))
    assert (info["ops"], info["copy_ops"], info["xor_ops"], info["digests"]) == (report["ops"], 4, 2, "final")
    assert info["target_bytes"] == len(NEW)
    assert info["ordered_merge"] == "accepted"
    assert check(folder)["compared_bytes"] == len(NEW)
    done("merge", folder / "c", "--base", folder / "old")
    assert (folder / "old").read_bytes() == NEW


def test_behind_everything(folder: Path) -> None:
    """Without a label a complete file is kept whole; called again there is nothing to add."""
    wanted = bytearray(OTHER)
    wanted[0:BLOCK] = blocks(1, 9)
    (folder / "new").write_bytes(wanted)
    report = append(folder)
    # The other target's blocks 8 to 29 had no op: its COW was never one of them.
    assert (report["zero_blocks"], report["replace_blocks"]) == (2, 21)
    done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o")
    assert (folder / "o").read_bytes() == wanted
    again = append(folder)
    assert (again["kept_ops"], again["zero_blocks"], again["replace_blocks"]) == (report["ops"], 0, 0)
    done("verify", folder / "c", "--base", folder / "old")


def test_without_a_table_none_is_made(folder: Path) -> None:
    """COW-216: there is nothing to go on with."""
    (folder / f"c{SUFFIX}").unlink()
    assert append(folder, "--label", "7")["has_digests"] is False
    assert not (folder / f"c{SUFFIX}").exists()
    check(folder)


def test_a_kept_op_that_is_wrong_is_named(folder: Path) -> None:
    """EINVAL before anything is written: with the label's ops everything fits, with all of them block 50 does not."""
    before = content(folder)
    message = failed("append", folder / "c", *images(folder))
    assert "block 50: op 6 (replace) does not make what the target has there" in message
    assert content(folder) == before


def test_too_few_op_slots(tmp_path: Path) -> None:
    """ENOSPC, COW-127: counted before anything is written; as many as are needed are enough."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    # Two and two zero ops; twenty blocks in units of four and eight in two.
    needed = 6 + 4 + 5 + 2
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS[:3], slots=needed - 1)
    before = content(tmp_path)
    message = failed("append", tmp_path / "c", *images(tmp_path))
    assert f"{needed - 1} op slots, 6 ops are kept and 11 would be added" in message
    assert content(tmp_path) == before
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS[:3], slots=needed)
    assert append(tmp_path)["ops"] == needed
    check(tmp_path)


def test_the_compression_is_the_files(folder: Path) -> None:
    """COW-89: another algorithm is refused with nothing changed; another level is not another algorithm."""
    before = content(folder)
    assert "(COW-89)" in failed("append", folder / "c", *images(folder), "--label", "7", "--compress", "zstd")
    assert content(folder) == before
    append(folder, "--label", "7", "--compress", "lz4,5")
    check(folder)


def test_a_begun_merge_is_left_alone(folder: Path) -> None:
    """COW-148: by the counter in the header, and by what lies beside the COW."""
    with (folder / "c").open("r+b") as file:
        file.seek(26)
        file.write(struct.pack("<Q", 1))
    before = content(folder)
    assert "(COW-148)" in failed("append", folder / "c", *images(folder), "--label", "7")
    (folder / "c.undo").write_text('{"snapshot": "x", "undo": "y"}')
    assert "a service has begun to merge it" in failed("append", folder / "c", *images(folder), "--label", "7")
    (folder / "c.undo").unlink()
    assert content(folder) == before


def test_a_damaged_table_is_not_gone_on_with(folder: Path) -> None:
    """COW-216: nothing is changed."""
    (folder / f"c{SUFFIX}").write_bytes(b"no table")
    before = content(folder)
    assert "(COW-216)" in failed("append", folder / "c", *images(folder), "--label", "7")
    assert content(folder) == before


def test_images_that_do_not_fit(folder: Path) -> None:
    """EINVAL or V30, with nothing changed: a part of a block, no block, less than the ops write or read."""
    before = content(folder)
    for old, new, expected in (
        (OLD[:-1], NEW, "source of 245759 bytes: not a multiple of the block size 4096"),
        (OLD, b"", "target of 0 bytes"),
        (OLD, NEW[: 41 * BLOCK], "the target has 41 blocks (V30)"),
        (OLD[: 33 * BLOCK], NEW, "the base has 33 blocks (V30)"),
    ):
        (folder / "old").write_bytes(old)
        (folder / "new").write_bytes(new)
        assert expected in failed("append", folder / "c", *images(folder), "--label", "7")
        assert (folder / "c").read_bytes() == before["c"]
        assert (folder / f"c{SUFFIX}").read_bytes() == before[f"c{SUFFIX}"]


def test_killed_at_any_moment(folder: Path) -> None:
    """COW-94, COW-95: what is left can be read up to the label, and the same append finishes it."""
    more = blocks(1500, 5)
    (folder / "new").write_bytes(NEW + more)
    write_cow(folder / "c", OLD, bytes(OTHER), *CALLS, version=version_of(folder), slots=4000, digests=True)
    shutil.copy(folder / "c", folder / "c0")
    shutil.copy(folder / f"c{SUFFIX}", folder / f"c0{SUFFIX}")
    command = ["append", folder / "c", *images(folder), "--label", "7", "--jobs", "1"]
    for grown in (0, 300_000):
        shutil.copy(folder / "c0", folder / "c")
        shutil.copy(folder / f"c0{SUFFIX}", folder / f"c{SUFFIX}")
        before = (folder / "c").stat().st_size
        cut = (folder / f"c{SUFFIX}").stat().st_size
        with subprocess.Popen([sys.executable, "-m", "snapd.ctl", "cow", *map(str, command)]) as process:
            while process.poll() is None:
                if (folder / f"c{SUFFIX}").stat().st_size < cut and (folder / "c").stat().st_size >= before + grown:
                    break
            process.send_signal(signal.SIGKILL)
        facts = json.loads(done("info", folder / "c", "--label", "7", "-o", "json"))
        assert (facts["ops"], facts["digests"]) == (6, "label")
        done(*command)
        done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o")
        assert (folder / "o").read_bytes() == NEW + more


def version_of(folder: Path) -> int:
    """The version of the COW in the folder."""
    version: int = json.loads(done("info", folder / "c", "-o", "json"))["version"]
    return version

"""`snapctl cow verify` as a real process: what it finds, what it says it did not look at, and its exit code."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from offline import BLOCK, Call, blocks, done, failed, snapctl, write_cow

from snapd.cow.digests import SUFFIX
from snapd.cow.format import OpType
from snapd.cow.op import Op

OLD = blocks(600, 1)
# Blocks 4 to 7 moved, 8 and 9 zero, 10 to 17 new, 20 and 21 changed in a byte each; 700 blocks in all.
NEW = bytearray(OLD + blocks(100, 3))
NEW[4 * BLOCK : 8 * BLOCK] = OLD[30 * BLOCK : 34 * BLOCK]
NEW[8 * BLOCK : 10 * BLOCK] = bytes(2 * BLOCK)
NEW[10 * BLOCK : 18 * BLOCK] = blocks(8, 2)
NEW[20 * BLOCK + 5] ^= 1
NEW[21 * BLOCK + 5] ^= 1
CALLS: tuple[Call, ...] = (
    ("copy", 4, 4, 30),
    ("xor", 20, 2, 20 * BLOCK),
    ("label", 7, 0, 0),
    ("zero", 8, 2, 0),
    ("raw", 10, 8, 0),
    ("raw", 600, 100, 0),
)
PAYLOADS = 78 + 64 + 16 * 100


@pytest.fixture(params=[2, 3])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base, and `c` with a digests table, in both versions."""
    (tmp_path / "old").write_bytes(OLD)
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS, version=request.param, digests=True)
    return tmp_path


def found(folder: Path, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """The report of a call that ends with this exit code."""
    result = snapctl("verify", folder / "c", *arguments, "-o", "json")
    assert (result.returncode, result.stderr) == (code, ""), result
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["ok"] is (code == 0)
    return report


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_all_is_well(folder: Path) -> None:
    """COW-216: with a base every block of the target is compared, and nothing is left out."""
    report = found(folder, "--base", folder / "old")
    assert report["compared_bytes"] == len(NEW)
    assert report["not_checked"] == report["damage"] == report["tolerated"] == []
    assert report["ordered_merge"] == report["reversible_merge"] == "accepted"


@pytest.mark.parametrize("block", [0, 30, 20, 599])
def test_a_flipped_bit_of_the_base_is_a_named_block(folder: Path, block: int) -> None:
    """COW-216: unchanged blocks, the source of a copy and the source of an XOR."""
    flip(folder / "old", block * BLOCK + 123)
    report = found(folder, "--base", folder / "old", code=1)
    unchanged = f"block {block}: unchanged, does not match its digest (COW-216)"
    expected = {
        0: [unchanged],
        20: ["block 20: xor, does not match its digest (COW-216)"],
        30: ["block 4: copy, does not match its digest (COW-216)", unchanged],
        599: [unchanged],
    }[block]
    assert (report["damaged_blocks"], report["damage"]) == (len(expected), expected)
    assert report["ordered_merge"] == report["reversible_merge"] == "refused: content is damaged"


def test_a_flipped_bit_of_a_payload_is_found_without_a_base(folder: Path) -> None:
    """COW-216: in the last payload, which belongs to the blocks at the end of the image."""
    info = json.loads(done("info", folder / "c", "-o", "json"))
    end = (folder / "c").stat().st_size - info["footer_bytes"]
    # Clusters leave room for op records behind their payloads only where they are ended early.
    flip(folder / "c", end - 40)
    report = found(folder, code=1)
    assert report["compared_bytes"] == (2 + 8 + 100) * BLOCK
    assert report["damaged_blocks"] >= 1
    assert "699" in report["damage"][-1]
    assert "copied, XOR and unchanged blocks: no base was given" in report["not_checked"]


def test_equal_findings_side_by_side_are_one_line(folder: Path) -> None:
    """Ten lines at most, and the number of all blocks."""
    with (folder / "old").open("r+b") as file:
        file.seek(100 * BLOCK)
        file.write(bytes(300 * BLOCK))
    for block in range(500, 550, 2):
        flip(folder / "old", block * BLOCK)
    report = found(folder, "--base", folder / "old", code=1)
    assert report["damaged_blocks"] == 325
    assert len(report["damage"]) == 10
    assert report["damage"][0] == "blocks 100 to 399: unchanged, does not match its digest (COW-216)"
    assert report["damage"][1] == "block 500: unchanged, does not match its digest (COW-216)"


def test_a_table_of_other_ops_is_an_error(folder: Path) -> None:
    """COW-216: the table is compared with the ops first; so is a damaged one; to ignore it must be said."""
    write_cow(folder / "d", OLD, bytes(NEW), ("zero", 8, 2, 0), ("raw", 600, 100, 0))
    (folder / f"c{SUFFIX}").rename(folder / f"d{SUFFIX}")
    assert "made for other ops" in failed("verify", folder / "d", "--base", folder / "old")
    report = json.loads(done("verify", folder / "d", "--base", folder / "old", "--ignore-digests", "-o", "json"))
    assert report["not_checked"] == ["content: the digests were to be ignored", "payloads: that was not asked for"]
    flip(folder / f"d{SUFFIX}", 3)
    assert "(COW-216)" in failed("verify", folder / "d")


def test_without_a_table_only_payloads_can_be_decoded(tmp_path: Path) -> None:
    """COW-103, COW-159: asked for, every payload; one that does not decode is named by its op."""
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS)
    report = found(tmp_path)
    assert report["not_checked"] == [
        "sizes: no base was given",
        "content: there is no digests table",
        "payloads: that was not asked for",
    ]
    assert (report["compared_bytes"], report["decoded_bytes"]) == (0, 0)
    with (tmp_path / "c").open("r+b") as file:
        file.seek(PAYLOADS)
        file.write(b"\xff" * 10)
    assert found(tmp_path)["damaged_ops"] == 0
    report = found(tmp_path, "--payloads", code=1)
    assert (report["damaged_ops"], report["decoded_bytes"]) == (1, report["payload_bytes"])
    assert report["damage"][0].startswith("op 4: ")


def test_sizes_are_checked_against_the_base(folder: Path) -> None:
    """V30, UNDO-23: a base that copies leave is an error, not a finding."""
    (folder / "small").write_bytes(OLD[: 32 * BLOCK])
    message = failed("verify", folder / "c", "--base", folder / "small", "--ignore-digests")
    assert "the base has 32 blocks" in message
    assert "(V30)" in message


def test_up_to_a_label(folder: Path) -> None:
    """COW-214, COW-216: what is known there is compared: the blocks that have an op."""
    report = found(folder, "--label", "7", "--base", folder / "old")
    assert (report["ops"], report["compared_bytes"]) == (6, 6 * BLOCK)
    assert report["not_checked"] == ["unchanged blocks: their digests are known at the end of a COW only"]
    assert report["ordered_merge"] == report["reversible_merge"] == "not known: only the ops before the label were read"


def test_disorder_is_a_finding_for_ordered_merges_only(tmp_path: Path) -> None:
    """COW-210: exit code 1, and a reversible merge takes the file nevertheless."""
    write_cow(tmp_path / "c", OLD, bytes(NEW), ("raw", 10, 4, 0), ("copy", 4, 4, 30))
    report = found(tmp_path, code=1)
    assert report["ordered_merge"].startswith("refused: op 1: a copy or XOR behind an op that reads nothing")
    assert (report["reversible_merge"], report["damage"]) == ("accepted", [])


def test_a_tolerated_fault_is_a_finding(tmp_path: Path) -> None:
    """COW-208, COW-209: without the option an error; with it told, and refused by every merge."""
    write_cow(tmp_path / "c", OLD, bytes(NEW), ("zero", 8, 2, 0))
    with (tmp_path / "c").open("r+b") as file:
        file.seek(78 + 64 + 16)
        file.write(Op(OpType.ZERO, 8, 1, 0, 0).pack())
    message = failed("verify", tmp_path / "c").removeprefix("snapctl: ").strip()
    report = found(tmp_path, "--lenient", code=1)
    assert (report["tolerated_faults"], report["tolerated"]) == (1, [message])
    assert report["ordered_merge"] == report["reversible_merge"] == "refused: a merge tolerates no fault (COW-208)"


def test_a_begun_merge(folder: Path) -> None:
    """UNDO-28: the file can be looked at by itself; over its base it does not describe an image any more."""
    with (folder / "c").open("r+b") as file:
        file.seek(26)
        file.write(struct.pack("<Q", 3))
    report = found(folder, code=1)
    assert report["reversible_merge"] == "refused: an ordered merge has begun (UNDO-28)"
    assert "(UNDO-28)" in failed("verify", folder / "c", "--base", folder / "old")


def test_a_base_that_is_merged_already(folder: Path) -> None:
    """COW-216: its blocks are those of the target; one that is neither old nor new is an error."""
    done("merge", folder / "c", "--base", folder / "old")
    assert (folder / "old").read_bytes() == NEW
    report = found(folder, "--base", folder / "old")
    assert report["compared_bytes"] == len(NEW)
    assert report["not_checked"] == ["sizes: the base holds the new image already"]
    flip(folder / "old", 500 * BLOCK)
    report = found(folder, "--base", folder / "old", code=1)
    assert report["damage"] == ["block 500: unchanged, does not match its digest (COW-216)"]
    flip(folder / "old", 4 * BLOCK)
    assert "neither the old nor the new image" in failed("verify", folder / "c", "--base", folder / "old")

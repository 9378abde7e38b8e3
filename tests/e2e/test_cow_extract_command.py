"""`snapctl cow extract` as a real process: labels, sizes, tolerated faults, and digests that do not match."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from offline import BLOCK, Call, blocks, done, failed, write_cow

from snapd.cow.digests import SUFFIX
from snapd.cow.format import OpType
from snapd.cow.op import Op

OLD = blocks(600, 1)
# Blocks 4 to 7 moved, 8 and 9 zero, 10 to 17 new, 20 and 21 changed in a byte each; the last 100 are gone.
NEW = bytearray(OLD[: 500 * BLOCK])
NEW[4 * BLOCK : 8 * BLOCK] = OLD[530 * BLOCK : 534 * BLOCK]
NEW[8 * BLOCK : 10 * BLOCK] = bytes(2 * BLOCK)
NEW[10 * BLOCK : 18 * BLOCK] = blocks(8, 2)
NEW[20 * BLOCK + 5] ^= 1
NEW[21 * BLOCK + 5] ^= 1
CALLS: tuple[Call, ...] = (
    ("copy", 4, 4, 530),
    ("label", 7, 0, 0),
    ("xor", 20, 2, 20 * BLOCK),
    ("zero", 8, 2, 0),
    ("raw", 10, 8, 0),
)


@pytest.fixture(params=[2, 3])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base, and `c` with a digests table, in both versions."""
    (tmp_path / "old").write_bytes(OLD)
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS, version=request.param, digests=True)
    return tmp_path


def extract(folder: Path, *arguments: str | Path) -> tuple[bytes, dict[str, Any]]:
    """The image and the report."""
    report: dict[str, Any] = json.loads(
        done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o", *arguments, "-o", "json")
    )
    return (folder / "o").read_bytes(), report


def refused(folder: Path, *arguments: str | Path) -> str:
    """The error of a call that leaves no file."""
    (folder / "o").unlink(missing_ok=True)
    before = sorted(os.listdir(folder))
    message = failed("extract", folder / "c", "--base", folder / "old", "--out", folder / "o", *arguments)
    assert sorted(os.listdir(folder)) == before
    return message


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_the_size_is_that_of_the_digests_table(folder: Path) -> None:
    """COW-213: else the base's, which is longer here; `--size` wins over both."""
    image, report = extract(folder)
    assert image == NEW
    assert (report["image_bytes"], report["digests"]) == (len(NEW), "checked")
    assert extract(folder, "--ignore-digests")[0] == NEW + OLD[len(NEW) :]
    assert extract(folder, "--size", "2MiB", "--ignore-digests")[0] == NEW + OLD[len(NEW) : 2 << 20]
    (folder / f"c{SUFFIX}").unlink()
    image, report = extract(folder)
    assert image == NEW + OLD[len(NEW) :]
    assert report["digests"] == "none"


@pytest.mark.parametrize(("block", "named"), [(0, 0), (499, 499), (531, 5), (21, 21)])
def test_a_flipped_bit_of_the_base_is_an_error(folder: Path, block: int, named: int) -> None:
    """COW-216: unchanged, copied or XOR; the block is named, and there is no image."""
    flip(folder / "old", block * BLOCK + 4000)
    assert f"block {named} of the image does not match its digest (COW-216)" in refused(folder)
    image, report = extract(folder, "--ignore-digests")
    assert (len(image), report["digests"]) == (len(OLD), "ignored")


def test_up_to_a_label(folder: Path) -> None:
    """COW-214: the ops before it, over the base as it is."""
    image, _ = extract(folder, "--label", "7")
    assert image == OLD[: 4 * BLOCK] + NEW[4 * BLOCK : 8 * BLOCK] + OLD[8 * BLOCK :]
    assert "(V15)" in refused(folder, "--label", "8")


def test_the_last_op_wins_where_that_is_tolerated(tmp_path: Path) -> None:
    """COW-208, COW-209: else it is an error; what was tolerated is told."""
    (tmp_path / "old").write_bytes(OLD)
    write_cow(tmp_path / "c", OLD, bytes(NEW), ("raw", 10, 4, 0), ("zero", 8, 1, 0))
    with (tmp_path / "c").open("r+b") as file:
        file.seek(78 + 64 + 16)
        file.write(Op(OpType.ZERO, 12, 1, 0, 0).pack())
    message = refused(tmp_path).removeprefix("snapctl: ").strip()
    assert "(V27)" in message
    image, report = extract(tmp_path, "--lenient")
    assert image[10 * BLOCK : 14 * BLOCK] == NEW[10 * BLOCK : 12 * BLOCK] + bytes(BLOCK) + NEW[13 * BLOCK : 14 * BLOCK]
    assert (report["tolerated_faults"], report["tolerated"]) == (1, [message])


def test_the_output_replaces_no_input(folder: Path) -> None:
    """Neither the COW, nor its table, nor the base."""
    for name in ("c", f"c{SUFFIX}", "old"):
        before = (folder / name).read_bytes()
        message = failed("extract", folder / "c", "--base", folder / "old", "--out", folder / name)
        assert "would replace the input" in message
        assert (folder / name).read_bytes() == before

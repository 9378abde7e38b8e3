"""`snapctl cow info` as a real process: files of every version, whole, cut, open, begun and faulty."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offline import BLOCK, Call, blocks, done, failed, snapctl, write_cow

from snapd.cow.digests import SUFFIX
from snapd.cow.format import OpType
from snapd.cow.header import Header
from snapd.cow.op import Op

OLD = blocks(40, 1)
# Blocks 0 to 3 unchanged, 4 to 7 moved, 8 and 9 zero, 10 to 19 new, 20 and 21 like the old ones but for a byte.
NEW = OLD[: 4 * BLOCK] + OLD[30 * BLOCK : 34 * BLOCK] + bytes(2 * BLOCK) + blocks(10, 2)
NEW += bytes(byte ^ (i % BLOCK == 7) for i, byte in enumerate(OLD[20 * BLOCK : 22 * BLOCK])) + OLD[22 * BLOCK :]
CALLS: tuple[Call, ...] = (
    ("copy", 4, 4, 30),
    ("xor", 20, 2, 20 * BLOCK),
    ("label", 7, 0, 0),
    ("zero", 8, 2, 0),
    ("label", 9, 0, 0),
    ("raw", 10, 10, 0),
)


def info(*arguments: str | Path) -> dict[str, Any]:
    """The facts as JSON."""
    facts: dict[str, Any] = json.loads(done("info", *arguments, "-o", "json"))
    return facts


def put(path: Path, at: int, raw: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(raw)


def test_a_version_3_file(tmp_path: Path) -> None:
    """COW-12, COW-158, COW-214: regions, slots and labels; whether more was to come is not known."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS)
    facts = info(tmp_path / "c")
    assert {key: facts[key] for key in ("version", "header_bytes", "footer_bytes", "end", "compression")} == {
        "version": 3,
        "header_bytes": 78,
        "footer_bytes": 0,
        "end": "open",
        "compression": "lz4",
    }
    assert (facts["ops"], facts["op_slots"], facts["unit_bytes"], facts["scratch_bytes"]) == (11, 100, 4 * BLOCK, 0)
    assert [facts[f"{kind}_ops"] for kind in ("copy", "xor", "zero", "replace")] == [4, 2, 2, 3]
    assert facts["labels"] == [{"label": 7, "ops": 6}, {"label": 9, "ops": 8}]
    assert (facts["changed_bytes"], facts["highest_target_block"]) == (18 * BLOCK, 21)
    assert facts["payload_bytes"] + 78 + 64 + 100 * 16 == facts["file_bytes"]
    assert (facts["ordered_merge"], facts["merge"], facts["digests"]) == ("accepted", "not begun", "none")
    assert facts["label_records"] is facts["cluster_records"] is facts["cluster_ops"] is None
    table = done("info", tmp_path / "c")
    assert "open: a version 3 file does not say whether more was to come (COW-214)" in table
    assert "7, after 6 ops" in table


def test_a_version_2_file(tmp_path: Path) -> None:
    """COW-20, COW-32, COW-158: the footer, and the records that map no block."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS, version=2)
    facts = info(tmp_path / "c")
    assert (facts["version"], facts["end"], facts["footer_bytes"], facts["header_bytes"]) == (2, "finished", 84, 38)
    assert (facts["ops"], facts["replace_ops"], facts["cluster_ops"], facts["op_slots"]) == (18, 10, 8, None)
    # Seven records and a cluster op in each of the first two clusters, then what is left, ended early.
    assert (facts["label_records"], facts["cluster_records"], facts["sequence_records"]) == (2, 3, 0)


@pytest.mark.parametrize("version", [2, 3])
def test_up_to_a_label(tmp_path: Path, version: int) -> None:
    """COW-86, COW-214: only the ops before it; a label that is not there is named with those that are."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS, version=version)
    facts = info(tmp_path / "c", "--label", "7")
    assert (facts["end"], facts["ops"], facts["copy_ops"], facts["zero_ops"]) == ("label", 6, 4, 0)
    assert facts["ordered_merge"].startswith("not known")
    assert "cut at label 7" in done("info", tmp_path / "c", "--label", "7")
    message = failed("info", tmp_path / "c", "--label", "8")
    assert "no label 8: it has the labels 7, 9" in message
    assert "(V15)" in message


def test_an_unfinished_version_2_file_needs_a_label(tmp_path: Path) -> None:
    """COW-214, V12: and says which it has."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS[:5], version=2, finish=False)
    message = failed("info", tmp_path / "c")
    assert "it has the labels 7, 9" in message
    assert "(V12)" in message
    assert info(tmp_path / "c", "--label", "9")["ops"] == 8


def test_a_begun_merge_is_shown(tmp_path: Path) -> None:
    """COW-145, COW-217: by its counter, its state byte, and at its end."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS)
    for merged, state in ((3, "begun"), (11, "merged"), (0, "not begun")):
        put(tmp_path / "c", 26, struct.pack("<Q", merged))
        facts = info(tmp_path / "c")
        assert (facts["merged_ops"], facts["merge"]) == (merged, state)
    put(tmp_path / "c", 26, struct.pack("<Q", 12))
    assert "(V25)" in failed("info", tmp_path / "c")


def test_a_window_that_is_done_is_shown(tmp_path: Path) -> None:
    """COW-142: the state byte behind the header, which a file without scratch does not have (COW-215)."""
    (tmp_path / "c").write_bytes(Header(buffer_size=4096).pack() + b"\2" + bytes(4095 + 64))
    assert info(tmp_path / "c")["merge"] == "begun, a window is done (COW-142)"


def test_what_an_ordered_merge_refuses(tmp_path: Path) -> None:
    """COW-74, COW-210: a copy behind a replace op is a fact, not an error."""
    write_cow(tmp_path / "c", OLD, NEW, ("raw", 10, 4, 0), ("copy", 4, 4, 30))
    assert info(tmp_path / "c")["ordered_merge"].startswith("refused: op 1: ")
    # Version 2 takes copies first, whatever the stream.
    write_cow(tmp_path / "c", OLD, NEW, ("raw", 10, 4, 0), ("copy", 4, 4, 30), version=2)
    assert info(tmp_path / "c")["ordered_merge"] == "accepted"


def duplicate(path: Path) -> None:
    """Make the last op of a file of two zero ops write block 8 again."""
    write_cow(path, OLD, NEW, ("zero", 8, 2, 0))
    put(path, 78 + 64 + 16, Op(OpType.ZERO, 8, 1, 0, 0).pack())


def test_lenient_names_what_it_lets_pass(tmp_path: Path) -> None:
    """COW-208, COW-209: an error without the option; with it a fault that is told, and no merge."""
    duplicate(tmp_path / "c")
    message = failed("info", tmp_path / "c").removeprefix("snapctl: ").strip()
    assert "op 1: target block 8 is already written by op 0" in message
    facts = info(tmp_path / "c", "--lenient")
    assert (facts["tolerated_faults"], facts["tolerated"]) == (1, [message])
    assert facts["ordered_merge"] == "refused: a merge tolerates no fault (COW-208)"
    assert message in done("info", tmp_path / "c", "--lenient")


def test_the_digests_table_is_described(tmp_path: Path) -> None:
    """COW-216: whether there is one, whether it goes to the end, and whether it is of these ops."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS, digests=True)
    facts = info(tmp_path / "c")
    assert (facts["digests"], facts["target_bytes"]) == ("final", len(NEW))
    assert len(bytes.fromhex(facts["target_digest"])) == 16
    facts = info(tmp_path / "c", "--label", "7")
    assert (facts["digests"], facts["target_bytes"], facts["target_digest"]) == ("label", None, None)
    (tmp_path / f"c{SUFFIX}").write_bytes(b"no table")
    facts = info(tmp_path / "c")
    assert facts["digests"].startswith("refused: ")
    assert "(COW-216)" in facts["digests"]


def test_the_picture_comes_with_the_table(tmp_path: Path) -> None:
    """The image ends where its digests say, else with its last op; nothing is drawn for a file without ops."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS)
    assert picture(tmp_path / "c", columns=10) == ["....CCCCZZ", "RRRRRRRRRR", "XX"]
    write_cow(tmp_path / "c", OLD, NEW, *CALLS, digests=True)
    assert picture(tmp_path / "c", columns=20) == ["....CCCCZZRRRRRRRRRR", "XX.................."]
    write_cow(tmp_path / "c", OLD, NEW)
    assert "unchanged" not in done("info", tmp_path / "c")


def picture(cow: Path, columns: int) -> list[str]:
    """The rows of the picture on a terminal of that width."""
    command = [sys.executable, "-m", "snapd.ctl", "cow", "info", str(cow)]
    text = subprocess.run(
        command, env={**os.environ, "COLUMNS": str(columns)}, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    _, _, drawn = text.partition("\n\n")
    *rows, legend, scale = drawn.splitlines()
    assert legend == ". unchanged  Zz zero  Cc copy  Xx XOR  Rr replace"
    assert scale == "a character is 1 block (4 KiB)"
    return rows


def test_the_picture_as_a_file(tmp_path: Path) -> None:
    """`--map` writes a PNG, with either output, and never over the COW."""
    write_cow(tmp_path / "c", OLD, NEW, *CALLS)
    before = (tmp_path / "c").read_bytes()
    done("info", tmp_path / "c", "--map", tmp_path / "map.png", "-o", "json")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "would replace the input" in failed("info", tmp_path / "c", "--map", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before


def test_no_option_is_offered_where_it_must_not_be() -> None:
    """COW-208: neither a merge nor an append is ever lenient."""
    for verb in ("merge", "append"):
        assert "--lenient" not in snapctl(verb, "--help").stdout
    for verb in ("info", "verify", "extract"):
        assert "--lenient" in snapctl(verb, "--help").stdout

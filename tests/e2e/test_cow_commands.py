"""The offline verbs as real processes: exit codes, output, and what a killed one leaves."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from offline import BLOCK, done, failed, snapctl

OLD = Random(1).randbytes(200 * BLOCK)
NEW = OLD[30 * BLOCK :] + bytes(20 * BLOCK) + Random(2).randbytes(16) * 256 * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`old` and `new`, and the COW between them, `c`."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    done("create", "--source", tmp_path / "old", "--target", tmp_path / "new", "--out", tmp_path / "c")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "unit_bytes"),
    [
        (("--compress", "zstd", "--unit", "64 KiB"), 65536),
        (("--compress", "zstd,9", "--unit", "256KiB"), 262144),
        (("--compress", "lz4", "--unit", "4KiB"), 4096),
        (("--compress", "none", "--unit", "65536"), 65536),
        (("--compress", "gz,1", "--format", "v2"), 4096),
        (("--compress", "brotli,1", "--xor", "search", "--jobs", "1"), 65536),
    ],
)
def test_estimate_create_extract(folder: Path, options: tuple[str, ...], unit_bytes: int) -> None:
    """COW-130: every compression, unit and version is as large as was told before, and gives the target back."""
    images = ("--source", folder / "old", "--target", folder / "new")
    told = json.loads(done("estimate", *images, *options, "-o", "json"))
    report = json.loads(done("create", *images, "--out", folder / "c", *options, "-o", "json"))
    assert {**told, **report, "seconds": told["seconds"]} == told
    assert told["cow_bytes"] == (folder / "c").stat().st_size
    assert told["digests_bytes"] == (folder / "c.digests").stat().st_size
    info = json.loads(done("info", folder / "c", "-o", "json"))
    assert info["compression"] == options[1].partition(",")[0]
    assert (info["unit_bytes"], info["op_slots"], info["ops"]) == (unit_bytes, told["op_slots"], told["ops"])
    extracted = json.loads(done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o", "-o", "json"))
    assert extracted["image_bytes"] == len(NEW)
    assert (folder / "o").read_bytes() == NEW


def test_defaults_are_zstd_and_64_kib(folder: Path) -> None:
    """`info` as a table says so in words."""
    table, _, _ = done("info", folder / "c").partition("\n\n")
    lines = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert lines["compression"] == "zstd"
    assert lines["unit"] == "64 KiB"


def test_verify_says_what_is_wrong(folder: Path) -> None:
    """0 and a report when all is well; 1 and a report when a payload is damaged; 1 and a line for no COW file."""
    report = json.loads(done("verify", folder / "c", "--base", folder / "old", "-o", "json"))
    assert (report["ok"], report["compared_bytes"]) == (True, len(NEW))
    with (folder / "c").open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(bytes(20))
    result = snapctl("verify", folder / "c", "-o", "json")
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["damaged_blocks"] >= len(report["damage"]) > 0
    assert "not a COW file" in failed("verify", folder / "old")


def test_merge_makes_the_base_the_new_image(folder: Path) -> None:
    """In place, with a report; again, it says that there was nothing to do; then extract is the base."""
    report = json.loads(done("merge", folder / "c", "--base", folder / "old", "-o", "json"))
    assert report["already_merged"] is False
    assert (folder / "old").read_bytes()[: len(NEW)] == NEW
    assert json.loads(done("merge", folder / "c", "--base", folder / "old", "-o", "json"))["already_merged"] is True
    done("extract", folder / "c", "--base", folder / "old", "--out", folder / "o")
    assert (folder / "o").read_bytes() == NEW


def test_the_old_image_comes_out_of_an_interrupted_merge(tmp_path: Path) -> None:
    """Killed as soon as something is saved, a merge leaves an undo store from which `extract` gives the old image."""
    old, new, cow, out = (str(tmp_path / name) for name in ("old", "new", "c", "o"))
    before, after = Random(1).randbytes(48 << 20), Random(2).randbytes(48 << 20)
    Path(old).write_bytes(before)
    Path(new).write_bytes(after)
    done("create", "--source", old, "--target", new, "--out", cow, "--compress", "none")
    undo = f"{cow}.undo/undo.cow"
    with subprocess.Popen([sys.executable, "-m", "snapd.ctl", "cow", "merge", cow, "--base", old]) as merge:
        # Only the table's header is written before the first blocks are saved.
        while merge.poll() is None and not (
            os.path.exists(f"{undo}.digests") and os.stat(f"{undo}.digests").st_size > 64
        ):
            pass
        merge.send_signal(signal.SIGKILL)
    assert merge.returncode == -signal.SIGKILL
    done("extract", undo, "--base", old, "--out", out)
    assert Path(out).read_bytes() == before
    for option in ("--lenient", "--ignore-digests", "--label=1"):
        assert snapctl("extract", undo, "--base", old, "--out", out, option).returncode == 2
    assert "an offline merge of it has begun" in failed("extract", cow, "--base", old, "--out", out)
    done("merge", cow, "--base", old)
    assert Path(old).read_bytes() == after


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("create",),
        ("create", "--source", "a", "--target", "b"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--unit", "3KiB"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--unit", "64KB"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--compress", "gz,1,1"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--format", "v2", "--unit", "64KiB"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--format", "v1"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--jobs", "0"),
        ("estimate", "--source", "a", "--target", "b", "--out", "c"),
        ("estimate", "--source", "a", "--target", "b", "--xor", "maybe"),
        ("create", "--source", "a", "--target", "b", "--out", "c", "--compress", "zstd,x"),
        ("info",),
        ("info", "c", "-o", "yaml"),
        ("verify", "c", "--bace", "a"),
        ("extract", "c", "--base", "a"),
        ("extract", "c", "--base", "a", "--out", "b", "--size", "much"),
        ("extract", "c", "--base", "a", "--out", "b", "--label", "last"),
        ("append", "c", "--source", "a"),
        ("append", "c", "--source", "a", "--target", "b", "--compress", "zs"),
        ("append", "c", "--source", "a", "--target", "b", "--lenient"),
        ("append", "c", "--source", "a", "--target", "b", "--label", "-1"),
        ("merge", "c"),
        ("merge", "c", "--base", "a", "--lenient"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """What cannot be meant is an error of usage, before any file is touched."""
    command = [sys.executable, "-m", "snapd.ctl", "cow", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert result.returncode == 2
    assert "Usage:" in result.stdout + result.stderr
    assert os.listdir(tmp_path) == []


def test_files_in_use_or_missing_are_one_line(folder: Path) -> None:
    """EBUSY and ENOENT name the file; nothing is printed but that."""
    with (folder / "c").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for arguments in (("info", folder / "c"), ("verify", folder / "c")):
            assert f"{folder / 'c'}: in use" in failed(*arguments)
        assert "in use" in failed("extract", folder / "c", "--base", folder / "old", "--out", folder / "o")
        assert "in use" in failed("merge", folder / "c", "--base", folder / "old")
    assert "nowhere: No such file" in failed("info", folder / "nowhere")
    assert "nowhere: No such file" in failed(
        "create", "--source", folder / "nowhere", "--target", folder / "new", "--out", folder / "o"
    )
    assert not (folder / "o").exists()


@pytest.mark.parametrize("before", [None, b"the file that was there"])
def test_a_killed_creation_leaves_nothing_under_the_name(tmp_path: Path, before: bytes | None) -> None:
    """However a creation ends, its name shows the file before or the whole new one; the next call cleans up."""
    (tmp_path / "old").write_bytes(bytes(BLOCK))
    (tmp_path / "new").write_bytes(Random(1).randbytes(64 << 20))
    out = tmp_path / "c"
    if before is not None:
        out.write_bytes(before)
    arguments = ["create", "--source", f"{tmp_path}/old", "--target", f"{tmp_path}/new", "--out", f"{out}"]
    with subprocess.Popen([sys.executable, "-m", "snapd.ctl", "cow", *arguments]) as create:
        while create.poll() is None and not (tmp_path / "c.part").exists():
            pass
        create.send_signal(signal.SIGSTOP)
        finished = not (tmp_path / "c.part").exists()
        create.send_signal(signal.SIGKILL)
    if not finished:
        assert (out.read_bytes() if out.exists() else None) == before
        assert (tmp_path / "c.part").exists()
    done(*arguments)
    assert not (tmp_path / "c.part").exists()
    done("verify", out)


def test_ctrl_c_is_130_and_leaves_nothing(tmp_path: Path) -> None:
    """An interrupt ends the verb without a traceback, and its `.part` is gone."""
    (tmp_path / "old").write_bytes(bytes(BLOCK))
    (tmp_path / "new").write_bytes(Random(1).randbytes(64 << 20))
    arguments = ["--source", f"{tmp_path}/old", "--target", f"{tmp_path}/new", "--out", f"{tmp_path}/c"]
    command = [sys.executable, "-m", "snapd.ctl", "cow", "create", *arguments, "--compress", "zstd,19"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as create:
        part = tmp_path / "c.part"
        while create.poll() is None and not (part.exists() and part.stat().st_size):
            pass
        create.send_signal(signal.SIGINT)
        _, errors = create.communicate(timeout=120)
    assert create.returncode == 130
    assert "Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_help_is_light() -> None:
    """`snapctl --help` loads nothing that only a verb needs."""
    code = (
        "import sys, snapd.ctl.app as app\n"
        "try: app.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'grpc', 'rich', 'asyncio', 'zstandard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "cow" in result.stdout

"""`snapctl cow create` as a real process: its options, its files, and what a wrong or a killed one leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from offline import BLOCK, blocks, done, failed, snapctl

OLD = blocks(300, 1)
# Moved by blocks, edited in place, zero, moved by an odd number of bytes, and new.
NEW = bytearray(OLD[30 * BLOCK : 60 * BLOCK] + OLD[30 * BLOCK : 90 * BLOCK] + bytes(10 * BLOCK) + OLD[100 * BLOCK :])
NEW[30 * BLOCK : 80 * BLOCK : 777] = bytes(len(NEW[30 * BLOCK : 80 * BLOCK : 777]))
NEW[200 * BLOCK : 250 * BLOCK] = OLD[201 * BLOCK + 99 : 251 * BLOCK + 99]
NEW[260 * BLOCK :] = blocks(60, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The images, `old` and `new`."""
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    return tmp_path


def create(folder: Path, *arguments: str, out: str = "c") -> dict[str, Any]:
    """The report of a creation, whose result is exact in every respect."""
    images = ("--source", folder / "old", "--target", folder / "new")
    report: dict[str, Any] = json.loads(done("create", *images, "--out", folder / out, *arguments, "-o", "json"))
    assert report["cow_bytes"] == (folder / out).stat().st_size
    verified = json.loads(done("verify", folder / out, "--base", folder / "old", "--payloads", "-o", "json"))
    assert (verified["ok"], verified["compared_bytes"]) == (True, len(NEW))
    done("extract", folder / out, "--base", folder / "old", "--out", folder / "o")
    assert (folder / "o").read_bytes() == NEW
    return report


@pytest.mark.parametrize("file_format", ["v2", "v3"])
@pytest.mark.parametrize("compress", ["zstd", "zstd,9", "lz4", "gz", "brotli,5", "none"])
def test_every_format_and_compressor(folder: Path, file_format: str, compress: str) -> None:
    """COW-3, COW-100: what comes out is the target, and `info` says what was asked for."""
    report = create(folder, "--format", file_format, "--compress", compress)
    info = json.loads(done("info", folder / "c", "-o", "json"))
    assert (info["version"], info["compression"]) == (int(file_format[1]), compress.partition(",")[0])
    assert info["unit_bytes"] == (BLOCK if file_format == "v2" else 64 << 10)
    assert info["digests"] == "final"
    assert (info["copy_ops"], info["xor_ops"]) == (report["copy_blocks"], report["xor_blocks"])
    assert (report["xor_blocks"] > 0) == (compress != "none")


@pytest.mark.parametrize("unit", ["4KiB", "64 KiB", "262144"])
def test_units(folder: Path, unit: str) -> None:
    """COW-112: the unit is the header's."""
    create(folder, "--unit", unit)
    info = json.loads(done("info", folder / "c", "-o", "json"))
    assert info["unit_bytes"] == {"4KiB": 4096, "262144": 262144}.get(unit, 65536)


def test_the_ways_to_look_for_xor_sources(folder: Path) -> None:
    """COW-187: each finds more than the one before, and gives a smaller file; the default looks at the same place."""
    reports = {xor: create(folder, "--xor", xor, out=xor) for xor in ("none", "same", "search")}
    xors = [reports[xor]["xor_blocks"] for xor in ("none", "same", "search")]
    assert xors[0] == 0
    assert xors[1] >= 20
    assert xors[2] >= xors[1] + 45
    sizes = [reports[xor]["cow_bytes"] for xor in ("none", "same", "search")]
    assert sizes == sorted(set(sizes), reverse=True)
    create(folder, out="default")
    assert (folder / "default").read_bytes() == (folder / "same").read_bytes()


@pytest.mark.parametrize("file_format", ["v2", "v3"])
@pytest.mark.parametrize("xor", ["same", "search"])
def test_jobs_change_nothing(folder: Path, file_format: str, xor: str) -> None:
    """COW-110: the same bytes in both files, whatever the number of threads."""
    files = []
    for jobs in ("1", "2", "3"):
        create(folder, "--jobs", jobs, "--format", file_format, "--xor", xor)
        files.append([(folder / name).read_bytes() for name in ("c", "c.digests")])
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--format", "v2", "--unit", "64KiB"), "--unit"),
        (("--unit", "3KiB"), "--unit"),
        (("--unit", "64KB"), "--unit"),
        (("--compress", "zlib"), "--compress"),
        (("--compress", "gz,10"), "--compress"),
        (("--format", "v1"), "--format"),
        (("--xor", "all"), "--xor"),
        (("--jobs", "0"), "--jobs"),
        (("--jobs", "two"), "--jobs"),
    ],
)
def test_options_that_cannot_be_are_usage(folder: Path, arguments: tuple[str, ...], named: str) -> None:
    """COW-223 and others: exit code 2 and the option's name, before any file is touched."""
    before = sorted(os.listdir(folder))
    images = ("--source", folder / "old", "--target", folder / "new", "--out", folder / "c")
    result = snapctl("create", *images, *arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert sorted(os.listdir(folder)) == before


def test_a_new_file_takes_the_old_table_with_it(folder: Path) -> None:
    """COW-216: after another creation the table is that of the new file."""
    create(folder)
    before = (folder / "c.digests").read_bytes()
    create(folder, "--compress", "lz4")
    assert (folder / "c.digests").read_bytes() != before


@pytest.mark.parametrize("which", ["c", "c.digests"])
def test_a_damaged_file_is_found(folder: Path, which: str) -> None:
    """COW-216: a flipped bit in a payload or in the table is an error, and never another image."""
    create(folder)
    shutil.copy(folder / "c.digests", folder / "kept")
    raw = bytearray((folder / which).read_bytes())
    raw[-100] ^= 1
    (folder / which).write_bytes(raw)
    assert "c" in failed("extract", folder / "c", "--base", folder / "old", "--out", folder / "o2")
    assert not (folder / "o2").exists()


def test_a_killed_creation_leaves_the_old_file(folder: Path) -> None:
    """The COW that was there stays, with its table or without one; the next call cleans up."""
    create(folder)
    (folder / "new").write_bytes(Random(1).randbytes(64 << 20))
    before, table = ((folder / name).read_bytes() for name in ("c", "c.digests"))
    arguments = ["--source", f"{folder}/old", "--target", f"{folder}/new", "--out", f"{folder}/c"]
    part = folder / "c.part"
    with subprocess.Popen([sys.executable, "-m", "snapd.ctl", "cow", "create", *arguments]) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            pass
        process.send_signal(signal.SIGSTOP)
        killed = part.exists() and process.poll() is None
        process.send_signal(signal.SIGKILL)
    if killed:
        assert (folder / "c").read_bytes() == before
        assert not (folder / "c.digests").exists() or (folder / "c.digests").read_bytes() == table
    done("create", *arguments)
    done("verify", folder / "c", "--base", folder / "old")
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


_MEASURED = """
import sys
from snapd.ctl.app import main
try:
    main(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print(*[line.split()[1] for line in status if line.startswith("VmHWM")], file=sys.stderr)
"""


@pytest.mark.parametrize("file_format", ["v2", "v3"])
def test_memory_does_not_follow_the_image(tmp_path: Path, file_format: str) -> None:
    """At most 150 MiB and 24 bytes a source block, however much of the images moved, changed or is new."""
    size = 160 << 20
    random = Random(5)
    old = random.randbytes(size)
    with open(tmp_path / "old", "wb") as file:
        file.write(old)
    with open(tmp_path / "new", "wb") as file:
        # A third each: moved by blocks, moved by an odd number of bytes, new.
        third = size // 3 // BLOCK * BLOCK
        moved = old[third : 2 * third] + old[2 * third + 99 : 3 * third + 99]
        file.write(moved + random.randbytes(size - len(moved)))
    arguments = ["cow", "create", "--source", "old", "--target", "new", "--out", "c", "--jobs", "2", "--xor", "search"]
    command = [sys.executable, "-c", _MEASURED, *arguments, "--format", file_format, "-o", "json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=200)
    assert json.loads(result.stdout)["xor_blocks"] >= third // BLOCK - 1
    assert int(result.stderr) << 10 < (150 << 20) + 24 * size // BLOCK

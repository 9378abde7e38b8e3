"""With a digests table no flipped bit ever changes an image: it is an error, or of no account (COW-216)."""

import os
from pathlib import Path
from random import Random

import pytest
from offline import BLOCK, Call, blocks, write_cow

from snapd.block.errors import SnapdError
from snapd.cow.digests import SUFFIX
from snapd.cow.verbs.extract import extract_image
from snapd.cow.verbs.verify import VerifyReport, verify_cow

OLD = blocks(400, 1)
# Blocks 4 to 7 moved, 8 and 9 zero, 10 to 29 new, 40 and 41 changed in a byte each; 420 blocks in all.
NEW = bytearray(OLD + blocks(20, 3))
NEW[4 * BLOCK : 8 * BLOCK] = OLD[30 * BLOCK : 34 * BLOCK]
NEW[8 * BLOCK : 10 * BLOCK] = bytes(2 * BLOCK)
NEW[10 * BLOCK : 30 * BLOCK] = blocks(20, 2)
NEW[40 * BLOCK + 5] ^= 1
NEW[41 * BLOCK + 5] ^= 1
CALLS: tuple[Call, ...] = (
    ("copy", 4, 4, 30),
    ("xor", 40, 2, 40 * BLOCK),
    ("label", 7, 0, 0),
    ("zero", 8, 2, 0),
    ("raw", 10, 20, 0),
    ("raw", 400, 20, 0),
)
PROGRESS = range(26, 34)


@pytest.fixture(params=[(2, "lz4"), (2, "gz"), (3, "none"), (3, "lz4"), (3, "zstd")], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base, and `c` with its table."""
    version, compress = request.param
    (tmp_path / "old").write_bytes(OLD)
    write_cow(tmp_path / "c", OLD, bytes(NEW), *CALLS, version=version, compress=compress, digests=True)
    return tmp_path


def quiet(_done: int, _total: int) -> None:
    """No progress."""


def flip(path: Path, at: int, mask: int) -> None:
    """Change bits of one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def extracted(folder: Path) -> bytes | None:
    """The image, or None for an error, which leaves no file."""
    (folder / "o").unlink(missing_ok=True)
    try:
        extract_image(folder / "c", folder / "old", folder / "o", None, quiet)
    except SnapdError:
        assert not (folder / "o").exists()
        return None
    return (folder / "o").read_bytes()


def verified(folder: Path) -> VerifyReport | None:
    """The report, or None for an error."""
    try:
        return verify_cow(folder / "c", folder / "old", quiet)
    except SnapdError:
        return None


@pytest.mark.parametrize("name", ["c", f"c{SUFFIX}", "old"])
def test_a_flipped_bit_changes_no_image(folder: Path, name: str) -> None:
    """COW-216: in the COW, in its table, in the base; `verify` calls good what can be extracted, and nothing else."""
    random = Random(name)
    places = [at for at in range((folder / name).stat().st_size) if name != "c" or at not in PROGRESS]
    errors = 0
    for at in random.sample(places, 60):
        mask = 1 << random.randrange(8)
        flip(folder / name, at, mask)
        image, report = extracted(folder), verified(folder)
        assert image in (None, bytes(NEW)), (at, mask)
        assert (report is not None and not report.damaged_blocks) == (image is not None), (at, mask)
        errors += image is None
        flip(folder / name, at, mask)
    assert errors > 20
    assert extracted(folder) == bytes(NEW)


def test_progress_is_reported_to_the_end(folder: Path) -> None:
    """From more than nothing to all of it, never backwards."""
    seen: list[tuple[int, int]] = []
    verify_cow(folder / "c", folder / "old", lambda done, total: seen.append((done, total)), payloads=True)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > len(NEW)
    seen.clear()
    extract_image(folder / "c", folder / "old", folder / "o", None, lambda done, total: seen.append((done, total)))
    assert seen == [(1 << 20, len(NEW)), (len(NEW), len(NEW))]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_does_not_depend_on_threads(folder: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces that end inside units, taken by any number of threads."""
    monkeypatch.setattr("snapd.cow.verbs.extract._THREADS", threads)
    monkeypatch.setattr("snapd.cow.verbs.extract._PIECE_BYTES", 3 * BLOCK + 512)
    assert extracted(folder) == bytes(NEW)


def test_findings_do_not_depend_on_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines in the same order."""
    for block in (0, 31, 41, 399):
        flip(folder / "old", block * BLOCK, 1)
    reports = []
    for threads in (1, 4):
        monkeypatch.setattr("snapd.cow.verbs.contentcheck._THREADS", threads)
        monkeypatch.setattr("snapd.cow.verbs.contentcheck._PIECE_BYTES", 5 * BLOCK)
        reports.append(verified(folder))
    assert reports[0] == reports[1]
    assert reports[0] is not None
    assert [line.split(":")[0] for line in reports[0].damage] == [
        *("block 0", "block 5", "block 31", "block 41", "block 399")
    ]


def test_a_base_that_cannot_be_read_is_an_error(folder: Path) -> None:
    """What a store raises is no finding about the COW."""
    os.truncate(folder / "old", 35 * BLOCK)
    with pytest.raises(SnapdError):
        verify_cow(folder / "c", folder / "old", quiet)

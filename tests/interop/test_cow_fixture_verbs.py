"""The offline verbs on COW files of the reference writer: what they say of them, and what becomes of them.

The files are not part of the repository; the tests are skipped where they are not beside the checkout.
"""

import json
import shutil
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from snapd.block.errors import SnapdError
from snapd.cow.verbs.append import append_cow
from snapd.cow.verbs.extract import extract_image
from snapd.cow.verbs.info import cow_info
from snapd.cow.verbs.verify import verify_cow

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "cow-interop.tar.xz"
pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason="the reference writer's files are not here")
BLOCK = 4096


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked files, to be read only."""
    place = tmp_path_factory.mktemp("reference")
    with tarfile.open(ARCHIVE) as archive:
        # By attribute: the argument is younger than some Python 3.11.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(place)
    return place


@pytest.fixture(scope="module")
def complete(files: Path) -> list[dict[str, Any]]:
    """What the manifest says of the complete files."""
    manifest = json.loads((files / "manifest.json").read_text())
    entries: list[dict[str, Any]] = [entry for entry in manifest["cow"] if entry["complete"]]
    assert len(entries) == 13
    return entries


def quiet(_done: int, _total: int) -> None:
    """No progress."""


def extracted(cow: Path, files: Path, out: Path, **options: Any) -> bytes:
    """The image over the reference's base."""
    extract_image(cow, files / "base.img", out, None, quiet, **options)
    return out.read_bytes()


def test_info_counts_what_the_reference_wrote(files: Path, complete: list[dict[str, Any]]) -> None:
    """COW-158: ops and records by type, sequence, compression and sizes of all complete files."""
    for entry in complete:
        info, _ = cow_info(files / "cow" / entry["file"])
        wrote = entry["ops"]
        assert (info.version, info.compression, info.file_bytes) == (
            entry["version"],
            entry["compression"],
            entry["cow_bytes"],
        )
        assert (info.copy_ops, info.replace_ops, info.zero_ops, info.xor_ops) == (
            *(wrote["copy"], wrote["replace"], wrote["zero"], wrote["xor"]),
        )
        assert info.sequence_blocks == entry["sequence_data_count"]
        assert info.ordered_merge == "accepted"
        if info.version == 2:
            records = (info.label_records, info.cluster_records, info.sequence_records)
            assert records == (wrote["label"], wrote["cluster"], wrote["sequence"])


def test_verify_and_extract(files: Path, complete: list[dict[str, Any]], tmp_path: Path) -> None:
    """COW-159: every payload decodes, and the image is the one that the reference means."""
    for entry in complete:
        report = verify_cow(files / "cow" / entry["file"], files / "base.img", quiet, payloads=True)
        assert report.ok, entry["file"]
        assert report.not_checked == ("content: there is no digests table",)
        image = extracted(files / "cow" / entry["file"], files, tmp_path / "o")
        assert image == (files / entry["target"]).read_bytes(), entry["file"]


def test_a_window_that_was_being_merged_is_shown_and_refused(files: Path, tmp_path: Path) -> None:
    """COW-142, COW-217: files of a merge that was killed; the base has old and new blocks."""
    cows = sorted((files / "midmerge").glob("*.cow"))
    assert len(cows) == 2
    for cow in cows:
        assert cow_info(cow)[0].merge == "begun, a window is done (COW-142)"
        with pytest.raises(SnapdError, match="UNDO-28"):
            extract_image(cow, cow.with_suffix(".img"), tmp_path / "o", None, quiet)


def test_append_goes_on_with_complete_files(files: Path, complete: list[dict[str, Any]], tmp_path: Path) -> None:
    """COW-87, COW-88, COW-91: blocks changed and added behind what the reference wrote, in every version."""
    for entry in complete:
        target = bytearray((files / entry["target"]).read_bytes())
        info, extent_map = cow_info(files / "cow" / entry["file"])
        changed = next(
            block
            for block in range(extent_map.block_count)
            if not list(extent_map.changed_extents(block, block + 1)) and any(target[block * BLOCK :][:BLOCK])
        )
        target[changed * BLOCK : (changed + 1) * BLOCK] = bytes(BLOCK)
        target += Random(1).randbytes(5 * BLOCK)
        (tmp_path / "new").write_bytes(target)
        cow = tmp_path / "c"
        shutil.copy(files / "cow" / entry["file"], cow)
        report = append_cow(cow, files / "base.img", tmp_path / "new", quiet)
        assert (report.kept_ops, report.zero_blocks, report.replace_blocks) == (info.ops, 1, 5)
        assert extracted(cow, files, tmp_path / "o") == target, entry["file"]
        assert verify_cow(cow, files / "base.img", quiet, payloads=True).ok


@pytest.mark.parametrize("name", ["v2_lz4_labels", "v2_lz4_abort_label2", "v3_lz4_64k_labels", "v3_lz4_abort_label2"])
@pytest.mark.parametrize("label", [1, 2])
def test_append_goes_on_from_labels(files: Path, name: str, label: int, tmp_path: Path) -> None:
    """COW-86, COW-87, COW-94: also where the reference's writer was stopped."""
    cow = tmp_path / "c"
    shutil.copy(files / "cow" / f"{name}.cow", cow)
    kept = cow_info(cow, label=label)[0].ops
    report = append_cow(cow, files / "base.img", files / "target.img", quiet, label=label)
    assert report.kept_ops == kept
    assert extracted(cow, files, tmp_path / "o") == (files / "target.img").read_bytes()
    assert verify_cow(cow, files / "base.img", quiet, payloads=True).ok
    if name.startswith("v2"):
        assert [point.label for point in cow_info(cow)[0].labels] == list(range(1, label + 1))

"""COW files of the reference writer give what `expected.json` states, each with its reason.

The files are not part of the repository; the tests are skipped where they are not beside the checkout.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from plan_model import image_of, reader_blocks

from snapd.block.lock import locked_store
from snapd.block.store import read_bytes
from snapd.cow.errors import CowError
from snapd.cow.format import Compression
from snapd.cow.header import Header
from snapd.cow.image.view import CowView
from snapd.cow.parse.mergeorder import merge_list, order_fault
from snapd.cow.parse.reader import CowFile

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "cow-interop.tar.xz"
EXPECTED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "expected.json").read_text())["files"]
READINGS = [(entry["file"], reading) for entry in EXPECTED for reading in entry["readings"]]
IDS = [
    " ".join(
        [name, *(f"label {reading['label']}" for _ in range("label" in reading)), "lenient" * ("lenient" in reading)]
    )
    for name, reading in READINGS
]
with_files = pytest.mark.skipif(not ARCHIVE.exists(), reason="the reference writer's files are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked files."""
    place = tmp_path_factory.mktemp("reference")
    with tarfile.open(ARCHIVE) as archive:
        # By attribute: the argument is younger than some Python 3.11.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(place)
    return place


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    """What the files are."""
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return loaded


def planned_label(reading: dict[str, Any]) -> int | None:
    """The label up to which the file follows its plan; None for the whole plan."""
    label: int | None = reading.get("label", reading.get("as_of_label"))
    return label


def parse(folder: Path, name: str, reading: dict[str, Any]) -> CowFile:
    """The file, read in the way that the entry says."""
    with locked_store(folder / name) as store:
        return CowFile.parse(store, label=reading.get("label"), lenient=reading.get("lenient", False))


@with_files
def test_every_file_is_expected_to_give_something(folder: Path) -> None:
    """No file is left out, and none is made up."""
    assert sorted(entry["file"] for entry in EXPECTED) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.cow")
    )
    assert all(entry["reason"] for entry in EXPECTED)


@with_files
def test_expected_images_follow_from_the_plans(folder: Path, manifest: dict[str, Any]) -> None:
    """What the entries state is what the plans make of base and target, without any COW."""
    base, target = (folder / "base.img").read_bytes(), (folder / "target.img").read_bytes()
    targets = {f"cow/{entry['file']}": entry["target_sha256"] for entry in manifest["cow"] if entry["complete"]}
    for name, reading in READINGS:
        if reading["outcome"] != "image":
            continue
        plan = (folder / reading["plan"]).read_text().splitlines() if reading["plan"] else []
        image = image_of([*plan, *reading.get("then", [])], base, target, planned_label(reading))
        assert hashlib.sha256(image).hexdigest() == reading["image_sha256"]
        if "label" not in reading and name in targets:
            assert reading["image_sha256"] == targets[name]


@with_files
@pytest.mark.parametrize(("name", "reading"), READINGS, ids=IDS)
def test_reference_file(name: str, reading: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> None:
    """COW-208 to COW-214, COW-217, UNDO-28: parsed, mapped, read and put in merge order, or refused, as stated."""
    if reading["outcome"] == "refused":
        with pytest.raises(CowError) as caught:
            parse(folder, name, reading)
        assert caught.value.statement == reading["statement"]
        return
    cow = parse(folder, name, reading)
    assert (cow.end, cow.op_count) == (reading["end"], reading["ops"])
    assert [list(label) for label in cow.labels] == reading.get("labels", [])
    base_bytes = (folder / "base.img").stat().st_size
    if reading["outcome"] == "busy":
        assert cow.has_begun
        assert cow.window_done
        with pytest.raises(CowError) as caught:
            cow.extent_map(base_bytes)
        assert caught.value.statement == reading["statement"]
        return
    assert not cow.has_begun
    notes = cow.tolerated.notes
    assert len(notes) == ("notes" in reading)
    assert all(word in notes[0] for word in reading.get("notes", []))
    with locked_store(folder / name) as payloads, locked_store(folder / "base.img") as base:
        view = CowView(cow.extent_map(base_bytes), payloads, source=base, base=base)
        assert hashlib.sha256(read_bytes(view, 0, view.size)).hexdigest() == reading["image_sha256"]
    check_merge_order(cow, name, reading, folder, manifest)


def check_merge_order(cow: CowFile, name: str, reading: dict[str, Any], folder: Path, manifest: dict[str, Any]) -> None:
    """COW-67 to COW-76: the reference's own order, or the one that the plan has; or why there is none."""
    order = merge_list(cow)
    assert sorted(order.tolist()) == list(range(cow.op_count))
    blocks = cow.ops.new_block[order].tolist()
    fault = order_fault(cow)
    if reading["merge"].startswith("COW-"):
        assert f"({reading['merge']})" in fault
        return
    assert fault == ""
    if reading["merge"] == "manifest":
        (entry,) = (entry for entry in manifest["cow"] if f"cow/{entry['file']}" == name)
        assert blocks == entry["merge_order"]
    elif reading["merge"] == "readers first":
        assert blocks == reader_blocks((folder / reading["plan"]).read_text().splitlines(), planned_label(reading))


@with_files
def test_headers_are_read_as_they_were_written(folder: Path, manifest: dict[str, Any]) -> None:
    """COW-12, COW-18: the fields of every header; what versions 1 and 2 do not store follows from the ops."""
    for entry in manifest["cow"]:
        reading = {} if entry["complete"] else {"label": 2}
        header = parse(folder, f"cow/{entry['file']}", reading).header
        assert header.version == entry["version"]
        assert header.compression == Compression[entry["compression"].upper()]
        assert header.max_unit == entry["max_compression_size"]
        assert header.cluster_ops == (entry["cluster_ops"] if header.version == 2 else 0)
        assert (header.op_count, header.op_count_max) == (entry["op_count"], entry["op_count_max"])
        with locked_store(folder / "cow" / entry["file"]) as store:
            assert Header.unpack(read_bytes(store, 0, 78)).pack() == read_bytes(store, 0, header.size)

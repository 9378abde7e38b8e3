"""COW files of the reference writer: read exactly, or refused by the name of what is not supported.

The files are not part of the repository; the tests are skipped where they are not beside the checkout.
"""

import errno
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from snapd.block.lock import locked_store
from snapd.block.store import read_bytes
from snapd.cow.errors import CowError
from snapd.cow.format import Compression, Header
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "cow-interop.tar.xz"
pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason="the reference writer's files are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked files."""
    place = tmp_path_factory.mktemp("reference")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    """What the files are."""
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return loaded


def new_image(cow: Path, base: Path) -> bytes:
    """The image that a COW over its base stands for."""
    with locked_store(cow) as payloads, locked_store(base) as below:
        block_map = CowFile.parse(payloads).block_map(below.size())
        view = CowView(block_map, payloads, source=below, base=below)
        return read_bytes(view, 0, view.size)


def test_every_file_is_read_exactly_or_refused_by_name(folder: Path, manifest: dict[str, Any]) -> None:
    """COW-3, COW-54, COW-108: whatever is not supported is said to be so, and nothing is served wrongly."""
    targets = {f"cow/{entry['file']}": entry["target_sha256"] for entry in manifest["cow"]}
    refused = set()
    for path in sorted(folder.rglob("*.cow")):
        name = str(path.relative_to(folder))
        try:
            image = new_image(path, folder / "base.img")
        except CowError as error:
            # Each of them has something that is to come: version 2, XOR, gz or brotli.
            if error.errno == errno.EOPNOTSUPP:
                refused.add(name)
                continue
            raise
        if name in targets:
            assert hashlib.sha256(image).hexdigest() == targets[name]
        else:
            assert name == "edge/v3_empty.cow"
    assert {name for name in targets if "/v2_" in name} <= refused


def test_the_empty_file_is_its_base(folder: Path, manifest: dict[str, Any]) -> None:
    """COW-212: no ops, 384 slots and scratch; the image is the base and nothing else."""
    image = new_image(folder / "edge" / "v3_empty.cow", folder / "base.img")
    assert hashlib.sha256(image).hexdigest() == manifest["base_sha256"]


def test_headers_are_read_as_they_were_written(folder: Path, manifest: dict[str, Any]) -> None:
    """COW-12: the fields of every version 3 header, whether the rest is supported or not."""
    for entry in manifest["cow"]:
        if entry["version"] != 3:
            continue
        header = Header.unpack((folder / "cow" / entry["file"]).read_bytes()[:78])
        assert header.compression == Compression[entry["compression"].upper()]
        assert header.max_compression_size == entry["max_compression_size"]
        assert (header.op_count, header.op_count_max) == (entry["op_count"], entry["op_count_max"])

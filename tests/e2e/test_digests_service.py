"""A flipped bit under a running service: an error that names the block, never wrong data, never a wrong merge."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BLOCK, Images, Service, make_images, read_device

from snapd.block.errors import SnapdError
from snapd.block.lock import locked_store
from snapd.client.nbd import NbdClient
from snapd.cow.digests import table_path
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import Run
from snapd.cow.parse.reader import CowFile

Damage = Callable[[Images], list[int]]


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        healthy = file.read(1)
        file.seek(offset)
        file.write(bytes([healthy[0] ^ 0x10]))


def runs(pair: Images, kind: OpType) -> list[Run]:
    """The runs of one kind in the images' COW."""
    with locked_store(pair.cow) as store:
        made = CowFile.parse(store).extent_map(len(pair.old))
    return [run for run in made.runs(0, made.block_count) if run.kind == kind]


def damage_payload(pair: Images) -> list[int]:
    """Flip a bit of a unit that is stored raw, which no codec notices; the block it belongs to."""
    with locked_store(pair.cow) as store:
        ops = CowFile.parse(store).ops
        op = next(op for op in map(ops.op, range(len(ops))) if op.data_length == op.blocks * BLOCK)
    flip(pair.cow, op.source + op.data_length // 2)
    return [op.new_block + op.blocks // 2]


def damage_source(pair: Images) -> list[int]:
    """Flip a bit of a base block that is copied and, like every copied block of these images, overwritten."""
    run = runs(pair, OpType.COPY)[0]
    flip(pair.base, run.value * BLOCK + 77)
    return [run.start]


@pytest.mark.parametrize("damage", [damage_payload, damage_source])
def test_a_flipped_bit_is_an_error_that_names_the_block(service: Service, short_dir: Path, damage: Damage) -> None:
    """COW-216: on the device, in the merge, and offline; all other blocks are served, and nothing wrong is merged."""
    pair = make_images(short_dir, 3, 1024)
    damaged = damage(pair)
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    uri = service.json("snapshot", "map", "u/s")["nbd_uri"]
    with NbdClient.connect(uri) as device:
        for block in range(1024):
            buffer = bytearray(BLOCK)
            if block in damaged:
                with pytest.raises(SnapdError, match="error 5"):
                    device.read_into(buffer, block * BLOCK)
                continue
            device.read_into(buffer, block * BLOCK)
            assert buffer == pair.new[block * BLOCK : (block + 1) * BLOCK]
    assert f"block {damaged[0]} of the image does not match its digest" in service.log()
    before = pair.base.read_bytes()
    message = service.snapctl("merge", "start", "u", "--wait", code=1)
    assert f"block {damaged[0]} of the image does not match its digest (COW-216)" in message
    for block in damaged:
        assert (
            pair.base.read_bytes()[block * BLOCK : (block + 1) * BLOCK] == before[block * BLOCK : (block + 1) * BLOCK]
        )


def test_without_its_table_a_cow_still_works(service: Service, short_dir: Path) -> None:
    """COW-216: the table is used when it is there, and only then."""
    pair = make_images(short_dir, 4, 512)
    Path(table_path(pair.cow)).unlink()
    service.snapctl("update", "create", "u")
    service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow))
    assert read_device(service.json("snapshot", "map", "u/s")["nbd_uri"]) == pair.new
    assert service.json("merge", "start", "u", "--wait")["state"] == "MERGED"
    assert pair.base.read_bytes() == pair.new


def test_a_table_of_another_cow_is_refused(service: Service, short_dir: Path) -> None:
    """COW-216: a mismatch is always an error, before anything is made."""
    (short_dir / "other").mkdir()
    pair, other = make_images(short_dir, 4, 512), make_images(short_dir / "other", 5, 512)
    Path(table_path(pair.cow)).write_bytes(Path(table_path(other.cow)).read_bytes())
    service.snapctl("update", "create", "u")
    message = service.snapctl("snapshot", "create", "u/s", "--base", str(pair.base), "--cow", str(pair.cow), code=1)
    assert "digests table: made for other ops" in message
    assert service.json("update", "show", "u")["snapshots"] == []


def test_an_offline_merge_checks_unless_told_not_to(service: Service, short_dir: Path) -> None:
    """COW-216: `cow merge` stops at the damaged block; `--ignore-digests` is explicit."""
    pair = make_images(short_dir, 6, 512)
    damaged = damage_payload(pair)
    message = service.snapctl("cow", "merge", str(pair.cow), "--base", str(pair.base), code=1)
    assert f"block {damaged[0]} of the image does not match its digest" in message
    assert service.json("cow", "merge", str(pair.cow), "--base", str(pair.base), "--ignore-digests")
    found = pair.base.read_bytes()
    assert [
        b for b in range(512) if found[b * BLOCK : (b + 1) * BLOCK] != pair.new[b * BLOCK : (b + 1) * BLOCK]
    ] == damaged

"""Which image a base holds, as far as an earlier merge of the same COW can tell.

A merged COW can be merged again into another base that still holds the old image, but never again into its own: copies
would be read from the new image. So the end of a merge leaves `<COW>.merged` beside the COW: digests of all target
blocks as they were (old) and as they are (new). With it a base is known for one or the other, or refused as neither.
Where it is lost, a COW that says it is merged (COW-145) is believed only if the base has all the content it carries.

The file is JSON: `{"ops": "…", "old": "…", "new": "…"}`, hexadecimal: xxh3-64 of the op records, xxh3-128 of the
target blocks in ascending order, what lies behind the old image's end being zeros.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.block.newfile import new_file
from snapd.block.store import Store, read_bytes
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import mark_merged

SUFFIX = ".merged"
_PIECE_BYTES = 1 << 20
_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class MergeRecord:
    """What a merge has made of what."""

    ops_digest: int
    old_digest: bytes
    new_digest: bytes


def record_merge(cow: CowFile, cow_path: _Path, payloads: Store, old_digest: bytes, new_digest: bytes) -> None:
    """Durably say that the COW was merged: first in the record beside it, then in its own header (COW-145)."""
    write_record(cow_path, MergeRecord(cow.ops_digest, old_digest, new_digest))
    mark_merged(payloads, cow.op_count)


def write_record(cow_path: _Path, record: MergeRecord) -> None:
    """Leave the record beside the COW, durably."""
    content = {
        "ops": f"{record.ops_digest:016x}",
        "old": record.old_digest.hex(),
        "new": record.new_digest.hex(),
    }
    with new_file(_path(cow_path), inputs=[]) as file:
        file.write(json.dumps(content).encode(), 0)


def holds_new_image(cow: CowFile, cow_path: _Path, payloads: Store, base: Store) -> bool:
    """Whether the COW is merged into this base already; False for a base that holds the old image.

    Without a record a COW that is not marked as merged is believed to be new to every base. Reads the target
    blocks of the base where there is something to decide. Errors: EINVAL for a base that is neither, or for one
    too short; what `CowFile.extent_map` refuses.
    """
    record = _read_record(cow_path, cow.ops_digest)
    if record is None:
        if cow.is_merged:
            _check_content(cow, payloads, base)
        return cow.is_merged
    found = digest_targets(cow.extent_map(base.size()), base)
    if found not in (record.old_digest, record.new_digest):
        raise SnapdError(
            errno.EINVAL,
            f"{os.fspath(cow_path)} was merged before, and this base holds neither the old nor the new image of that"
            f" merge (digests in {_path(cow_path)})",
        )
    return found == record.new_digest


def digest_targets(extent_map: ExtentMap, base: Store) -> bytes:
    """The digest of all target blocks as the base has them, zeros behind its end."""
    hasher = xxhash.xxh3_128()
    size = base.size()
    for extent in _pieces(extent_map):
        start, length = extent.start * extent_map.block_size, extent.length * extent_map.block_size
        inside = max(0, min(length, size - start))
        hasher.update(read_bytes(base, start, inside).ljust(length, b"\0"))
    return hasher.digest()


def _check_content(cow: CowFile, payloads: Store, base: Store) -> None:
    """EINVAL unless the base has what every replace and zero op says; copies and XOR cannot be checked."""
    needed_bytes = cow.target_size(0)
    if base.size() < needed_bytes:
        raise SnapdError(
            errno.EINVAL, f"the COW is marked as merged, but this base has only {base.size()} of {needed_bytes} bytes"
        )
    extent_map = cow.extent_map(base.size())
    view = CowView(extent_map, payloads, source=base, base=base)
    size = extent_map.block_size
    for run in extent_map.runs(0, extent_map.block_count):
        if run.kind not in (OpType.REPLACE, OpType.ZERO):
            continue
        for block in range(run.start, run.end):
            if read_bytes(base, block * size, size) != read_bytes(view, block * size, size):
                raise SnapdError(errno.EINVAL, f"the COW is marked as merged, but block {block} of this base differs")


def _pieces(extent_map: ExtentMap) -> Iterator[Extent]:
    step = max(1, _PIECE_BYTES // extent_map.block_size)
    for extent in extent_map.changed_extents(0, extent_map.block_count):
        for start in range(extent.start, extent.end, step):
            yield Extent(start, min(step, extent.end - start))


def _read_record(cow_path: _Path, ops_digest: int) -> MergeRecord | None:
    """The record of these very ops; None when there is none, or one of a COW that lay here before."""
    try:
        with open(_path(cow_path), "rb") as file:
            content = json.load(file)
        record = MergeRecord(int(content["ops"], 16), bytes.fromhex(content["old"]), bytes.fromhex(content["new"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapdError(errno.EBADMSG, f"{_path(cow_path)}: not the record of a merge ({error})") from error
    return record if record.ops_digest == ops_digest else None


def _path(cow_path: _Path) -> str:
    return os.path.realpath(cow_path) + SUFFIX

"""`snapctl cow verify`: whether a COW file can be used, by which kind of merge, and whether its content is right.

Three layers, kept apart in the report. Structure and sizes: what parsing and mapping refuse is an error and no report.
The merge order: a file that breaks it is refused by an ordered merge and is no less exact in a reversible one
(COW-210); only `ok` asks for both. The content, by the digests table (COW-216): with a base every target block is
computed and compared, else only what needs none, replaced and zero blocks. A COW has no checksum of its own: without a
table only that payloads decode can be checked, if that is asked for. What was not checked is said.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from snapd.block.extent import Extent
from snapd.block.lock import locked_store
from snapd.block.store import WritableBuffer
from snapd.cow.claim import check_unclaimed
from snapd.cow.digests import DigestTable, load_digests
from snapd.cow.format import OpType
from snapd.cow.history import holds_new_image
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.parse.parsed import End
from snapd.cow.parse.reader import CowFile
from snapd.cow.progress import Meter, Progress
from snapd.cow.verbs.contentcheck import Damage, compare_blocks, decode_payloads
from snapd.cow.verbs.info import image_map, ordered_merge

_SHOWN_DAMAGE = 10
_Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result; `ok` means that nothing is damaged or tolerated and no kind of merge refuses the file.

    `end` is how the file ends (`End`), `digests` what its table knows: "none", "label" or "final".
    `compared_bytes` of the target were compared with digests, `decoded_bytes` of payloads decoded because that was
    asked for; `not_checked` names what was not looked at, and why. `damage` describes the first ten findings. A merge
    is "accepted", or its refusal told.
    """

    ok: bool
    end: str
    digests: str
    ops: int
    payload_bytes: int
    compared_bytes: int
    decoded_bytes: int
    damaged_blocks: int
    damaged_ops: int
    damage: tuple[str, ...]
    ordered_merge: str
    reversible_merge: str
    not_checked: tuple[str, ...]
    tolerated_faults: int
    tolerated: tuple[str, ...]


def verify_cow(
    path: _Path,
    base_path: _Path | None,
    progress: Progress,
    *,
    label: int | None = None,
    lenient: bool = False,
    payloads: bool = False,
    ignore_digests: bool = False,
) -> VerifyReport:
    """Check structure (rows V1 to V29), sizes against the base (V30), merge order (V31) and content (COW-216).

    With a `label` only the ops before it are looked at; a `lenient` parse says what it let pass (COW-208);
    `payloads` decodes every payload (COW-103).
    Errors: `CowError` for a file whose structure or sizes are wrong, or a digests table that is not of its ops;
    EINVAL for a base that the COW was neither made for nor merged into; EBUSY for a file in use or, with a base, a
    merge that has begun.
    """
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(locked_store(path))
        base = None if base_path is None else stack.enter_context(locked_store(base_path))
        cow = CowFile.parse(store, label=label, lenient=lenient)
        digests = None if ignore_digests else load_digests(path, cow)
        merged = False
        if base is None:
            extent_map = image_map(cow, digests)
        else:
            check_unclaimed(path)
            merged = holds_new_image(cow, path, store, base)
            size = None if digests is None else digests.target_bytes
            extent_map = cow.extent_map(base.size(), size, merged=merged)
        extents = [] if digests is None else _comparable(extent_map, digests, has_base=base is not None)
        compared_bytes = sum(extent.length for extent in extents) * extent_map.block_size
        decoded_bytes = int(cow.ops.data_length.sum()) if payloads else 0
        meter = Meter(progress, compared_bytes + decoded_bytes)
        blocks, ops = Damage("block"), Damage("op")
        if digests is not None and extents:
            image = _NoImage() if base is None else base
            known = digests.dense(extent_map.block_count)
            blocks = compare_blocks(extent_map, known, extents, payloads=store, base=image, meter=meter)
        if payloads:
            ops = decode_payloads(cow, store, meter)
    ordered, reversible = _merges(cow, damaged=blocks.count + ops.count > 0)
    return VerifyReport(
        ok=not (blocks.count or ops.count or cow.tolerated.count or "refused" in ordered + reversible),
        end=cow.end,
        digests="none" if digests is None else "final" if digests.is_final else "label",
        ops=cow.op_count,
        payload_bytes=int(cow.ops.data_length.sum()),
        compared_bytes=compared_bytes,
        decoded_bytes=decoded_bytes,
        damaged_blocks=blocks.count,
        damaged_ops=ops.count,
        damage=tuple([*blocks.texts(), *ops.texts()][:_SHOWN_DAMAGE]),
        ordered_merge=ordered,
        reversible_merge=reversible,
        not_checked=(
            *_sizes_not_checked(has_base=base_path is not None, merged=merged),
            *_content_not_checked(
                cow, digests, has_base=base_path is not None, payloads=payloads, ignored=ignore_digests
            ),
        ),
        tolerated_faults=cow.tolerated.count,
        tolerated=tuple(cow.tolerated.notes),
    )


def _comparable(extent_map: ExtentMap, digests: DigestTable, *, has_base: bool) -> list[Extent]:
    """The blocks that can be computed and have a digest."""
    end = extent_map.block_count
    if not has_base and not digests.is_final:
        # Nothing bounds the number of target blocks then, nor a table with an entry for each.
        return []
    if not has_base:
        alone = (OpType.REPLACE, OpType.ZERO)
        return [Extent(run.start, run.length) for run in extent_map.runs(0, end) if run.kind in alone]
    return [Extent(0, end)] if digests.is_final else list(extent_map.changed_extents(0, end))


def _merges(cow: CowFile, *, damaged: bool) -> tuple[str, str]:
    """Whether an ordered and a reversible merge take the file."""
    if damaged:
        return "refused: content is damaged", "refused: content is damaged"
    ordered = reversible = ordered_merge(cow)
    if cow.end is not End.LABEL and not cow.tolerated.count:
        reversible = "refused: an ordered merge has begun (UNDO-28)" if cow.has_begun else "accepted"
    return ordered, reversible


def _sizes_not_checked(*, has_base: bool, merged: bool) -> Iterator[str]:
    if not has_base:
        yield "sizes: no base was given"
    elif merged:
        yield "sizes: the base holds the new image already"


def _content_not_checked(
    cow: CowFile, digests: DigestTable | None, *, has_base: bool, payloads: bool, ignored: bool
) -> Iterator[str]:
    if digests is None:
        yield "content: the digests were to be ignored" if ignored else "content: there is no digests table"
        if not payloads:
            yield "payloads: that was not asked for"
    elif not has_base and not digests.is_final:
        yield "content: no base was given, and the digests are those of a label"
        if not payloads:
            yield "payloads: that was not asked for"
    elif not has_base:
        yield "copied, XOR and unchanged blocks: no base was given"
        if not payloads and (cow.ops.type == OpType.XOR).any():
            yield "XOR payloads: that was not asked for"
    elif not digests.is_final:
        yield "unchanged blocks: their digests are known at the end of a COW only"


class _NoImage:
    """Where no base was given: what is compared without one reads none."""

    def read_into(self, _buffer: WritableBuffer, _offset: int) -> None:
        raise AssertionError("a block that needs the base was read without one")

"""The image of a hostile file: mapped, saved and loaded, read in slices, and held against its digests table.

A read gives what the second reader computed, or raises where that finds damage (`expected`).
"""

import errno
import os
from random import Random

import model
import tables
from corpus import BASE
from expected import Expected
from findings import ACCEPTED, Outcome, memory_file, require, statement_of

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import read_bytes
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError
from snapd.cow.format import OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile

_WHOLE_BYTES = 1 << 20
_SLICES = 6
_BASE = memory_file(BASE)


def check_image(
    cow: CowFile, reading: model.Reading, store: FileStore, digests: bytes | None, outcome: Outcome, random: Random
) -> None:
    """Everything behind a parse that both readers agree on."""
    table, known = _load_table(cow, digests, outcome)
    extent_map = _map(cow, reading, table, known, outcome)
    if extent_map is None:
        return
    _check_runs(extent_map, reading)
    expected = Expected(reading, extent_map.block_count, BASE, known.digests if known is not None else {})
    for one in (extent_map, _save_and_load(extent_map, random)):
        _Reads(expected, reading.block_size, CowView(one, store, source=_BASE, base=_BASE), outcome).run(random)


def _load_table(
    cow: CowFile, digests: bytes | None, outcome: Outcome
) -> tuple[DigestTable | None, tables.Table | None]:
    """The digests of these ops as both readers see them; None where both refuse, or the block sizes differ."""
    if digests is None:
        return None, None
    known = tables.read_table(digests, op_count=cow.op_count, ops_digest=cow.ops_digest)
    table, statement = None, ACCEPTED
    file = memory_file(digests)
    try:
        table = DigestTable.load(file, op_count=cow.op_count, ops_digest=cow.ops_digest)
    except SnapdError as error:
        statement = statement_of(error)
    finally:
        os.close(file.fd)
    outcome["digests", statement] += 1
    require((table is None) == (known is None), f"digests table: {statement}, the other reader has {known}")
    if table is None or known is None or table.block_size != cow.header.block_size:
        return None, None
    blocks = None if table.target_bytes is None else table.target_bytes // table.block_size
    require((table.block_size, blocks) == (known.block_size, known.target_blocks), "digests table: another target")
    return table, known


def _map(
    cow: CowFile, reading: model.Reading, table: DigestTable | None, known: tables.Table | None, outcome: Outcome
) -> ExtentMap | None:
    """The map over the base, if the second reader finds that there must be one."""
    base_blocks = len(BASE) // reading.block_size
    target_blocks = max(base_blocks, reading.end_block)
    if known is not None and known.target_blocks is not None:
        target_blocks = known.target_blocks
    if reading.is_merged and reading.end_block <= base_blocks:
        merged = cow.extent_map(len(BASE), len(BASE), merged=True)
        require(not list(merged.changed_extents(0, merged.block_count)), "a merged COW changes blocks")
    try:
        extent_map = cow.extent_map(len(BASE), digests=table)
    except SnapdError as error:
        outcome["map", statement_of(error, errno.EBADMSG, errno.EBUSY)] += 1
        busy = error.errno == errno.EBUSY
        require(busy == reading.has_begun, f"begun is {reading.has_begun}: {error}")
        fits = target_blocks > 0 and reading.fits(base_blocks, target_blocks)
        whole = known is None or known.is_whole
        require(busy or not (fits and whole), f"no map, though everything fits: {error}")
        return None
    outcome["map", ACCEPTED] += 1
    require(not reading.has_begun, "a map of a COW whose merge has begun")
    require(reading.fits(base_blocks, target_blocks), "a map of ops that leave the images")
    require(known is None or known.is_whole, "a map with digests that do not give their whole")
    require(extent_map.block_count == target_blocks, f"{extent_map.block_count} blocks, not {target_blocks}")
    return extent_map


def _check_runs(extent_map: ExtentMap, reading: model.Reading) -> None:
    """The runs cover the image and name the ops that serve its blocks."""
    owners = reading.owners()
    at = 0
    for run in extent_map.runs(0, extent_map.block_count):
        require(run.start == at < run.end, f"the run {run} behind block {at}")
        at = run.end
        if run.kind == UNCHANGED:
            require(not any(block in owners for block in range(run.start, run.end)), f"the run {run} has ops")
            continue
        for block in range(run.start, run.end):
            require(block in owners, f"block {block} of the run {run} has no op")
            index = owners[block]
            op = reading.ops[index]
            require((run.kind, run.unit_blocks) == (op.kind, op.blocks), f"the run {run} at block {block}")
            if run.kind == OpType.COPY:
                require(run.value + block - run.start == op.source, f"the source of the run {run} at {block}")
    require(at == extent_map.block_count, "the runs end early")
    changed = sum(extent.length for extent in extent_map.changed_extents(0, extent_map.block_count))
    require(changed == len(owners) == extent_map.changed_blocks(), "the changed extents are not the ops")


def _save_and_load(extent_map: ExtentMap, random: Random) -> ExtentMap:
    """The map out of its file, which with any bit changed is none."""
    file = memory_file()
    damaged = memory_file()
    try:
        extent_map.save(file.fd)
        loaded = ExtentMap.load(file.fd)
        for name in ("block_size", "version", "compression", "max_unit", "ops_digest", "block_count", "op_count"):
            require(getattr(loaded, name) == getattr(extent_map, name), f"saved, and loaded with another {name}")
        raw = bytearray(read_bytes(file, 0, file.size()))
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
        os.pwrite(damaged.fd, raw[: random.choice((len(raw), len(raw), random.randrange(len(raw) + 1)))], 0)
        try:
            ExtentMap.load(damaged.fd)
        except SnapdError as error:
            require(error.errno == errno.EBADMSG, f"a damaged map: {error}")
        else:
            require(False, "a damaged map was loaded")
    finally:
        os.close(file.fd)
        os.close(damaged.fd)
    return loaded


class _Reads:
    """Reads of a view, each compared with what is expected."""

    def __init__(self, expected: Expected, block_size: int, view: CowView, outcome: Outcome) -> None:
        self._expected = expected
        self._block_size = block_size
        self._view = view
        self._outcome = outcome

    def run(self, random: Random) -> None:
        """The whole image, then slices, then single blocks, and a byte too much."""
        view, size = self._view, self._block_size
        if view.size <= _WHOLE_BYTES:
            self._read(0, view.size)
        near = [*self._expected.changed, *self._expected.wrong, 0, view.size // size - 1]
        for _ in range(_SLICES):
            start = max(0, random.choice(near) * size + random.choice((0, 0, 0, random.randrange(-size, size))))
            length = random.choice((size, random.randrange(3 * size), random.randrange(70000), 0))
            start = min(start, view.size)
            self._read(start, min(length, view.size - start))
        for block in random.sample(near, min(len(near), 4)):
            self._read(block * size, size)
        try:
            view.read_into(bytearray(2), view.size - 1)
        except SnapdError as error:
            require(error.errno == errno.EIO, f"behind the end: {error}")
        else:
            require(False, "a read behind the end")

    def _read(self, start: int, length: int) -> None:
        end = start + length
        blocks = range(start // self._block_size, -(-end // self._block_size)) if length else range(0)
        wrong = not self._expected.wrong.isdisjoint(blocks)
        doubtful = not self._expected.doubtful.isdisjoint(blocks)
        buffer = bytearray(length)
        where = f"bytes {start} to {end} of the image"
        try:
            self._view.read_into(buffer, start)
        except CowError as error:
            self._outcome["read", statement_of(error)] += 1
            require(wrong or doubtful, f"{where} cannot be read: {error}")
        else:
            self._outcome["read", ACCEPTED] += 1
            require(not wrong, f"{where} were served, though they are damaged")
            require(buffer == self._expected.content[start:end], f"{where} are not what they should be")

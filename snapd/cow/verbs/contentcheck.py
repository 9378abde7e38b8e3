"""Whether the content of a COW is what it should be: block by block against digests, or payload by payload.

Unlike the read path, which raises at the first fault, a check goes on and tells them all apart.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snapd.block.extent import Extent
from snapd.block.store import Readable, read_bytes
from snapd.cow.compress import Decoder
from snapd.cow.digests import block_digest
from snapd.cow.errors import CowError
from snapd.cow.format import Compression, OpType
from snapd.cow.image.extentmap import UNCHANGED, ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.parse.reader import CowFile
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Meter

_PIECE_BYTES = 1 << 20
_OPS_AT_ONCE = 64
_THREADS = 2
_KEPT_FINDINGS = 10


class Finding(NamedTuple):
    """Something wrong with `length` blocks (or ops) from `first` on."""

    first: int
    length: int
    text: str


@dataclass(slots=True)
class Damage:
    """How many blocks (or ops, as `noun` says) are wrong, and the first findings."""

    noun: str
    count: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, found: Iterable[Finding]) -> None:
        """Take more findings, ascending; equal ones side by side become one."""
        for finding in found:
            self.count += finding.length
            last = self.findings[-1] if self.findings else None
            if last is not None and (last.first + last.length, last.text) == (finding.first, finding.text):
                self.findings[-1] = last._replace(length=last.length + finding.length)
            elif len(self.findings) < _KEPT_FINDINGS:
                self.findings.append(finding)

    def texts(self) -> Iterator[str]:
        """A line a finding."""
        for first, length, text in self.findings:
            what = f"{self.noun} {first}" if length == 1 else f"{self.noun}s {first} to {first + length - 1}"
            yield f"{what}: {text}"


def compare_blocks(
    extent_map: ExtentMap,
    digests: npt.NDArray[np.uint64],
    extents: Iterable[Extent],
    *,
    payloads: Readable,
    base: Readable,
    meter: Meter,
) -> Damage:
    """Read the blocks of `extents` and compare each with its digest; one of 0 is not known and not compared.

    `extent_map` has no digests of its own. Errors: what `base` and `payloads` raise; a damaged payload is a finding.
    """
    known = digests.data
    size = extent_map.block_size

    def compare(extents: list[Extent], state: tuple[CowView, memoryview]) -> tuple[int, list[Finding]]:
        view, buffer = state
        findings: list[Finding] = []
        for extent in extents:
            content = buffer[: extent.length * size]
            try:
                view.read_into(content, extent.start * size)
            except CowError:
                findings += _one_by_one(extent_map, known, view, extent, buffer[:size])
            else:
                findings += _different(extent_map, known, extent.start, content)
        return sum(extent.length for extent in extents) * size, findings

    damage = Damage("block")
    pool: OrderedPool[tuple[CowView, memoryview], tuple[int, list[Finding]]] = OrderedPool(
        _THREADS,
        in_flight=2 * _THREADS,
        make_state=lambda: (
            CowView(extent_map, payloads, source=base, base=base),
            memoryview(bytearray(max(size, _PIECE_BYTES))),
        ),
    )
    for done, findings in pool.run(partial(compare, piece) for piece in _pieces(extents, size)):
        damage.add(findings)
        meter.add(done)
    return damage


def decode_payloads(cow: CowFile, payloads: Readable, meter: Meter) -> Damage:
    """Decode every payload of the file (COW-103, COW-108)."""
    ops, block_size = cow.ops, cow.header.block_size
    carrying = np.flatnonzero((ops.type == OpType.REPLACE) | (ops.type == OpType.XOR))

    def decode(indices: npt.NDArray[np.int64], decoder: Decoder) -> tuple[int, list[Finding]]:
        findings = []
        done = 0
        for index in indices.tolist():
            op = ops.op(index)
            done += op.data_length
            payload = read_bytes(payloads, int(ops.payload[index]), op.data_length)
            try:
                decoder.decode(payload, op.blocks * block_size, op_index=index)
            except CowError as error:
                findings.append(Finding(index, 1, str(error)))
        return done, findings

    damage = Damage("op")
    pool: OrderedPool[Decoder, tuple[int, list[Finding]]] = OrderedPool(
        _THREADS,
        in_flight=2 * _THREADS,
        make_state=lambda: Decoder(Compression(cow.header.compression), version=cow.header.version),
    )
    parts = (carrying[start : start + _OPS_AT_ONCE] for start in range(0, len(carrying), _OPS_AT_ONCE))
    for done, findings in pool.run(partial(decode, part) for part in parts):
        damage.add(findings)
        meter.add(done)
    return damage


def _pieces(extents: Iterable[Extent], block_size: int) -> Iterator[list[Extent]]:
    """The extents in pieces of at most 1 MiB, each as much as it can take."""
    limit = max(1, _PIECE_BYTES // block_size)
    piece: list[Extent] = []
    room = limit
    for start, length in extents:
        end = start + length
        while start < end:
            piece.append(Extent(start, min(room, end - start)))
            start = piece[-1].end
            room -= piece[-1].length
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece


def _different(extent_map: ExtentMap, digests: memoryview, first: int, content: memoryview) -> Iterator[Finding]:
    """The blocks from `first` on whose content is not what their digest says."""
    size = extent_map.block_size
    for block, at in enumerate(range(0, len(content), size), start=first):
        if digests[block] and block_digest(content[at : at + size]) != digests[block]:
            kind = extent_map.run(extent_map.run_of(block)).kind
            name = "unchanged" if kind == UNCHANGED else OpType(kind).name.lower()
            yield Finding(block, 1, f"{name}, does not match its digest (COW-216)")


def _one_by_one(
    extent_map: ExtentMap, digests: memoryview, view: CowView, extent: Extent, buffer: memoryview
) -> Iterator[Finding]:
    """The blocks of an extent that cannot be had, or are not what their digests say."""
    for block in range(extent.start, extent.end):
        try:
            view.read_into(buffer, block * len(buffer))
        except CowError as error:
            yield Finding(block, 1, str(error))
        else:
            yield from _different(extent_map, digests, block, buffer)

"""`snapctl cow append`: go on with a COW file, in place, until it makes the source the target.

What lies before the label, without one everything, is kept and must be right already: what its ops make reads as the
target has it. Added are only ops that read nothing, for they come behind all others in the merge order (COW-74).

| step | action | a crash after it leaves |
| --- | --- | --- |
| 1 | lock all files, compare, count the op slots | nothing changed |
| 2 | cut the digests table back to the label, durably (COW-216) | the old COW, behind the label without digests |
| 3 | cut the COW back to the label, durably (COW-87, COW-95) | a COW that ends at the label |
| 4 | add ops and payloads | the same |
| 5 | the end of the table, then the end of the COW, each durably | the finished COW |

A COW "that ends at the label" is in version 3 one of the kept ops; in version 2 it has no footer and its labels can be
read: one without labels is lost, until it is created anew from the two images. Else the append can be called again.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from snapd.block.errors import SnapdError
from snapd.block.extent import Extent
from snapd.block.lock import locked_store
from snapd.block.store import Store, WritableBuffer, read_bytes
from snapd.cow.claim import check_unclaimed
from snapd.cow.compress import CompressOption
from snapd.cow.diff.createoptions import usable_cpus
from snapd.cow.digests import DigestLog, table_path
from snapd.cow.errors import CowError
from snapd.cow.format import Compression
from snapd.cow.image.view import CowView
from snapd.cow.parse.mapbuild import build_extent_map
from snapd.cow.parse.reader import CowFile
from snapd.cow.pool import OrderedPool
from snapd.cow.progress import Meter, Progress
from snapd.cow.write.targetdigests import TargetDigests
from snapd.cow.write.writer import CowWriter, append_options, append_writer
from snapd.cow.write.writeroptions import WriterOptions

_PIECE_BYTES = 1 << 20
_Path = str | os.PathLike[str]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class AppendReport:
    """What an append kept and added."""

    target_bytes: int
    cow_bytes: int
    kept_ops: int
    ops: int
    zero_blocks: int
    replace_blocks: int
    has_digests: bool
    seconds: float


def append_cow(
    cow_path: _Path,
    source_path: _Path,
    target_path: _Path,
    progress: Progress,
    *,
    label: int | None = None,
    compression: CompressOption | None = None,
    jobs: int | None = None,
) -> AppendReport:
    """Add to a COW what is missing, behind `label` or behind all that it has; `compression` is the file's by default.

    Errors, with nothing changed: EINVAL for a kept op that does not make what the target has, for another
    compression than the file's (COW-89), for images that do not fit; ENOSPC for too few op slots (COW-127); EBUSY
    for a file in use or a merge that has begun (COW-148); `CowError` for a damaged COW or table. Later ones: the
    system's.
    """
    check_unclaimed(cow_path)
    table_name = table_path(cow_path)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(locked_store(cow_path, writable=True))
        source = stack.enter_context(locked_store(source_path))
        target = stack.enter_context(locked_store(target_path))
        table = None
        if os.path.exists(table_name):
            table = stack.enter_context(locked_store(table_name, writable=True))
        threads = usable_cpus() if jobs is None else jobs
        return append_to(store, table, source, target, progress, label=label, compression=compression, threads=threads)


def append_to(
    store: Store,
    table: Store | None,
    source: Store,
    target: Store,
    progress: Progress,
    *,
    label: int | None,
    compression: CompressOption | None,
    threads: int,
) -> AppendReport:
    """The same on open stores; `table` is that of the digests, if there is one."""
    begin = time.monotonic()
    cow = CowFile.parse(store, label=label)
    option = compression or CompressOption.parse(Compression(cow.header.compression).name.lower())
    options = append_options(cow, option, threads=threads)
    meter = Meter(progress, 2 * target.size())
    missing = _Comparison(cow, store, source, target).run(meter, threads)
    if options.version == 3:
        _check_slots(cow, missing.op_count(options))
    digests = None
    if table is not None:
        log = DigestLog.reopen(table, op_count=cow.op_count, ops_digest=cow.ops_digest)
        size = options.block_size
        digests = TargetDigests(log, source, source.size() // size, target.size() // size)
    with contextlib.closing(append_writer(store, cow, option, threads=threads, digests=digests)) as writer:
        _write(missing, writer, target, meter)
        writer.finalize()
    finished = CowFile.parse(store)
    finished.extent_map(source.size(), target.size())
    return AppendReport(
        target_bytes=target.size(),
        cow_bytes=writer.size,
        kept_ops=cow.op_count,
        ops=finished.op_count,
        zero_blocks=int(missing.zero.sum()),
        replace_blocks=int(missing.data.sum()),
        has_digests=table is not None,
        seconds=time.monotonic() - begin,
    )


class _Missing:
    """The target blocks to be added, one flag a block: those that are all zeros, and those that are not."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.zero: _Flags = np.zeros(blocks, dtype=np.bool_)
        self.data: _Flags = np.zeros(blocks, dtype=np.bool_)
        self.block_size = block_size

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return int(self.zero.sum() + self.data.sum()) * self.block_size

    def data_pieces(self) -> Iterator[Extent]:
        """The blocks with data in pieces of at most 1 MiB; every unit of a file divides that."""
        step = _PIECE_BYTES // self.block_size
        for start, length in _extents(self.data):
            for done in range(0, length, step):
                yield Extent(start + done, min(step, length - done))

    def op_count(self, options: WriterOptions) -> int:
        """How many ops they become."""
        return int(self.zero.sum()) + sum(len(options.cut(piece.length)) for piece in self.data_pieces())


class _Comparison:
    """Finds what the ops of a COW over the source lack to make the target. EINVAL for images that do not fit to it."""

    def __init__(self, cow: CowFile, store: Store, source: Store, target: Store) -> None:
        size = cow.header.block_size
        for name, image in (("source", source), ("target", target)):
            if not image.size() or image.size() % size:
                message = f"{name} of {image.size()} bytes: not a multiple of the block size {size}, or empty"
                raise SnapdError(errno.EINVAL, message)
        self._cow = cow
        self._store = store
        self._source = _ZeroPadded(source)
        self._source_blocks = source.size() // size
        self._target = target
        self._missing = _Missing(target.size() // size, size)
        try:
            cow.check_sizes(self._source_blocks, len(self._missing.zero))
        except CowError as error:
            # What no op covers is what is to be added.
            if error.statement != "UNDO-23":
                raise
        self._map = build_extent_map(cow, len(self._missing.zero), merged=False, digests=None)

    def run(self, meter: Meter, threads: int) -> _Missing:
        """Compare all blocks. EINVAL for the first one that an op makes other than the target has it."""

        def open_view() -> tuple[CowView, memoryview, memoryview]:
            view = CowView(self._map, self._store, source=self._source, base=self._source)
            return view, memoryview(bytearray(_PIECE_BYTES)), memoryview(bytearray(_PIECE_BYTES))

        pool: OrderedPool[tuple[CowView, memoryview, memoryview], int] = OrderedPool(
            threads, in_flight=2 * threads, make_state=open_view
        )
        step = _PIECE_BYTES // self._missing.block_size
        for done in pool.run(partial(self._compare, start) for start in range(0, self._map.block_count, step)):
            meter.add(done)
        return self._missing

    def _compare(self, start: int, state: tuple[CowView, memoryview, memoryview]) -> int:
        view, old, new = state
        size = self._missing.block_size
        end = min(start + _PIECE_BYTES // size, self._map.block_count)
        length = (end - start) * size
        view.read_into(old[:length], start * size)
        self._target.read_into(new[:length], start * size)
        is_rows, wanted_rows = (np.frombuffer(raw[:length], dtype="<u8").reshape(end - start, -1) for raw in (old, new))
        differs = (is_rows != wanted_rows).any(axis=1)
        mapped = np.zeros(end - start, dtype=np.bool_)
        for extent in self._map.changed_extents(start, end):
            mapped[extent.start - start : extent.end - start] = True
        if (differs & mapped).any():
            raise self._wrong(start + int((differs & mapped).argmax()))
        missing = ~mapped & (differs | (np.arange(start, end) >= self._source_blocks))
        is_zero = ~wanted_rows.any(axis=1)
        self._missing.zero[start:end] = missing & is_zero
        self._missing.data[start:end] = missing & ~is_zero
        return length

    def _wrong(self, block: int) -> SnapdError:
        ops = self._cow.ops
        index = int(np.flatnonzero((ops.new_block <= block) & (ops.end > block))[0])
        name = ops.op(index).type.name.lower()
        return SnapdError(
            errno.EINVAL,
            f"block {block}: op {index} ({name}) does not make what the target has there; an append changes no op",
        )


class _ZeroPadded:
    """The source, and zeros behind its end, so that a target larger than it can be compared like any other."""

    def __init__(self, source: Store) -> None:
        self._source = source
        self._size = source.size()

    def read_into(self, buffer: WritableBuffer, offset: int) -> None:
        view = memoryview(buffer)
        inside = max(0, min(len(view), self._size - offset))
        if inside:
            self._source.read_into(view[:inside], offset)
        view[inside:] = bytes(len(view) - inside)


def _check_slots(cow: CowFile, ops: int) -> None:
    """ENOSPC when a version 3 file has no room for `ops` more."""
    slots = cow.header.op_count_max
    if cow.op_count + ops > slots:
        raise CowError(
            f"{slots} op slots, {cow.op_count} ops are kept and {ops} would be added: create the file anew",
            statement="COW-127",
            number=errno.ENOSPC,
        )


def _write(missing: _Missing, writer: CowWriter, target: Store, meter: Meter) -> None:
    """Add the ops; what need not be written is done already."""
    size = missing.block_size
    meter.add(target.size() - missing.size_bytes)
    for extent in _extents(missing.zero):
        writer.zero(extent.start, extent.length)
        meter.add(extent.length * size)
    for extent in missing.data_pieces():
        writer.raw(extent.start, read_bytes(target, extent.start * size, extent.length * size))
        meter.add(extent.length * size)


def _extents(flags: _Flags) -> Iterator[Extent]:
    """The runs of flags that are set."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    for start, end in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
        yield Extent(start, end - start)

"""`<COW>.digests`: what every target block must read as, beside a COW that has no checksum of its own (COW-216).

The table is a log. A segment says which digests became known and closes a *state*: the op count and op digest that the
COW has at a label, or at its end. It is made durable before the COW says so much; a reader looks up the state
that its COW is in, and believes a table only if that state is there. An append cuts the log first. So whatever a
crash leaves, a table either has the state of its COW or is refused; it never vouches for other ops.

File layout (little-endian), file header of 32 bytes:

    0   8  magic "SNAPDDIG"
    8   4  version, 1
    12  4  block size, bytes
    16  8  zero
    24  8  xxh3-64 of bytes 0..23

then segments, each:

    0   4  kind: 1 label, 2 end               40 16  end: xxh3-128 of all block digests in order, else zero
    4   4  runs (R)                           56  8  digests (D)
    8   8  label                              64  8  the checksum of the segment before, or of the file header
    16  8  op count                           72  8*R bytes: uint32 first block, uint32 blocks
    24  8  xxh3-64 of these op records        ..  8*D bytes: xxh3-64 of each of these blocks
    32  8  end: target blocks, else zero      ..  8  xxh3-64 of the segment before this field

The first segment that is not whole ends the log: an append that a crash cut short. A digest of 0 means "not known"; a
block that hashes to 0 has 1 instead.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import Buffer, Readable, Store, read_bytes
from snapd.cow.errors import CowError

if TYPE_CHECKING:
    from snapd.cow.parse.reader import CowFile

SUFFIX = ".digests"
MAGIC = b"SNAPDDIG"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
_HEAD_SIZE = _HEAD.size + _CHECKSUM.size
_SEGMENT = struct.Struct("<IIQQQQ16sQQ")
_LABEL, _END = 1, 2
_RUNS_AT_ONCE = 4096
_Digests = npt.NDArray[np.uint64]


class State(NamedTuple):
    """What a COW is at a label or at its end."""

    op_count: int
    ops_digest: int


class _Piece(NamedTuple):
    """What one segment says: runs, each a first block and a number of blocks, and the digests of all these blocks."""

    runs: npt.NDArray[np.uint32]
    digests: _Digests


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    state: State
    target_blocks: int
    target_digest: bytes
    piece: _Piece
    end: int
    checksum: int


@dataclass(frozen=True, slots=True)
class DigestTable:
    """The digests of one state of a COW; `target_bytes` and `target_digest` are None unless it is the end."""

    block_size: int
    target_bytes: int | None
    target_digest: bytes | None
    pieces: tuple[_Piece, ...]

    @classmethod
    def load(cls, store: Store, *, op_count: int, ops_digest: int) -> "DigestTable":
        """The table of a COW with these ops; EBADMSG when it is damaged or of other ops (COW-216)."""
        block_size, segments = _read(store)
        last = _last_of(segments, State(op_count, ops_digest))
        pieces = tuple(segment.piece for segment in segments[: last + 1])
        found = segments[last]
        if found.kind == _LABEL:
            return cls(block_size, None, None, pieces)
        known = sum(len(piece.digests) for piece in pieces)
        # So many digests are in the file: a size that is made up must not make us allocate.
        if not 0 < found.target_blocks <= known:
            raise CowError(
                f"digests table: {known} digests for a target of {found.target_blocks} blocks", statement="COW-216"
            )
        return cls(block_size, found.target_blocks * block_size, found.target_digest, pieces)

    @property
    def is_final(self) -> bool:
        """Whether it has every block of the target."""
        return self.target_bytes is not None

    def dense(self, target_blocks: int) -> _Digests:
        """One digest a block, 0 where it is not known; EBADMSG when the table is final and not what it says."""
        dense = _dense(self.pieces, target_blocks)
        if self.target_bytes == target_blocks * self.block_size and _whole(dense) != self.target_digest:
            raise CowError("digests table: its blocks do not give its whole", statement="COW-216")
        return dense


class DigestLog:
    """Writes a table while its COW is being written."""

    def __init__(self, store: Store, block_size: int) -> None:
        self._store = store
        self.block_size = block_size
        self._pieces: list[_Piece] = []
        self._runs: list[list[int]] = []
        self._pending = array("Q")
        self._end = _HEAD_SIZE
        self._chain = 0

    @classmethod
    def create(cls, store: Store, *, block_size: int) -> "DigestLog":
        """An empty log in place of whatever `store` had; durable, so that it cannot vouch for a COW that is to come."""
        log = cls(store, block_size)
        head = _HEAD.pack(MAGIC, _VERSION, block_size, 0)
        log._chain = xxhash.xxh3_64_intdigest(head)
        store.truncate(0)
        store.write(head + _CHECKSUM.pack(log._chain), 0)
        store.flush()
        return log

    @classmethod
    def reopen(cls, store: Store, *, op_count: int, ops_digest: int) -> "DigestLog":
        """The log of a COW that is cut back to these ops: all later states are removed, durably.

        EBADMSG (COW-216) when the log does not have this state; then nothing is changed.
        """
        block_size, segments = _read(store)
        last = _last_of(segments, State(op_count, ops_digest))
        log = cls(store, block_size)
        log._pieces = [segment.piece for segment in segments[: last + 1]]
        log._end, log._chain = segments[last].end, segments[last].checksum
        store.truncate(log._end)
        store.flush()
        return log

    def put(self, block: int, digests: "Sequence[int] | _Digests") -> None:
        """Digests of the blocks from `block` on; a later one for the same block wins."""
        if isinstance(digests, np.ndarray):
            self._pending.frombytes(np.ascontiguousarray(digests, dtype="<u8").data.cast("B"))
        else:
            self._pending.extend(digests)
        if self._runs and sum(self._runs[-1]) == block:
            self._runs[-1][1] += len(digests)
        elif len(digests):
            self._runs.append([block, len(digests)])

    def commit(self, *, op_count: int, ops_digest: int, label: int) -> None:
        """Close the state of a label, durably."""
        self._append(_LABEL, label, State(op_count, ops_digest), 0, bytes(16))

    def finish(self, *, op_count: int, ops_digest: int, target_blocks: int) -> None:
        """Close the state of the end, durably; `CowError` when a target block is not known."""
        dense = _dense([*self._pieces, self._pending_piece()], target_blocks)
        if not dense.all():
            raise CowError(
                f"digests table: block {int((dense == 0).argmax())} of the target is not known", statement="COW-216"
            )
        self._append(_END, 0, State(op_count, ops_digest), target_blocks, _whole(dense))

    def _append(self, kind: int, label: int, state: State, target_blocks: int, target_digest: bytes) -> None:
        piece = self._pending_piece()
        head = _SEGMENT.pack(
            *(kind, len(piece.runs), label, *state, target_blocks, target_digest),
            *(len(piece.digests), self._chain),
        )
        hasher = xxhash.xxh3_64()
        # Part by part: a table of a large image is not to be held twice.
        for part in (head, piece.runs.tobytes(), piece.digests.view(np.uint8).data):
            if len(part):
                self._store.write(part, self._end)
                self._end += len(part)
                hasher.update(part)
        self._chain = hasher.intdigest()
        self._store.write(_CHECKSUM.pack(self._chain), self._end)
        self._end += _CHECKSUM.size
        self._store.flush()
        self._pieces.append(piece)
        self._runs, self._pending = [], array("Q")

    def _pending_piece(self) -> _Piece:
        return _Piece(np.array(self._runs, dtype="<u4").reshape(-1, 2), np.frombuffer(self._pending, dtype="<u8"))


def block_digest(block: Buffer) -> int:
    """xxh3-64 of one block; never 0, which stands for "not known"."""
    return xxhash.xxh3_64_intdigest(block) or 1


def load_digests(cow_path: str | os.PathLike[str], cow: "CowFile") -> DigestTable | None:
    """The table beside a COW, for the ops that `cow` has; None where there is none.

    EBADMSG (COW-216) when it is damaged, of another block size or made for other ops.
    """
    path = table_path(cow_path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapdError.from_os(error, f"open {path}") from error
    try:
        table = DigestTable.load(FileStore(fd, path), op_count=cow.op_count, ops_digest=cow.ops_digest)
    finally:
        os.close(fd)
    if table.block_size != cow.header.block_size:
        raise CowError(
            f"{path}: for blocks of {table.block_size} bytes, the COW has {cow.header.block_size}", statement="COW-216"
        )
    return table


def table_path(cow_path: str | os.PathLike[str]) -> str:
    """Where the table of a COW lies, whatever name the COW goes by."""
    return os.path.realpath(cow_path) + SUFFIX


def table_size(target_blocks: int) -> int:
    """Bytes of the table of a COW without labels: one segment of one run."""
    return _HEAD_SIZE + _SEGMENT.size + 8 + 8 * target_blocks + _CHECKSUM.size


def _read(store: Store) -> tuple[int, list[_Segment]]:
    """The block size, and all whole segments."""
    size = store.size()
    head = read_bytes(store, 0, min(size, _HEAD_SIZE))
    if len(head) < _HEAD_SIZE or not head.startswith(MAGIC):
        raise CowError("not a digests table", statement="COW-216", offset=0)
    _, version, block_size, _ = _HEAD.unpack_from(head)
    (chain,) = _CHECKSUM.unpack_from(head, _HEAD.size)
    if chain != xxhash.xxh3_64_intdigest(head[: _HEAD.size]) or version != _VERSION:
        raise CowError("digests table: its header is damaged", statement="COW-216", offset=0)
    segments: list[_Segment] = []
    while (segment := _read_segment(store, size, segments[-1] if segments else None, chain)) is not None:
        segments.append(segment)
    return block_size, segments


def _read_segment(store: Readable, size: int, before: _Segment | None, head_checksum: int) -> _Segment | None:
    """The next segment of the log; None where it is not whole."""
    start, chain = (_HEAD_SIZE, head_checksum) if before is None else (before.end, before.checksum)
    if start + _SEGMENT.size > size:
        return None
    fields = _SEGMENT.unpack(read_bytes(store, start, _SEGMENT.size))
    kind, runs, _, op_count, ops_digest, target_blocks, target_digest, digests, previous = fields
    body = _SEGMENT.size + 8 * runs + 8 * digests
    # Sizes are believed only as far as the file goes: a damaged one must not make us allocate.
    if kind not in (_LABEL, _END) or previous != chain or start + body + _CHECKSUM.size > size:
        return None
    raw = read_bytes(store, start, body + _CHECKSUM.size)
    (checksum,) = _CHECKSUM.unpack_from(raw, body)
    if checksum != xxhash.xxh3_64_intdigest(memoryview(raw)[:body]):
        return None
    table = np.frombuffer(raw, dtype="<u4", count=2 * runs, offset=_SEGMENT.size).reshape(-1, 2)
    values = np.frombuffer(raw, dtype="<u8", count=digests, offset=_SEGMENT.size + 8 * runs)
    if int(table[:, 1].sum(dtype=np.uint64)) != digests:
        return None
    end = start + body + _CHECKSUM.size
    return _Segment(
        kind, State(op_count, ops_digest), target_blocks, target_digest, _Piece(table, values), end, checksum
    )


def _last_of(segments: list[_Segment], state: State) -> int:
    """The index of the last segment that closes `state`."""
    for i in reversed(range(len(segments))):
        if segments[i].state == state:
            return i
    raise CowError(
        f"digests table: made for other ops than the {state.op_count} of this COW, or damaged; it has the states of "
        + (", ".join(str(segment.state.op_count) for segment in segments[-4:]) or "no")
        + " ops",
        statement="COW-216",
    )


def _dense(pieces: "Sequence[_Piece]", target_blocks: int) -> _Digests:
    dense = np.zeros(target_blocks, dtype=np.uint64)
    for runs, digests in pieces:
        at = 0
        for first in range(0, len(runs), _RUNS_AT_ONCE):
            for block, length in runs[first : first + _RUNS_AT_ONCE].tolist():
                known = digests[at : at + max(0, min(length, target_blocks - block))]
                dense[block : block + len(known)] = known
                at += length
    return dense


def _whole(dense: _Digests) -> bytes:
    return xxhash.xxh3_128_digest(dense.data)

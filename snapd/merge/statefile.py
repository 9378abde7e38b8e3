"""The state file: one sector that says how far a merge is, and the truth about it (UNDO-8, UNDO-12 f, UNDO-29).

One 512-byte sector is written whole or not at all (UNDO-27), so the record is the old one or the new one. Empty or
all zeros means that nothing has begun; anything else that does not check out is damage, never "nothing".

Layout (little-endian): magic "SNAPDMST", u32 version, u32 phase, snapshot UUID, then as u64 generation, undo
generation, next block, undo op count, O's bytes, N's bytes, then u32 read-back, then the digests of O's and of N's
target blocks (16 bytes each); crc32 of bytes 0..507 at 508.
"""

import errno
import struct
import uuid
import zlib
from dataclasses import dataclass
from enum import IntEnum

from snapd.block.bio import SECTOR_BYTES
from snapd.block.errors import SnapdError
from snapd.block.store import Store, read_bytes

DIGEST_SIZE = 16

_MAGIC = b"SNAPDMST"
_VERSION = 1
_RECORD = struct.Struct("<8sII16s6QI16s16s")
_CRC = struct.Struct("<I")
_BODY_BYTES = SECTOR_BYTES - _CRC.size


class Phase(IntEnum):
    """Where a reversible snapshot is (section 2 of the specification); before MERGING there is no record."""

    MERGING = 1
    MERGED = 2
    ROLLING_BACK = 3
    ROLLED_BACK = 4
    CONFIRMED = 5


class ReadBack(IntEnum):
    """What is known of N on the base (UNDO-9)."""

    PENDING = 0
    OK = 1
    FAILED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One durable record.

    `generation` changes with every change of direction and binds `next_block` and `read_back` to it (UNDO-12a);
    `undo_generation` is the one in which the undo store was made. Every changed block below `next_block` is done and
    flushed in the direction of `phase`. At least `undo_op_count` ops of the undo store are durable. The digests
    (`snapd.cow.history`) are known once `read_back` is OK.
    """

    snapshot: uuid.UUID
    generation: int
    undo_generation: int
    phase: Phase
    next_block: int
    undo_op_count: int
    old_size_bytes: int
    new_size_bytes: int
    read_back: ReadBack = ReadBack.PENDING
    old_digest: bytes = bytes(DIGEST_SIZE)
    new_digest: bytes = bytes(DIGEST_SIZE)

    @property
    def needs_undo(self) -> bool:
        """Whether both views depend on the undo store now."""
        return self.phase in (Phase.MERGING, Phase.MERGED, Phase.ROLLING_BACK)

    def pack(self) -> bytes:
        """The sector."""
        body = _RECORD.pack(
            _MAGIC,
            _VERSION,
            self.phase,
            self.snapshot.bytes,
            self.generation,
            self.undo_generation,
            self.next_block,
            self.undo_op_count,
            self.old_size_bytes,
            self.new_size_bytes,
            self.read_back,
            self.old_digest,
            self.new_digest,
        ).ljust(_BODY_BYTES, b"\0")
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, sector: bytes) -> "State":
        """EBADMSG unless the sector is a whole record of this version."""
        body, (crc,) = sector[:_BODY_BYTES], _CRC.unpack_from(sector, _BODY_BYTES)
        magic, version, phase, snapshot, *numbers, read_back, old_digest, new_digest = _RECORD.unpack_from(body)
        if magic != _MAGIC or crc != zlib.crc32(body):
            raise SnapdError(errno.EBADMSG, "merge state: the record is damaged (UNDO-29)")
        if version != _VERSION:
            raise SnapdError(errno.EOPNOTSUPP, f"merge state: version {version} is not supported, only {_VERSION}")
        generation, undo_generation, next_block, undo_op_count, old_size_bytes, new_size_bytes = numbers
        return cls(
            snapshot=uuid.UUID(bytes=snapshot),
            generation=generation,
            undo_generation=undo_generation,
            phase=Phase(phase),
            next_block=next_block,
            undo_op_count=undo_op_count,
            old_size_bytes=old_size_bytes,
            new_size_bytes=new_size_bytes,
            read_back=ReadBack(read_back),
            old_digest=old_digest,
            new_digest=new_digest,
        )


def read_state(store: Store) -> State | None:
    """The record; None before anything has begun. EBADMSG for damage."""
    size = store.size()
    sector = read_bytes(store, 0, min(size, SECTOR_BYTES)).ljust(SECTOR_BYTES, b"\0")
    return State.unpack(sector) if any(sector) else None


def write_state(store: Store, state: State) -> None:
    """Make `state` the durable record."""
    store.write(state.pack(), 0)
    store.flush()

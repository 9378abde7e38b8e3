"""The undo store's side table: whose store it is, and the digests that every read of it is checked against (UNDO-15).

One fixed-size entry an op, at a place that follows from the op's index: an append that was torn damages nothing but
ops that do not count yet. Entries at or past the store's op count mean nothing.

File layout (little-endian), beside the undo store as `<name>.digests`:

    0   8  magic "SNAPDUND"          32  8  generation of the store
    8   4  version, 1                40  8  xxh3-64 of the op records of C
    12  4  zero                      48  8  size of O, bytes
    16 16  snapshot UUID             56  4  crc32 of bytes 0..55
    64 + 24*i  8  xxh3-64 of the decoded unit of op i (a zero op's unit is its zeros)
               8  xxh3-64 of the 16-byte op record
               4  crc32 of these 16 bytes, then 4 zero
"""

import errno
import struct
import uuid
import zlib
from dataclasses import dataclass

import xxhash

from snapd.block.errors import SnapdError
from snapd.block.store import Buffer, Store, read_bytes

SUFFIX = ".digests"
MAGIC = b"SNAPDUND"
TABLE_START = 64
ENTRY_SIZE = 24

_HEAD = struct.Struct("<8sI4x16sQQQ")
_CRC = struct.Struct("<I")
_DIGESTS = struct.Struct("<QQ")
_ENTRY = struct.Struct("<QQI4x")


@dataclass(frozen=True, slots=True)
class UndoIdentity:
    """What an undo store belongs to: nothing else may be undone with it."""

    snapshot: uuid.UUID
    generation: int
    ops_digest: int
    old_size_bytes: int

    def pack(self) -> bytes:
        """The table's first `TABLE_START` bytes."""
        head = _HEAD.pack(MAGIC, 1, self.snapshot.bytes, self.generation, self.ops_digest, self.old_size_bytes)
        return (head + _CRC.pack(zlib.crc32(head))).ljust(TABLE_START, b"\0")

    @classmethod
    def read(cls, table: Store) -> "UndoIdentity":
        """From the table's start; EBADMSG when it is missing or damaged, never "empty"."""
        if table.size() < TABLE_START:
            raise SnapdError(errno.EBADMSG, f"undo digests: only {table.size()} bytes long (UNDO-15)")
        raw = read_bytes(table, 0, TABLE_START)
        magic, version, snapshot, generation, ops_digest, old_size_bytes = _HEAD.unpack_from(raw)
        (crc,) = _CRC.unpack_from(raw, _HEAD.size)
        if (magic, version) != (MAGIC, 1) or crc != zlib.crc32(raw[: _HEAD.size]):
            raise SnapdError(errno.EBADMSG, "undo digests: damaged, or not the table of an undo store (UNDO-15)")
        return cls(uuid.UUID(bytes=snapshot), generation, ops_digest, old_size_bytes)


def pack_entry(unit: Buffer, record: bytes) -> bytes:
    """The entry of an op with this decoded unit and this record."""
    digests = _DIGESTS.pack(xxhash.xxh3_64_intdigest(unit), xxhash.xxh3_64_intdigest(record))
    return digests + _CRC.pack(zlib.crc32(digests)) + bytes(4)


def unit_digest_if_whole(entries: bytes, at: int, record: bytes) -> int | None:
    """The unit's digest from the entry at byte `at`; None unless the entry is whole and vouches for `record`."""
    unit, of_record, crc = _ENTRY.unpack_from(entries, at)
    if crc != zlib.crc32(entries[at : at + _DIGESTS.size]) or of_record != xxhash.xxh3_64_intdigest(record):
        return None
    return int(unit)

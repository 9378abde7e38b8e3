"""Digests tables byte by byte, from the format's own page: made for any COW, and read a second way."""

import struct
from dataclasses import dataclass, field

import xxhash

LABEL, END = 1, 2


@dataclass(slots=True)
class Segment:
    """One segment; what is None follows from the rest."""

    kind: int
    op_count: int
    ops_digest: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    target_blocks: int = 0
    label: int = 0
    target_digest: bytes | None = None
    run_count: int | None = None
    digest_count: int | None = None
    chain: int | None = None


def build_table(block_size: int, segments: list[Segment], *, version: int = 1) -> bytes:
    """A table whose checksums are all right, whatever its segments say."""
    head = struct.pack("<8sIIQ", b"SNAPDDIG", version, block_size, 0)
    chain = xxhash.xxh3_64_intdigest(head)
    out = head + struct.pack("<Q", chain)
    for one in segments:
        whole = one.target_digest
        if whole is None:
            whole = whole_digest(one.digests) if one.kind == END else bytes(16)
        segment = struct.pack(
            "<IIQQQQ16sQQ",
            one.kind & 0xFFFFFFFF,
            len(one.runs) if one.run_count is None else one.run_count,
            one.label,
            one.op_count,
            one.ops_digest,
            one.target_blocks,
            whole,
            len(one.digests) if one.digest_count is None else one.digest_count,
            chain if one.chain is None else one.chain,
        )
        segment += b"".join(struct.pack("<II", *run) for run in one.runs)
        segment += struct.pack(f"<{len(one.digests)}Q", *one.digests)
        chain = xxhash.xxh3_64_intdigest(segment)
        out += segment + struct.pack("<Q", chain)
    return out


def block_digest(block: bytes) -> int:
    """What a table has for a block."""
    return xxhash.xxh3_64_intdigest(block) or 1


@dataclass(slots=True)
class Table:
    """What a table says of one state of a COW; `digests` by block, without those that are not known."""

    block_size: int
    target_blocks: int | None
    target_digest: bytes
    digests: dict[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether the digests are those that its end was closed with."""
        if self.target_blocks is None:
            return True
        return whole_digest([self.digests.get(block, 0) for block in range(self.target_blocks)]) == self.target_digest


def read_table(raw: bytes, *, op_count: int, ops_digest: int) -> Table | None:
    """The table for these ops; None where it has none."""
    if len(raw) < 32 or raw[:8] != b"SNAPDDIG":
        return None
    version, block_size = struct.unpack_from("<II", raw, 8)
    (chain,) = struct.unpack_from("<Q", raw, 24)
    if chain != xxhash.xxh3_64_intdigest(raw[:24]) or version != 1:
        return None
    at = 32
    digests: dict[int, int] = {}
    found: Table | None = None
    known = 0
    while at + 72 <= len(raw):
        kind, runs, _, count, ops, blocks, whole, values, before = struct.unpack_from("<IIQQQQ16sQQ", raw, at)
        end = at + 72 + 8 * runs + 8 * values
        if kind not in (LABEL, END) or before != chain or end + 8 > len(raw):
            break
        (checksum,) = struct.unpack_from("<Q", raw, end)
        listed = [struct.unpack_from("<II", raw, at + 72 + 8 * index) for index in range(runs)]
        if checksum != xxhash.xxh3_64_intdigest(raw[at:end]) or sum(length for _, length in listed) != values:
            break
        values_at = at + 72 + 8 * runs
        for block, length in listed:
            for index in range(length):
                (digests[block + index],) = struct.unpack_from("<Q", raw, values_at)
                values_at += 8
        known += values
        if (count, ops) == (op_count, ops_digest):
            enough = kind == LABEL or 0 < blocks <= known
            found = Table(block_size, blocks if kind == END else None, whole, dict(digests)) if enough else None
        at, chain = end + 8, checksum
    if found is not None:
        found.digests = {block: digest for block, digest in found.digests.items() if digest}
    return found


def whole_digest(digests: list[int]) -> bytes:
    """The digest of a whole target."""
    return xxhash.xxh3_128_digest(struct.pack(f"<{len(digests)}Q", *digests))

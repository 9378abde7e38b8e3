"""The undo store: appended in three steps, read with every digest checked, damaged loudly and narrowly."""

import errno
import os
import uuid
from pathlib import Path
from random import Random

import pytest
from zeromap import zero_map

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.format import OP_SIZE_V3, OpType
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.view import CowView
from snapd.cow.op import Op
from snapd.cow.parse.reader import CowFile
from snapd.merge.undostore import UndoStore
from snapd.merge.undotable import ENTRY_SIZE, SUFFIX, TABLE_START, UndoIdentity
from snapd.merge.undowriter import UndoWriter

BLOCK = 4096
BLOCKS = 100
IDENTITY = UndoIdentity(uuid.UUID(int=3), 1, 0x1234, BLOCKS * BLOCK)


def targets(without: frozenset[int] = frozenset()) -> ExtentMap:
    changed = {block for block in range(BLOCKS) if block not in without}
    return zero_map(changed, BLOCKS, ops_digest=IDENTITY.ops_digest)


class Fixture:
    """An empty undo store on a simulated disk, and an old image to save."""

    def __init__(self, seed: int = 0, without: frozenset[int] = frozenset()) -> None:
        random = Random(seed)
        self.disk = SimDisk(random)
        self.image = [bytes(BLOCK) if b % 10 == 7 else random.randbytes(64) * 64 for b in range(BLOCKS)]
        self.targets = targets(without)
        self.store, self.table = self.disk.store("u"), self.disk.store("u.digests")
        self.writer = UndoWriter.create(self.store, self.table, IDENTITY, self.targets)

    def append(self, start: int, end: int) -> None:
        self.writer.append(start, b"".join(self.image[start:end]))

    def save(self, start: int, end: int) -> None:
        self.append(start, end)
        self.writer.flush()
        self.writer.commit()

    def reader(self) -> UndoStore:
        undo = UndoStore(self.store, self.table, self.targets)
        undo.load(undo.header.op_count)
        return undo

    def flip(self, store: SimStore, at: int) -> None:
        byte = read_bytes(store, at, 1)
        store.write(bytes([byte[0] ^ 0x10]), at)

    def failing(self, undo: UndoStore) -> list[int]:
        """Blocks that must not come from the base and cannot come from U; every other one is checked."""
        failing = []
        for block in range(BLOCKS):
            if undo.next_saved(block, block + 1) > block:
                continue
            try:
                assert read_bytes(undo, block * BLOCK, BLOCK) == self.image[block]
            except SnapdError as error:
                if error.errno != errno.EBADMSG:
                    raise
                failing.append(block)
        return failing


def test_saved_blocks_read_back_and_others_are_lacking() -> None:
    """UNDO-1, UNDO-3: what was appended reads as O; nothing else is claimed."""
    f = Fixture()
    f.save(3, 40)
    f.save(55, 56)
    undo = f.reader()
    assert [b for b in range(BLOCKS) if undo.next_saved(b, b + 1) == b] == [*range(3, 40), 55]
    assert undo.saved_blocks() == 38
    assert f.failing(undo) == []
    assert read_bytes(undo, 3 * BLOCK + 100, 30 * BLOCK) == b"".join(f.image)[3 * BLOCK + 100 :][: 30 * BLOCK]
    assert (undo.next_saved(40, 60), undo.next_lacking(3, 60), undo.next_saved(56, 60)) == (55, 40, 60)


def test_it_is_a_plain_cow_file() -> None:
    """UNDO-1, UNDO-18: parsed as any v3 file; only replace and zero ops, ascending, zeros without payload."""
    f = Fixture()
    f.save(0, 30)
    f.save(30, 31)
    cow = CowFile.parse(f.store)
    assert set(cow.ops.type.tolist()) == {OpType.REPLACE, OpType.ZERO}
    assert cow.ops.new_block.tolist() == sorted(cow.ops.new_block.tolist())
    assert [b for b, t in zip(cow.ops.new_block, cow.ops.type, strict=True) if t == OpType.ZERO] == [7, 17, 27]
    assert cow.header.num_merge_ops == 0
    assert cow.header.op_count_max == BLOCKS
    assert int(cow.ops.blocks.max()) == 8, "a run of nine is a unit of eight and one of one"
    base = SimDisk(Random(1)).store("base", b"N" * BLOCKS * BLOCK)
    view = CowView(cow.extent_map(BLOCKS * BLOCK), f.store, source=base, base=base)
    assert read_bytes(view, 0, 31 * BLOCK) == b"".join(f.image[:31])


def test_the_slots_are_the_targets_below_the_end_of_o() -> None:
    """UNDO-18: `op_count_max` is fixed at creation, and one op more is refused."""
    f = Fixture(without=frozenset(range(2, BLOCKS)))
    assert f.writer.index.header.op_count_max == 2
    f.image = [os.urandom(BLOCK) for _ in range(BLOCKS)]
    f.append(0, 1)
    f.append(1, 2)
    with pytest.raises(SnapdError) as caught:
        f.append(2, 3)
    assert caught.value.errno == errno.ENOSPC


def test_appended_ops_do_not_count_before_commit() -> None:
    """UNDO-12 a, b: a reader sees them only when the header counts them; a new writer overwrites them."""
    f = Fixture()
    f.save(0, 5)
    f.append(5, 20)
    f.writer.flush()
    assert f.reader().saved_blocks() == 5
    f.writer = UndoWriter(f.store, f.table, f.targets)
    f.save(10, 12)
    undo = f.reader()
    assert [b for b in range(BLOCKS) if undo.next_saved(b, b + 1) == b] == [0, 1, 2, 3, 4, 10, 11]
    assert f.failing(undo) == []
    CowFile.parse(f.store)


def test_a_reader_adds_what_is_new() -> None:
    """UNDO-25: loading more keeps what is known and adds the rest."""
    f = Fixture()
    f.save(0, 5)
    undo = UndoStore(f.store, f.table, f.targets)
    undo.load(0)
    assert undo.saved_blocks() == 0
    undo.load(undo.stored_op_count())
    f.save(50, 90)
    assert undo.saved_blocks() == 5
    undo.load(undo.stored_op_count())
    assert undo.saved_blocks() == 45
    undo.load(1)
    assert undo.saved_blocks() == 45
    assert f.failing(undo) == []


def test_a_damaged_payload_fails_exactly_its_op() -> None:
    """UNDO-15: the unit's digest is checked at every read; the ops around it stay readable."""
    f = Fixture()
    f.save(0, 40)
    undo = f.reader()
    _, op = undo._op_of(8)
    for at in (op.source, op.source + op.data_length - 1):
        f.flip(f.store, at)
        damaged = f.reader()
        assert f.failing(damaged) == list(range(op.new_block, op.new_block + op.blocks))
        assert damaged.damaged_ops == 0
        f.flip(f.store, at)


@pytest.mark.parametrize("index", [0, 3, 6])
@pytest.mark.parametrize("part", ["record", "entry"])
def test_a_damaged_record_or_entry_fails_its_op_and_is_never_taken_for_lacking(index: int, part: str) -> None:
    """UNDO-12a, UNDO-15: between whole neighbours exactly the op's blocks fail, in U as far as T goes."""
    f = Fixture()
    f.save(0, 40)
    op = Op.unpack(bytes(f.reader()._ops), index * OP_SIZE_V3)
    if part == "record":
        f.flip(f.store, f.reader().header.ops_start + index * 16 + 5)
    else:
        f.flip(f.table, TABLE_START + index * ENTRY_SIZE + 3)
    undo = f.reader()
    assert undo.damaged_ops == 1
    assert f.failing(undo) == list(range(op.new_block, op.new_block + op.blocks))


def test_a_damaged_last_op_hides_every_target_behind_it() -> None:
    """UNDO-15: where its blocks lie is not known, so no target there is believed; blocks outside T are free."""
    f = Fixture(without=frozenset({60, 61}))
    f.save(0, 2)
    f.save(50, 51)
    f.flip(f.table, TABLE_START + f.reader().op_count * ENTRY_SIZE - ENTRY_SIZE)
    assert f.failing(f.reader()) == [*range(2, 60), *range(62, BLOCKS)]


def test_a_damaged_store_does_not_grow() -> None:
    """Behind a damaged op the end of the payloads is not known: appending could overwrite them."""
    f = Fixture()
    f.save(0, 2)
    f.flip(f.table, TABLE_START)
    writer = UndoWriter(f.store, f.table, f.targets)
    with pytest.raises(SnapdError, match="cannot grow"):
        writer.append(5, f.image[5])


@pytest.mark.parametrize("which", ["table head", "table cut", "store cut", "store magic", "no table"])
def test_a_damaged_or_missing_part_is_never_empty(which: str) -> None:
    """UNDO-15: a missing or foreign store or table is damage."""
    f = Fixture()
    f.save(0, 40)
    table, store = f.table, f.store
    if which == "table head":
        f.flip(table, 20)
    elif which == "table cut":
        table = f.disk.store("cut", read_bytes(table, 0, TABLE_START + 5))
    elif which == "store cut":
        store = f.disk.store("cut", read_bytes(store, 0, 160))
    elif which == "store magic":
        f.flip(store, 0)
    else:
        table = f.disk.store("none")
    with pytest.raises(SnapdError):
        UndoStore(store, table, f.targets).load(f.writer.op_count)


def test_more_ops_than_slots_are_damage() -> None:
    """A count from elsewhere is checked before anything is read for it."""
    f = Fixture()
    with pytest.raises(SnapdError) as caught:
        f.reader().load(BLOCKS + 1)
    assert caught.value.errno == errno.EBADMSG


def test_it_opens_by_path_and_by_directory(tmp_path: Path) -> None:
    """By path, or relative to a directory descriptor; a missing half is EBADMSG."""
    f = Fixture()
    f.save(0, 4)
    path = tmp_path / "undo.cow"
    path.write_bytes(read_bytes(f.store, 0, f.store.size()))
    with pytest.raises(SnapdError) as caught:
        UndoStore.open(str(path))
    assert caught.value.errno == errno.EBADMSG
    Path(str(path) + SUFFIX).write_bytes(read_bytes(f.table, 0, f.table.size()))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for undo in (UndoStore.open(str(path)), UndoStore.open("undo.cow", dir_fd=directory)):
            undo.load(undo.stored_op_count())
            assert undo.identity == IDENTITY
            assert read_bytes(undo, 0, 4 * BLOCK) == b"".join(f.image[:4])
            undo.close()
    finally:
        os.close(directory)


def test_incompressible_and_unaligned_runs_on_a_real_file(tmp_path: Path) -> None:
    """Raw payloads, units up to 64 KiB, and reads at any byte."""
    image = os.urandom(BLOCKS * BLOCK)
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("u", "u.digests")]
    try:
        writer = UndoWriter.create(FileStore(fds[0]), FileStore(fds[1]), IDENTITY, targets())
        writer.append(1, image[BLOCK : 70 * BLOCK])
        writer.flush()
        writer.commit()
        undo = UndoStore(FileStore(fds[0]), FileStore(fds[1]))
        undo.load(writer.op_count)
        for start, length in ((BLOCK, 69 * BLOCK), (BLOCK + 1, 5), (17 * BLOCK - 3, 7), (40000, 200000)):
            assert read_bytes(undo, start, length) == image[start : start + length]
    finally:
        for fd in fds:
            os.close(fd)

"""The old image from base and undo store, at every moment of a merge and never wrong."""

import contextlib
import errno
import os
import uuid
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import WritableBuffer
from snapd.cow.compress import CompressOption
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.parse.reader import CowFile
from snapd.cow.verbs.create import create_cow
from snapd.merge.extract_old import extract_old, is_undo_store
from snapd.merge.statefile import Phase, State
from snapd.merge.undostore import UndoStore
from snapd.merge.undotable import SUFFIX, UndoIdentity
from snapd.merge.undowriter import UndoWriter

BLOCKS = 600
OLD = Random(1).randbytes(BLOCKS * BLOCK_SIZE)
NEW = Random(2).randbytes(BLOCKS * BLOCK_SIZE)


class Merging:
    """A merge that is taken forward by hand: save some blocks, then overwrite them."""

    def __init__(self, folder: Path) -> None:
        (folder / "base").write_bytes(OLD)
        (folder / "new").write_bytes(NEW)
        options = CreateOptions(compression=CompressOption.parse("lz4"))
        create_cow(folder / "base", folder / "new", folder / "cow", options, lambda *_: None)
        self._closing = contextlib.ExitStack()
        self.base = self._open(folder / "base")
        extent_map = CowFile.parse(self._open(folder / "cow")).extent_map(len(OLD))
        identity = UndoIdentity(uuid.UUID(int=1), 1, extent_map.ops_digest, len(OLD))
        self.undo = UndoWriter.create(
            self._open(folder / "undo.cow"), self._open(folder / f"undo.cow{SUFFIX}"), identity, extent_map
        )
        self.done = 0

    def _open(self, path: Path) -> FileStore:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self._closing.callback(os.close, fd)
        return FileStore(fd, str(path))

    def go_on(self, blocks: int) -> None:
        """One span, in the order of the real merge: saved and counted first, overwritten then."""
        start, end = self.done * BLOCK_SIZE, min(self.done + blocks, BLOCKS) * BLOCK_SIZE
        self.undo.append(self.done, OLD[start:end])
        self.undo.flush()
        self.undo.commit()
        self.base.write(NEW[start:end], start)
        self.done = min(self.done + blocks, BLOCKS)

    def close(self) -> None:
        self._closing.close()


def quiet(_done: int, _total: int) -> None:
    """Progress nobody looks at."""


def extract(folder: Path, size: int | None = None) -> bytes:
    """The old image by way of a file."""
    extract_old(folder / "undo.cow", folder / "base", folder / "out", size, quiet)
    return (folder / "out").read_bytes()


def test_a_store_with_fewer_ops_than_were_durable_is_damage(tmp_path: Path) -> None:
    """UNDO-12a: an undo store put back from an older copy lacks blocks that were overwritten since."""
    merging = Merging(tmp_path)
    merging.go_on(100)
    state = State(
        snapshot=uuid.UUID(int=1),
        generation=1,
        undo_generation=1,
        phase=Phase.MERGING,
        next_block=100,
        undo_op_count=merging.undo.op_count,
        old_size_bytes=len(OLD),
        new_size_bytes=len(NEW),
    )
    state_path = tmp_path / "state"
    state_path.write_bytes(state.pack())
    assert extract(tmp_path) == OLD
    state_path.write_bytes(replace(state, undo_op_count=merging.undo.op_count + 1).pack())
    with pytest.raises(SnapdError, match="were durable") as caught:
        extract(tmp_path)
    assert caught.value.errno == errno.EBADMSG
    merging.close()


def test_old_image_at_every_stage(tmp_path: Path) -> None:
    """UNDO-3: before, in the middle of and after the merge it is the same old image."""
    merging = Merging(tmp_path)
    with contextlib.closing(merging):
        assert is_undo_store(tmp_path / "undo.cow")
        assert not is_undo_store(tmp_path / "cow")
        for _ in range(4):
            assert extract(tmp_path) == OLD
            merging.go_on(200)
        assert (tmp_path / "base").read_bytes() == NEW
        assert extract(tmp_path, 7 * BLOCK_SIZE) == OLD[: 7 * BLOCK_SIZE]


@pytest.mark.parametrize("when", range(12))
def test_a_merge_that_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    """UNDO-25: blocks saved and overwritten between the look at the undo store and the read are read again."""
    merging = Merging(tmp_path)
    calls = 0
    read = FileStore.read_into

    def read_after_the_merge_went_on(store: FileStore, buffer: WritableBuffer, offset: int) -> None:
        nonlocal calls
        if store.name == str(tmp_path / "base"):
            calls += 1
            if calls % 12 == when:
                merging.go_on(130)
        read(store, buffer, offset)

    with contextlib.closing(merging):
        monkeypatch.setattr(FileStore, "read_into", read_after_the_merge_went_on)
        assert extract(tmp_path) == OLD
        assert calls >= 1


@pytest.mark.parametrize("gone", ["removed", "replaced"])
def test_a_store_that_was_released_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """EAGAIN when the undo store is not the same any more at the end: nothing vouched for the base then."""
    merging = Merging(tmp_path)
    count = UndoStore.stored_op_count

    def released(undo: UndoStore) -> int:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp_path / "undo.cow")
        if gone == "replaced":
            (tmp_path / "undo.cow").write_bytes(b"another")
        return count(undo)

    with contextlib.closing(merging):
        merging.go_on(100)
        monkeypatch.setattr(UndoStore, "stored_op_count", released)
        with pytest.raises(SnapdError) as caught:
            extract(tmp_path)
    assert caught.value.errno == errno.EAGAIN
    assert not (tmp_path / "out").exists()


def test_a_damaged_unit_gives_no_image(tmp_path: Path) -> None:
    """UNDO-15: damage is an error, the base's new content is never taken instead."""
    merging = Merging(tmp_path)
    with contextlib.closing(merging):
        merging.go_on(100)
        with (tmp_path / "undo.cow").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\x55" * 50)
        with pytest.raises(SnapdError) as caught:
            extract(tmp_path)
    assert caught.value.errno == errno.EBADMSG
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["base", "undo.cow", f"undo.cow{SUFFIX}"])
def test_the_output_is_none_of_the_inputs(tmp_path: Path, out: str) -> None:
    """EINVAL, and the inputs stay."""
    merging = Merging(tmp_path)
    with contextlib.closing(merging):
        before = (tmp_path / out).read_bytes()
        with pytest.raises(SnapdError) as caught:
            extract_old(tmp_path / "undo.cow", tmp_path / "base", tmp_path / out, None, quiet)
        assert caught.value.errno == errno.EINVAL
        assert (tmp_path / out).read_bytes() == before


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    """UNDO-23: a base shorter than the old image, or more bytes than it had, are errors."""
    merging = Merging(tmp_path)
    with contextlib.closing(merging):
        with pytest.raises(SnapdError, match="of an old image of"):
            extract(tmp_path, len(OLD) + BLOCK_SIZE)
        (tmp_path / "short").write_bytes(b"x" * BLOCK_SIZE)
        with pytest.raises(SnapdError, match="the old image had"):
            extract_old(tmp_path / "undo.cow", tmp_path / "short", tmp_path / "out", None, quiet)


def test_a_count_that_is_read_half_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header read beside its write may show half of each count: only one that repeats is believed."""
    merging = Merging(tmp_path)
    count = UndoStore.stored_op_count
    calls = 0

    def torn(undo: UndoStore) -> int:
        nonlocal calls
        calls += 1
        return 0 if calls % 3 == 1 else count(undo)

    with contextlib.closing(merging):
        merging.go_on(300)
        monkeypatch.setattr(UndoStore, "stored_op_count", torn)
        assert extract(tmp_path) == OLD


def test_a_count_that_never_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is bounded: EAGAIN."""
    merging = Merging(tmp_path)
    counts = iter(range(100_000))
    with contextlib.closing(merging):
        monkeypatch.setattr(UndoStore, "stored_op_count", lambda _undo: next(counts))
        with pytest.raises(SnapdError) as caught:
            extract(tmp_path)
    assert caught.value.errno == errno.EAGAIN

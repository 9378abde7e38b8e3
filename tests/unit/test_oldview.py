"""The old view as a worker has it: over an undo directory, and light to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from merge_world import SNAPSHOT, World

from snapd.block.errors import SnapdError
from snapd.block.file import FileStore
from snapd.block.store import read_bytes
from snapd.merge.engine import Merge
from snapd.merge.oldview import OldView
from snapd.merge.statefile import Phase
from snapd.merge.undodir import UndoDirectory


class RealCase:
    """A random world on real files."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.world = World(seed, block_size=4096)
        (directory / "base").write_bytes(b"".join(self.world.old))
        (directory / "undo").mkdir()
        self.base_fd = os.open(directory / "base", os.O_RDWR)
        self.directory_fd = os.open(directory / "undo", os.O_RDONLY)
        self.base = FileStore(self.base_fd)
        self.files = UndoDirectory(self.directory_fd)
        self.shared = self.world.restored_map()

    def merge(self) -> None:
        state = Merge(
            snapshot=SNAPSHOT,
            extent_map=self.world.extent_map,
            cow=self.world.cow,
            base=self.base,
            files=self.files,
            shared=self.shared,
        ).run()
        assert state.phase is Phase.MERGED

    def close(self) -> None:
        self.files.close()
        os.close(self.base_fd)
        os.close(self.directory_fd)


@pytest.mark.parametrize("seed", range(10))
def test_it_opens_the_undo_store_when_there_is_something_in_it(tmp_path: Path, seed: int) -> None:
    """UNDO-3, UNDO-25: one view object is exact before, and after the merge published and overwrote."""
    case = RealCase(tmp_path, seed)
    view = OldView(case.base, case.directory_fd, case.shared, case.world.extent_map)
    wanted = b"".join(case.world.old)
    assert read_bytes(view, 0, len(wanted)) == wanted
    case.merge()
    assert read_bytes(view, 0, len(wanted)) == wanted
    for start, length in ((1, 1), (4095, 2), (len(wanted) - 3, 3), (100, len(wanted) - 200)):
        assert read_bytes(view, start, length) == wanted[start : start + length]
    if case.shared.undo_op_count:
        with pytest.raises(SnapdError, match="of an old image of"):
            read_bytes(view, 0, len(wanted) + 1)
    case.close()


def test_a_missing_undo_store_fails_reads_and_does_not_lie(tmp_path: Path) -> None:
    """UNDO-15: published ops whose store is gone are damage; the base is not believed."""
    case = RealCase(tmp_path, 1)
    case.merge()
    assert case.shared.undo_op_count
    os.unlink(tmp_path / "undo" / "undo.cow")
    view = OldView(case.base, case.directory_fd, case.shared, case.world.extent_map)
    with pytest.raises(SnapdError, match="missing"):
        read_bytes(view, 0, 4096)
    case.close()


def test_the_directory_goes_only_when_nothing_needs_it(tmp_path: Path) -> None:
    """UNDO-10, UNDO-14: refused while merging or merged; the undo store goes first, the state last."""
    case = RealCase(tmp_path, 1)
    case.merge()
    with pytest.raises(SnapdError, match="still needed"):
        case.files.remove()
    assert sorted(os.listdir(tmp_path / "undo")) == ["state", "undo.cow", "undo.cow.digests"]
    Merge(
        snapshot=SNAPSHOT,
        extent_map=case.world.extent_map,
        cow=case.world.cow,
        base=case.base,
        files=case.files,
        shared=case.shared,
    ).confirm()
    case.files.remove()
    assert os.listdir(tmp_path / "undo") == []
    case.close()


@pytest.mark.parametrize("module", ["oldview", "undostore", "sharedmap", "statefile", "undodir"])
def test_readers_start_without_numpy(module: str) -> None:
    """A worker imports these; numpy alone would cost it its start time."""
    code = f"import snapd.merge.{module}, sys; sys.exit('numpy' in sys.modules or 'asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0

"""The kept extent map: found again for the same COW, made anew for any other."""

import os
from pathlib import Path

import pytest
from zeromap import zero_map

from snapd.cow.image.extentmap import ExtentMap
from snapd.manager.keptmap import KeptMap

LONG_AGO_NS = 10**18


class Bench:
    """A COW that was written long ago, and how often its map has been made."""

    def __init__(self, directory: Path) -> None:
        self.kept = directory / "state"
        self.cow = directory / "update.cow"
        self.cow.write_bytes(b"a COW")
        self.made = 0

    def open(self, *about: object) -> ExtentMap:
        """As the service opens it; what comes from the file must be what was made."""
        with open(self.cow, "rb") as cow:
            kept = KeptMap(self.kept, cow.fileno(), str(self.cow), *about)
            fd, extent_map = kept.open(self._make)
        assert ExtentMap.load(fd).ops_digest == extent_map.ops_digest
        os.close(fd)
        return extent_map

    def _make(self) -> ExtentMap:
        self.made += 1
        return zero_map({1, 2}, 8, ops_digest=self.made)

    def files(self) -> list[Path]:
        return sorted(self.kept.iterdir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # What a file was written at, its status says, which no test can set back.
    monkeypatch.setattr("snapd.manager.keptmap._RACY_NS", -LONG_AGO_NS)
    return Bench(tmp_path)


def test_made_once(bench: Bench) -> None:
    assert [bench.open("sizes").ops_digest for _ in range(3)] == [1, 1, 1]
    assert len(bench.files()) == 1


def test_changed_cow_gets_a_new_map(bench: Bench) -> None:
    """The content, the size, another file of that name: each is another COW; the map of the last one goes."""
    bench.open()
    os.utime(bench.cow, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert bench.open().ops_digest == 2
    bench.cow.write_bytes(b"another COW")
    assert bench.open().ops_digest == 3
    copy = bench.cow.with_name("copy")
    copy.write_bytes(bench.cow.read_bytes())
    copy.rename(bench.cow)
    assert bench.open().ops_digest == 4
    assert len(bench.files()) == 1


def test_digests_and_sizes_belong_to_it(bench: Bench) -> None:
    """A table of digests that comes, changes or goes changes what a worker must compare."""
    table = bench.cow.with_name("update.cow.digests")
    bench.open(4096)
    assert bench.open(8192).ops_digest == 2
    table.write_bytes(b"a table")
    assert bench.open(8192).ops_digest == 3
    table.write_bytes(b"another table")
    assert bench.open(8192).ops_digest == 4
    table.unlink()
    assert bench.open(8192).ops_digest == 5


@pytest.mark.parametrize("damage", [b"", b"x", bytes(500)])
def test_damaged_map_is_made_anew(bench: Bench, damage: bytes) -> None:
    bench.open()
    bench.files()[0].write_bytes(damage)
    assert bench.open().ops_digest == 2
    assert bench.open().ops_digest == 2


def test_what_has_just_been_written_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another write in the same step of the clock would leave the same times."""
    monkeypatch.setattr("snapd.manager.keptmap._RACY_NS", LONG_AGO_NS)
    assert [bench.open().ops_digest for _ in range(2)] == [1, 2]
    assert bench.files() == []


def test_failed_parse_leaves_nothing(bench: Bench) -> None:
    def fail() -> ExtentMap:
        raise ValueError("no COW")

    with open(bench.cow, "rb") as cow, pytest.raises(ValueError, match="no COW"):
        KeptMap(bench.kept, cow.fileno(), str(bench.cow)).open(fail)
    assert not bench.kept.exists()

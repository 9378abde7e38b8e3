"""The durable records: what was saved is loaded, all of an update or nothing of it."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager.database import Database
from snapd.manager.records import DeviceRecord, ExportKind, ExportRecord, SnapshotRecord, UpdateRecord
from snapd.manager.reserve import Reserve
from snapd.manager.schema import VERSION, migrate
from snapd.manager.states import ReadBack, SnapshotState, UpdateState


def snapshot(snapshot_id: str, uuid: str) -> SnapshotRecord:
    return SnapshotRecord(
        id=snapshot_id,
        uuid=uuid,
        state=SnapshotState.MERGING,
        base_path="/base",
        cow_path="/cow",
        old_size_bytes=8192,
        new_size_bytes=12288,
        changed_bytes=4096,
        mapped=True,
        read_back=ReadBack.PENDING,
        failure="no space",
        export=ExportRecord(ExportKind.LOOP, "127.0.0.1:10809", Policy.FAIL_FAST, 5),
    )


def update(update_id: str, *snapshots: SnapshotRecord) -> UpdateRecord:
    return UpdateRecord(update_id, UpdateState.MERGING, 17, "why", snapshots)


def open_database(directory: Path) -> Database:
    return Database(str(directory / "state.db"), Reserve(str(directory / "reserve")))


def test_everything_comes_back(tmp_path: Path) -> None:
    first, second = update("a", snapshot("s", "1"), snapshot("r", "2")), update("b")
    database = open_database(tmp_path)
    database.save(first)
    database.save(second)
    database.close()
    assert open_database(tmp_path).load() == [first, second]


def device(device_id: str, size_bytes: int = 4096) -> DeviceRecord:
    export = ExportRecord(ExportKind.DM, "[::1]:9", Policy.FAIL_FAST, 0)
    return DeviceRecord(device_id, f"uuid of {device_id}", Route.WORKER, size_bytes, True, export, "/store")


def test_devices_come_back_and_go(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    database.save_device(device("b"))
    database.save_device(device("a"))
    database.save_device(device("b", size_bytes=8192))
    database.close()
    database = open_database(tmp_path)
    assert database.load_devices() == [device("a"), device("b", size_bytes=8192)]
    database.delete_device("a")
    assert database.load_devices() == [device("b", size_bytes=8192)]


def test_a_file_of_version_1_is_brought_to_this_one(tmp_path: Path) -> None:
    """Everything that was recorded is there, exported as it was before there was a choice."""
    path = str(tmp_path / "state.db")
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path, to=1)
    connection.execute("INSERT INTO updates VALUES ('a', 'MERGING', 17, 'why')")
    connection.execute(
        "INSERT INTO snapshots VALUES ('a', 0, 's', '1', 'MERGING', '/base', '/cow', 8192, 12288, 4096, 1, 'PENDING',"
        " 'no space')"
    )
    connection.close()
    database = open_database(tmp_path)
    expected = update("a", replace(snapshot("s", "1"), export=ExportRecord()))
    assert database.load() == [expected]
    assert database.load_devices() == []
    assert database._connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
    database.save(expected)
    database.save_device(device("a"))


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    """All or nothing: the former program can still use the file."""
    path = str(tmp_path / "state.db")
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path, to=1)
    connection.execute("CREATE TABLE devices (in_the_way TEXT)")
    connection.close()
    with pytest.raises(sqlite3.Error, match="devices"):
        open_database(tmp_path)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    columns = [row[1] for row in connection.execute("PRAGMA table_info(snapshots)")]
    assert "policy" not in columns
    connection.close()


def test_saving_again_replaces_the_update_and_its_snapshots(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    database.save(update("a", snapshot("s", "1"), snapshot("r", "2")))
    later = replace(update("a", snapshot("r", "2")), state=UpdateState.MERGED)
    database.save(later)
    assert database.load() == [later]


def test_a_failed_save_leaves_the_former_records(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    good = update("a", snapshot("s", "1"))
    database.save(good)
    with pytest.raises(SnapdError, match="record of update a was not written"):
        database.save(replace(good, state=UpdateState.MERGED, snapshots=(snapshot("s", "1"), snapshot("t", "1"))))
    assert database.load() == [good]


def test_writes_are_durable_before_they_are_acknowledged(tmp_path: Path) -> None:
    """UNDO-8: write-ahead log and a flush at every commit."""
    database = open_database(tmp_path)
    connection = database._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    open_database(tmp_path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SnapdError, match="schema version 99"):
        open_database(tmp_path)

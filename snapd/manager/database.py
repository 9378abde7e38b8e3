"""The durable records: one SQLite file (WAL, synchronous=FULL).

Invariant: an update and its snapshots are written in one transaction, so no crash shows one without the other. The
undo directory's state file is the truth about a merge; this file mirrors it (UNDO-29). A file of an older schema is
brought to ours in one transaction when it is opened (snapd/manager/schema.py).
"""

import errno
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from snapd.block.errors import SnapdError
from snapd.device.config import Policy, Route
from snapd.manager.records import DeviceRecord, ExportKind, ExportRecord, SnapshotRecord, UpdateRecord
from snapd.manager.reserve import Reserve
from snapd.manager.schema import migrate
from snapd.manager.states import ReadBack, SnapshotState, UpdateState

_EXPORT_COLUMNS = "export_kind, tcp_address, policy, attach_timeout_ms"
_SNAPSHOT_COLUMNS = (
    "id, uuid, state, base_path, cow_path, old_size_bytes, new_size_bytes, changed_bytes, mapped, read_back, failure, "
    + _EXPORT_COLUMNS
)
_DEVICE_COLUMNS = "id, uuid, route, size_bytes, read_only, store_path, " + _EXPORT_COLUMNS

_Cells = tuple[str | int, ...]


class Database:
    """The file at `path`; created when absent. `reserve` is given up for a record that has no room.

    Calls block: the manager makes them on one thread of their own.
    """

    def __init__(self, path: str, reserve: Reserve) -> None:
        self._reserve = reserve
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            migrate(self._connection, path)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file; every write before is durable."""
        self._connection.close()

    def save(self, update: UpdateRecord) -> None:
        """Make `update` and all its snapshots durable, together; ENOSPC or EIO with nothing changed."""

        def write(cursor: sqlite3.Cursor) -> None:
            cursor.execute(
                "INSERT INTO updates VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET state = excluded.state, failure = excluded.failure",
                (update.id, update.state, update.create_time_ms, update.failure),
            )
            cursor.execute("DELETE FROM snapshots WHERE update_id = ?", (update.id,))
            for position, snapshot in enumerate(update.snapshots):
                _insert(
                    cursor,
                    "snapshots",
                    f"update_id, position, {_SNAPSHOT_COLUMNS}",
                    (update.id, position, *_snapshot_row(snapshot)),
                )

        self._save(f"update {update.id}", write)

    def save_device(self, device: DeviceRecord) -> None:
        """Make the device of a store durable; ENOSPC or EIO with nothing changed."""

        def write(cursor: sqlite3.Cursor) -> None:
            cursor.execute("DELETE FROM devices WHERE id = ?", (device.id,))
            _insert(cursor, "devices", _DEVICE_COLUMNS, _device_row(device))

        self._save(f"device {device.id}", write)

    def delete_device(self, device_id: str) -> None:
        """Forget the device of a store; ENOSPC or EIO with nothing changed."""
        self._save(
            f"device {device_id}", lambda cursor: cursor.execute("DELETE FROM devices WHERE id = ?", (device_id,))
        )

    def load(self) -> list[UpdateRecord]:
        """Every update, oldest first."""
        execute = self._connection.execute
        updates = execute(
            "SELECT id, state, create_time_ms, failure FROM updates ORDER BY create_time_ms, id"
        ).fetchall()
        snapshots = f"SELECT {_SNAPSHOT_COLUMNS} FROM snapshots WHERE update_id = ? ORDER BY position"
        return [
            UpdateRecord(
                update_id,
                UpdateState(state),
                create_time_ms,
                failure,
                tuple(_snapshot(row) for row in execute(snapshots, (update_id,))),
            )
            for update_id, state, create_time_ms, failure in updates
        ]

    def load_devices(self) -> list[DeviceRecord]:
        """The devices of stores, by id."""
        return [_device(row) for row in self._connection.execute(f"SELECT {_DEVICE_COLUMNS} FROM devices ORDER BY id")]

    def _save(self, what: str, write: Callable[[sqlite3.Cursor], object]) -> None:
        try:
            self._write(what, write)
        except SnapdError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._reserve.release()
            self._write(what, write)
        else:
            self._reserve.restore()

    def _write(self, what: str, write: Callable[[sqlite3.Cursor], object]) -> None:
        with closing(self._connection.cursor()) as cursor:
            try:
                cursor.execute("BEGIN IMMEDIATE")
                write(cursor)
                cursor.execute("COMMIT")
            except sqlite3.Error as error:
                # A full disk has rolled back by itself.
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
                raise SnapdError(number, f"the record of {what} was not written: {error}") from error


def _insert(cursor: sqlite3.Cursor, table: str, columns: str, row: _Cells) -> None:
    marks = ", ".join("?" * len(row))
    cursor.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", row)


def _export_row(export: ExportRecord) -> _Cells:
    return export.kind, export.tcp_address, export.policy, export.attach_timeout_ms


def _export(row: Iterable[Any]) -> ExportRecord:
    kind, tcp_address, policy, attach_timeout_ms = row
    return ExportRecord(ExportKind(kind), tcp_address, Policy(policy), attach_timeout_ms)


def _snapshot_row(s: SnapshotRecord) -> _Cells:
    return (
        s.id,
        s.uuid,
        s.state,
        s.base_path,
        s.cow_path,
        s.old_size_bytes,
        s.new_size_bytes,
        s.changed_bytes,
        int(s.mapped),
        s.read_back,
        s.failure,
        *_export_row(s.export),
    )


def _snapshot(row: tuple[Any, ...]) -> SnapshotRecord:
    snapshot_id, uuid, state, base, cow, old, new, changed, mapped, read_back, failure, *export = row
    return SnapshotRecord(
        snapshot_id,
        uuid,
        SnapshotState(state),
        base,
        cow,
        old,
        new,
        changed,
        bool(mapped),
        ReadBack(read_back),
        failure,
        _export(export),
    )


def _device_row(d: DeviceRecord) -> _Cells:
    return d.id, d.uuid, d.route, d.size_bytes, int(d.read_only), d.store_path, *_export_row(d.export)


def _device(row: tuple[Any, ...]) -> DeviceRecord:
    device_id, uuid, route, size_bytes, read_only, store_path, *export = row
    return DeviceRecord(device_id, uuid, Route(route), size_bytes, bool(read_only), _export(export), store_path)

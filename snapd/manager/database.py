"""The durable records: one SQLite file (WAL, synchronous=FULL).

Invariant: an update and its snapshots are written in one transaction, so no crash shows one without the other. The
undo directory's state file is the truth about a merge; this file mirrors it (UNDO-29).
"""

import errno
import sqlite3
from collections.abc import Iterable
from contextlib import closing

from snapd.block.errors import SnapdError
from snapd.manager.records import SnapshotRecord, UpdateRecord
from snapd.manager.reserve import Reserve
from snapd.manager.states import ReadBack, SnapshotState, UpdateState

_VERSION = 1
_SCHEMA = """
CREATE TABLE updates (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, create_time_ms INTEGER NOT NULL, failure TEXT NOT NULL
) STRICT;
CREATE TABLE snapshots (
    update_id TEXT NOT NULL REFERENCES updates (id), position INTEGER NOT NULL,
    id TEXT NOT NULL, uuid TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
    base_path TEXT NOT NULL, cow_path TEXT NOT NULL,
    old_size_bytes INTEGER NOT NULL, new_size_bytes INTEGER NOT NULL, changed_bytes INTEGER NOT NULL,
    mapped INTEGER NOT NULL, read_back TEXT NOT NULL, failure TEXT NOT NULL,
    PRIMARY KEY (update_id, id)
) STRICT;
"""
_SNAPSHOT_COLUMNS = (
    "id, uuid, state, base_path, cow_path, old_size_bytes, new_size_bytes, changed_bytes, mapped, read_back, failure"
)


class Database:
    """The file at `path`; created when absent. `reserve` is given up for a record that has no room.

    Calls block: the manager makes them on one thread of their own.
    """

    def __init__(self, path: str, reserve: Reserve) -> None:
        self._reserve = reserve
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        execute = self._connection.execute
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=FULL")
        execute("PRAGMA foreign_keys=ON")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
        elif version != _VERSION:
            self._connection.close()
            raise SnapdError(
                errno.EINVAL, f"{path}: schema version {version}, this program knows {_VERSION}", reason="SCHEMA"
            )

    def close(self) -> None:
        """Close the file; every write before is durable."""
        self._connection.close()

    def save(self, update: UpdateRecord) -> None:
        """Make `update` and all its snapshots durable, together; ENOSPC or EIO with nothing changed."""
        try:
            self._write(update)
        except SnapdError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._reserve.release()
            self._write(update)
        else:
            self._reserve.restore()

    def _write(self, update: UpdateRecord) -> None:
        with closing(self._connection.cursor()) as cursor:
            try:
                cursor.execute("BEGIN IMMEDIATE")
                cursor.execute(
                    "INSERT INTO updates VALUES (?, ?, ?, ?)"
                    " ON CONFLICT (id) DO UPDATE SET state = excluded.state, failure = excluded.failure",
                    (update.id, update.state, update.create_time_ms, update.failure),
                )
                cursor.execute("DELETE FROM snapshots WHERE update_id = ?", (update.id,))
                cursor.executemany(
                    f"INSERT INTO snapshots (update_id, position, {_SNAPSHOT_COLUMNS})"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(update.id, position, *_row(s)) for position, s in enumerate(update.snapshots)],
                )
                cursor.execute("COMMIT")
            except sqlite3.Error as error:
                # A full disk has rolled back by itself.
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
                raise SnapdError(number, f"the record of update {update.id} was not written: {error}") from error

    def load(self) -> list[UpdateRecord]:
        """Every update, oldest first."""
        execute = self._connection.execute
        updates = execute(
            "SELECT id, state, create_time_ms, failure FROM updates ORDER BY create_time_ms, id"
        ).fetchall()
        return [
            UpdateRecord(
                update_id,
                UpdateState(state),
                create_time_ms,
                failure,
                tuple(
                    _snapshots(
                        execute(
                            f"SELECT {_SNAPSHOT_COLUMNS} FROM snapshots WHERE update_id = ? ORDER BY position",
                            (update_id,),
                        )
                    )
                ),
            )
            for update_id, state, create_time_ms, failure in updates
        ]


def _row(s: SnapshotRecord) -> tuple[str | int, ...]:
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
    )


def _snapshots(
    rows: Iterable[tuple[str, str, str, str, str, int, int, int, int, str, str]],
) -> Iterable[SnapshotRecord]:
    for snapshot_id, uuid, state, base, cow, old, new, changed, mapped, read_back, failure in rows:
        yield SnapshotRecord(
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
        )

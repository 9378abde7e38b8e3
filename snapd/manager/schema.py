"""The schema of the records and its history: a file of any older version becomes one of ours in one transaction.

Invariant: a released version's statements never change; a new version is one more entry of `_STEPS`. The version is in
the file's header (`PRAGMA user_version`) and is written with the change it stands for.
"""

import errno
import sqlite3

from snapd.block.errors import SnapdError

_STEPS = (
    # 1: updates and snapshots
    """
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
""",
    # 2: how a snapshot is exported, and the devices of stores
    """
ALTER TABLE snapshots ADD COLUMN export_kind TEXT NOT NULL DEFAULT 'nbd';
ALTER TABLE snapshots ADD COLUMN tcp_address TEXT NOT NULL DEFAULT '';
ALTER TABLE snapshots ADD COLUMN policy TEXT NOT NULL DEFAULT 'restart';
ALTER TABLE snapshots ADD COLUMN attach_timeout_ms INTEGER NOT NULL DEFAULT 4000;
CREATE TABLE devices (
    id TEXT PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, route TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, read_only INTEGER NOT NULL, store_path TEXT NOT NULL,
    export_kind TEXT NOT NULL, tcp_address TEXT NOT NULL, policy TEXT NOT NULL, attach_timeout_ms INTEGER NOT NULL
) STRICT;
""",
)
VERSION = len(_STEPS)


def migrate(connection: sqlite3.Connection, path: str, to: int = VERSION) -> None:
    """Bring an open file to version `to`, all or nothing; EINVAL (SCHEMA) when it is newer than this program."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > to:
        raise SnapdError(errno.EINVAL, f"{path}: schema version {version}, this program knows {to}", reason="SCHEMA")
    if version < to:
        steps = "".join(_STEPS[version:to])
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={to}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

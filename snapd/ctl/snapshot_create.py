"""`snapctl snapshot create`: one base and the COW that updates it."""

from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import SnapshotArgument, connect, snapshot_name


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(
    context: typer.Context,
    snapshot: SnapshotArgument,
    base: Annotated[Path, typer.Option("--base", help="The file or block device that holds the old image.")],
    cow: Annotated[Path, typer.Option("--cow", help="The COW file that describes the new image.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Add a snapshot to an update; base and COW are checked, nothing is written to them."""
    from snapd.ctl.records import snapshot_record

    parent, _, snapshot_id = snapshot_name(snapshot).rpartition("/snapshots/")
    with connect(context) as client:
        created = client.create_snapshot(parent, snapshot_id, str(base.absolute()), str(cow.absolute()))
    show(snapshot_record(created), output)

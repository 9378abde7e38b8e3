"""`snapctl snapshot unmap`: take the export away."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import SnapshotArgument, connect, snapshot_name


def register(app: typer.Typer) -> None:
    app.command("unmap")(unmap)


def unmap(context: typer.Context, snapshot: SnapshotArgument, output: OutputOption = Format.TABLE) -> None:
    """Stop serving the snapshot; clients are cut off, a merge goes on."""
    from snapd.ctl.records import snapshot_record

    with connect(context) as client:
        show(snapshot_record(client.unmap_snapshot(snapshot_name(snapshot))), output)

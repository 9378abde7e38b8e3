"""`snapctl snapshot map`: export the new image."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import SnapshotArgument, connect, snapshot_name


def register(app: typer.Typer) -> None:
    app.command("map")(map_snapshot)


def map_snapshot(context: typer.Context, snapshot: SnapshotArgument, output: OutputOption = Format.TABLE) -> None:
    """Serve the new image over NBD and print its URI; a snapshot that is mapped stays as it is."""
    from snapd.ctl.records import snapshot_record

    with connect(context) as client:
        mapped = client.map_snapshot(snapshot_name(snapshot))
    if output is Format.JSON:
        show(snapshot_record(mapped), output)
    else:
        print(mapped.device.nbd_uri)

"""`snapctl snapshot map`: export the new image."""

import typer

from snapd.ctl.export_options import ExportOption, PolicyOption, TcpOption, export_settings, policy_number
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import SnapshotArgument, connect, snapshot_name


def register(app: typer.Typer) -> None:
    app.command("map")(map_snapshot)


def map_snapshot(
    context: typer.Context,
    snapshot: SnapshotArgument,
    export: ExportOption = None,
    tcp: TcpOption = None,
    policy: PolicyOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Serve the new image and print what to open: a device or an NBD URI. A snapshot that is mapped stays as it is."""
    from snapd.ctl.device_records import where
    from snapd.ctl.records import snapshot_record

    with connect(context) as client:
        mapped = client.map_snapshot(
            snapshot_name(snapshot), export=export_settings(export, tcp), policy=policy_number(policy)
        )
    if output is Format.JSON:
        show(snapshot_record(mapped), output)
    else:
        print(where(mapped.device))

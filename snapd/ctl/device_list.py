"""`snapctl device list`: every device, a line each."""

import typer

from snapd.ctl.output import Format, OutputOption, show_rows
from snapd.ctl.session import connect


def register(app: typer.Typer) -> None:
    app.command("list")(list_devices)


def list_devices(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """List the devices of mapped snapshots and of stores: states, restarts, and where clients open them."""
    from snapd.ctl.device_records import device_record, device_row

    with connect(context) as client:
        devices = client.list_devices()
    make = device_record if output is Format.JSON else device_row
    show_rows([make(device) for device in devices], output)

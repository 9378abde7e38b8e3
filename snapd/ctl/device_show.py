"""`snapctl device show`: one device."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import DeviceArgument, connect, device_name


def register(app: typer.Typer) -> None:
    app.command("show")(show_device)


def show_device(context: typer.Context, device: DeviceArgument, output: OutputOption = Format.TABLE) -> None:
    """Show a device: what it serves, where, by which processes, and how it is."""
    from snapd.ctl.device_records import device_record

    with connect(context) as client:
        show(device_record(client.get_device(device_name(device))), output)

"""`snapctl device delete`: take the device of a store away."""

import typer

from snapd.ctl.session import DeviceArgument, connect, device_name


def register(app: typer.Typer) -> None:
    app.command("delete")(delete)


def delete(context: typer.Context, device: DeviceArgument) -> None:
    """Finish what is in flight and stop serving a store; a snapshot's device is taken away by `snapshot unmap`."""
    with connect(context) as client:
        client.delete_device(device_name(device))

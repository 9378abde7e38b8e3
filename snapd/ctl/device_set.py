"""`snapctl device set`: change a device that serves."""

from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import DeviceArgument, connect, device_name


def register(app: typer.Typer) -> None:
    app.command("set")(set_device)


def set_device(
    context: typer.Context,
    device: DeviceArgument,
    attach_timeout_ms: Annotated[
        int, typer.Option("--attach-timeout-ms", help="How long requests wait for the first daemon; 0: not at all.")
    ],
    output: OutputOption = Format.TABLE,
) -> None:
    """Change the attach timeout of a device, at once and for good."""
    from snapd.ctl.device_records import device_record

    with connect(context) as client:
        show(device_record(client.set_attach_timeout(device_name(device), attach_timeout_ms)), output)

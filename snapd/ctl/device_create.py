"""`snapctl device create`: serve a store."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from snapd.ctl.errors import usage
from snapd.ctl.export_options import ExportOption, PolicyOption, TcpOption, export_settings, policy_number
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import DeviceArgument, connect, device_name
from snapd.ctl.sizes import parse_size


class RouteName(StrEnum):
    """What `--route` takes."""

    RAW = "raw"
    WORKER = "worker"
    EXTERNAL = "external"


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(
    context: typer.Context,
    device: DeviceArgument,
    store: Annotated[Path | None, typer.Option("--store", help="The file or block device to serve.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="The size of an external device.")] = None,
    route: Annotated[
        RouteName,
        typer.Option("--route", help="Who serves: the device host (raw), a worker, or an external daemon."),
    ] = RouteName.RAW,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes.")] = False,
    export: ExportOption = None,
    tcp: TcpOption = None,
    policy: PolicyOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Serve a file or a block device, or the device of a dm-user daemon of your own."""
    from snapd.api.v1 import devices_pb2
    from snapd.ctl.device_records import device_record

    with usage("--size"):
        size_bytes = parse_size(size) if size else 0
    request = devices_pb2.CreateDeviceRequest(
        device_id=device_name(device).removeprefix("devices/"),
        route=devices_pb2.Route.Value(f"ROUTE_{route.name}"),
        store_path=str(store.absolute()) if store else "",
        size_bytes=size_bytes,
        read_only=read_only,
        policy=policy_number(policy),
        export=export_settings(export, tcp),
    )
    with connect(context) as client:
        show(device_record(client.create_device(request)), output)

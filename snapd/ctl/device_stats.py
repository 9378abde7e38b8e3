"""`snapctl device stats`: what one device did."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import DeviceArgument, connect, device_name


def register(app: typer.Typer) -> None:
    app.command("stats")(stats)


def stats(context: typer.Context, device: DeviceArgument, output: OutputOption = Format.TABLE) -> None:
    """Show counters, rates and latencies since the start of the device host."""
    from snapd.ctl.device_records import stats_record, stats_summary

    with connect(context) as client:
        found = client.device_stats(device_name(device))
    show(stats_record(found) if output is Format.JSON else stats_summary(found), output)

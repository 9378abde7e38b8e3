"""`snapctl device watch`: what devices do, a line each and tick."""

import json
from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption
from snapd.ctl.session import connect, device_name

_HEADING_LINES = 20
"""The heading comes again after so many lines."""


def register(app: typer.Typer) -> None:
    app.command("watch")(watch)


def watch(
    context: typer.Context,
    device: Annotated[str | None, typer.Argument(metavar="[D]", help="The device; all of them when left out.")] = None,
    interval_ms: Annotated[int, typer.Option("--interval-ms", help="Between two lines, 100 to 60000.")] = 1000,
    output: OutputOption = Format.TABLE,
) -> None:
    """Follow devices until interrupted: in flight, queue, IOPS, MB/s, latencies, restarts, attach state."""
    from snapd.ctl.device_records import WATCH_HEADING, stats_record, watch_line

    lines = 0
    with connect(context) as client:
        for tick in client.watch_devices(device_name(device) if device else "", interval_ms=interval_ms):
            for stats in tick:
                if output is Format.JSON:
                    print(json.dumps(stats_record(stats)), flush=True)
                    continue
                if lines % _HEADING_LINES == 0:
                    print(WATCH_HEADING)
                print(watch_line(stats), flush=True)
                lines += 1

"""`snapctl merge start`: write an update into its bases, in the background."""

from typing import Annotated

import typer

from snapd.ctl.merge_watch import follow
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import UpdateArgument, connect, update_name


def register(app: typer.Typer) -> None:
    app.command("start")(start)


def start(
    context: typer.Context,
    update: UpdateArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the merge has ended.")] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Start, or resume, the merge of an update; it can be undone until it is confirmed."""
    from snapd.ctl.records import update_record, update_summary

    with connect(context) as client:
        started = client.start_merge(update_name(update))
        if wait:
            follow(client, update_name(update), output)
        else:
            show(update_record(started) if output is Format.JSON else update_summary(started), output)

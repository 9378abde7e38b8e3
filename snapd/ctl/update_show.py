"""`snapctl update show`: an update, its snapshots and what runs for them."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import UpdateArgument, connect, update_name


def register(app: typer.Typer) -> None:
    app.command("show")(show_update)


def show_update(context: typer.Context, update: UpdateArgument, output: OutputOption = Format.TABLE) -> None:
    """Show an update with its snapshots and devices."""
    from snapd.ctl.records import snapshot_record, update_record, update_summary

    with connect(context) as client:
        found = client.get_update(update_name(update))
    if output is Format.JSON:
        show(update_record(found), output)
        return
    show(update_summary(found), output)
    for snapshot in found.snapshots:
        print()
        show(snapshot_record(snapshot), output)

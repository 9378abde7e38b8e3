"""`snapctl update create`: a new, empty update."""

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import UpdateArgument, connect


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(context: typer.Context, update: UpdateArgument, output: OutputOption = Format.TABLE) -> None:
    """Create an update; snapshots are added to it before it is mapped or merged."""
    from snapd.ctl.records import update_summary

    with connect(context) as client:
        show(update_summary(client.create_update(update)), output)

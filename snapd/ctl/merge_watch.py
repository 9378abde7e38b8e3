"""`snapctl merge watch`: follow a merge to its end."""

import errno
from typing import TYPE_CHECKING

import typer

from snapd.block.errors import SnapdError
from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.progress import progress_bar
from snapd.ctl.session import UpdateArgument, connect, update_name

if TYPE_CHECKING:
    from snapd.client.service import Client


def register(app: typer.Typer) -> None:
    app.command("watch")(watch)


def watch(context: typer.Context, update: UpdateArgument, output: OutputOption = Format.TABLE) -> None:
    """Show the progress of a merge until it ends; exit code 1 if it fails."""
    with connect(context) as client:
        follow(client, update_name(update), output)


def follow(client: "Client", name: str, output: Format) -> None:
    """Watch until the merge has ended and print the update; `SnapdError` if it failed."""
    from snapd.api.v1 import updates_pb2
    from snapd.ctl.records import update_record, update_summary

    with progress_bar("merge") as progress:
        for update in client.watch_merge(name):
            progress(update.merged_bytes, update.changed_bytes)
    if update.state == updates_pb2.UPDATE_STATE_FAILED:
        raise SnapdError(errno.EIO, f"the merge of {name} stopped: {update.failure}")
    show(update_record(update) if output is Format.JSON else update_summary(update), output)

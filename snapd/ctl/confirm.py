"""`snapctl confirm`: give up the way back."""

from typing import Annotated

import typer

from snapd.ctl.output import Format, OutputOption, show
from snapd.ctl.session import UpdateArgument, connect, update_name


def register(app: typer.Typer) -> None:
    app.command("confirm")(confirm)


def confirm(
    context: typer.Context,
    update: UpdateArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Say that the old image is not needed any more.")] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Delete the undo stores of a merged update. The only step that cannot be undone."""
    from snapd.ctl.records import update_summary

    if not yes:
        raise typer.BadParameter("it deletes the way back to the old image, so it must be given", param_hint="--yes")
    with connect(context) as client:
        show(update_summary(client.confirm_update(update_name(update))), output)

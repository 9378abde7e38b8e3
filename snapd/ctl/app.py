"""The `snapctl` application: the list of verbs and the entry point."""

from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import typer

from snapd.ctl import (
    confirm,
    cow_append,
    cow_create,
    cow_estimate,
    cow_extract,
    cow_info,
    cow_merge,
    cow_verify,
    demo,
    device_create,
    device_delete,
    device_list,
    device_set,
    device_show,
    device_stats,
    device_watch,
    merge_start,
    merge_watch,
    snapshot_create,
    snapshot_map,
    snapshot_unmap,
    update_create,
    update_show,
)
from snapd.ctl.errors import reported

_GROUPS: dict[str, tuple[str, tuple[ModuleType, ...]]] = {
    "cow": (
        "Create, look into, check and apply COW files; needs no daemon.",
        (cow_create, cow_estimate, cow_info, cow_verify, cow_extract, cow_append, cow_merge),
    ),
    "update": ("Updates: sets of snapshots that are merged and confirmed together.", (update_create, update_show)),
    "snapshot": (
        "Snapshots: a base and its COW, and the device over them.",
        (snapshot_create, snapshot_map, snapshot_unmap),
    ),
    "device": (
        "Devices: what clients hold on to, of mapped snapshots and of stores.",
        (device_create, device_delete, device_list, device_show, device_stats, device_watch, device_set),
    ),
    "merge": ("Write an update into its bases, in the background.", (merge_start, merge_watch)),
}


def build() -> typer.Typer:
    """The application with every verb in it."""
    # Help without markup: typer then leaves rich alone, and the output is the same in a pipe.
    app = typer.Typer(
        help="Update running systems: serve the new image at once, merge it behind the reads, undo it until confirmed.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _options(
        server: Annotated[
            str | None,
            typer.Option(
                "--server", envvar="SNAPD_SERVER", help="The daemon, unix:PATH; default: the system's or yours."
            ),
        ] = None,
    ) -> None:
        pass

    for name, (text, verbs) in _GROUPS.items():
        group = typer.Typer(help=text, no_args_is_help=True)
        for verb in verbs:
            verb.register(group)
        app.add_typer(group, name=name)
    confirm.register(app)
    demo.register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run snapctl with `arguments` (default: the process's own); returns the exit code or raises `SystemExit`."""
    with reported():
        build()(args=arguments, prog_name="snapctl")
    return 0

"""What the online verbs share: the server they talk to, and names as people type them."""

import errno
from typing import TYPE_CHECKING, Annotated

import typer

from snapd.block.errors import SnapdError

if TYPE_CHECKING:
    from snapd.client.service import Client

UpdateArgument = Annotated[str, typer.Argument(metavar="U", help="The update.")]
DeviceArgument = Annotated[str, typer.Argument(metavar="D", help="The device.")]
SnapshotArgument = Annotated[str, typer.Argument(metavar="U/S", help="The snapshot, with its update in front.")]


def connect(context: typer.Context) -> "Client":
    """The service named by `--server` or SNAPD_SERVER, else the one of root or of this user."""
    from snapd.client.service import Client
    from snapd.manager.paths import default_socket

    server: str | None = context.find_root().params.get("server")
    return Client(server or f"unix:{default_socket()}")


def update_name(text: str) -> str:
    """`U` (or the full name) as a resource name."""
    return text if text.startswith("updates/") else f"updates/{text}"


def device_name(text: str) -> str:
    """`D` (or the full name) as a resource name."""
    return text if text.startswith("devices/") else f"devices/{text}"


def snapshot_name(text: str) -> str:
    """`U/S` (or the full name) as a resource name; EINVAL for anything else."""
    if text.startswith("updates/"):
        return text
    match text.split("/"):
        case [update, snapshot] if update and snapshot:
            return f"updates/{update}/snapshots/{snapshot}"
    raise SnapdError(errno.EINVAL, f"{text!r} is not U/S, an update and a snapshot")

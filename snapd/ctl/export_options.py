"""How a device is exported, as options: shared by `snapshot map` and `device create`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from snapd.api.v1 import devices_pb2


class ExportName(StrEnum):
    """What `--export` takes."""

    NBD = "nbd"
    LOOP = "loop"
    DM = "dm"
    AUTO = "auto"


class PolicyName(StrEnum):
    """What `--policy` takes."""

    RESTART = "restart"
    FAIL_FAST = "fail_fast"


ExportOption = Annotated[
    ExportName | None,
    typer.Option("--export", help="NBD, /dev/loopN, the kernel's dm-user, or the best there is.", show_default="nbd"),
]
TcpOption = Annotated[
    str | None, typer.Option("--tcp", metavar="HOST:PORT", help="NBD there too; loopback addresses only.")
]
PolicyOption = Annotated[
    PolicyName | None,
    typer.Option(
        "--policy", help="A worker that dies is replaced, or everything fails at once.", show_default="restart"
    ),
]


def export_settings(kind: ExportName | None, tcp: str | None) -> "devices_pb2.ExportSettings":
    """The settings of the API; what is not given is not set."""
    from snapd.api.v1 import devices_pb2

    name = "UNSPECIFIED" if kind is None else kind.name
    return devices_pb2.ExportSettings(kind=devices_pb2.ExportKind.Value(f"EXPORT_KIND_{name}"), tcp_address=tcp or "")


def policy_number(policy: PolicyName | None) -> "devices_pb2.Policy.ValueType":
    """The policy of the API; not set when it is not given."""
    from snapd.api.v1 import devices_pb2

    return devices_pb2.Policy.Value(f"POLICY_{'UNSPECIFIED' if policy is None else policy.name}")

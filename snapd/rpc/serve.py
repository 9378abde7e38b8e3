"""The `snapd` command: one daemon over one state directory, listening at one unix socket."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from snapd.api.v1 import (
    devices_pb2,
    devices_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    updates_pb2,
    updates_pb2_grpc,
)
from snapd.block.errors import SnapdError
from snapd.manager.manager import Manager
from snapd.rpc.services import DevicesService, SnapshotsService, UpdatesService
from snapd.rpc.settings import Settings

_SERVICES = (
    updates_pb2.DESCRIPTOR.services_by_name["Updates"].full_name,
    snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name,
    devices_pb2.DESCRIPTOR.services_by_name["Devices"].full_name,
)
_STOP_GRACE_S = 2.0
_MAX_RPCS = 200

_log = logging.getLogger("snapd")


async def serve(settings: Settings) -> None:
    """Recover, serve until SIGTERM or SIGINT, and leave devices running for the next daemon."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    manager = await Manager.open(str(settings.state_dir))
    try:
        server = grpc.aio.server(maximum_concurrent_rpcs=_MAX_RPCS)
        updates_pb2_grpc.add_UpdatesServicer_to_server(UpdatesService(manager), server)
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(manager), server)
        devices_pb2_grpc.add_DevicesServicer_to_server(DevicesService(manager), server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        _listen(server, settings.socket_path)
        await server.start()
        os.chmod(settings.socket_path, 0o600)
        for name in ("", *_SERVICES):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving %s at %s", settings.state_dir, settings.listen)
        await stop.wait()
        await checks.enter_graceful_shutdown()
        manager.stop_watching()
        await server.stop(_STOP_GRACE_S)
    finally:
        await manager.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(settings.socket_path)


def _listen(server: grpc.aio.Server, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        # We hold the state directory's lock, so a socket left here belongs to a daemon that is gone.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        server.add_insecure_port(f"unix:{path}")
    except OSError as error:
        raise SnapdError.from_os(error, f"listen at {path}") from error
    except RuntimeError as error:
        raise SnapdError(errno.EADDRINUSE, f"listen at {path}: {error}") from error


def build() -> typer.Typer:
    """The command line of `snapd`."""
    app = typer.Typer(
        help="The snapshot and merge service. It is driven with snapctl, or over gRPC.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _callback() -> None:
        pass

    @app.command("serve")
    def _serve(
        state_dir: Annotated[
            str | None, typer.Option("--state-dir", help="Where records and undo stores are kept; made when absent.")
        ] = None,
        listen: Annotated[str | None, typer.Option("--listen", help="Where clients connect: unix:PATH.")] = None,
    ) -> None:
        """Serve one state directory in the foreground."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        asyncio.run(serve(Settings.of(state_dir=state_dir, listen=listen)))

    return app


def main() -> None:
    """Entry point of `snapd`."""
    try:
        build()(prog_name="snapd")
    except SnapdError as error:
        print(f"snapd: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""A private snapd for the demo: started on a directory of its own, and gone without a trace afterwards."""

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from snapd.block.errors import SnapdError
from snapd.client.service import Client
from snapd.manager.devicehost import evict, evict_hosts
from snapd.manager.paths import DevicePaths, ServicePaths

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 20.0


@contextlib.contextmanager
def private_service(directory: Path) -> Iterator[Client]:
    """A client of a daemon over `directory`/state. At the end the daemon and everything it started have exited."""
    state, listen, log_path = directory / "state", f"unix:{directory}/snapd.sock", directory / "snapd.log"
    command = [sys.executable, "-I", "-m", "snapd.rpc.serve", "serve"]
    with open(log_path, "wb") as log:
        daemon = subprocess.Popen(
            [*command, "--state-dir", str(state), "--listen", listen],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for the demo, which then stops the daemon in order.
            start_new_session=True,
        )
    try:
        with Client(listen) as client:
            _wait_until_serving(client, daemon, log_path)
            yield client
    finally:
        daemon.terminate()
        try:
            daemon.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        _end_what_is_left(state)


def _wait_until_serving(client: Client, daemon: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            client.get_update("updates/none")
        except SnapdError as error:
            if error.errno == errno.ENODEV:
                return
            if daemon.poll() is not None or time.monotonic() > deadline:
                said = log_path.read_text(errors="replace").strip()
                raise SnapdError(errno.ECONNREFUSED, f"the private snapd does not serve: {said}") from error
        time.sleep(0.05)


def _end_what_is_left(state: Path) -> None:
    """A daemon leaves devices in use running; here nobody uses them any more."""
    if not state.is_dir():
        return
    devices = ServicePaths(str(state)).run / "devices"
    for name in os.listdir(devices) if devices.is_dir() else ():
        paths = DevicePaths(devices / name)
        evict_hosts(paths)
        evict(paths.merger_fence)
        paths.remove()

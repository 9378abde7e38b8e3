"""A private snapd on a directory of its own, for the demo and for tests; gone without a trace when closed."""

import asyncio
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from snapd.block.errors import SnapdError
from snapd.client.service import Client
from snapd.manager.launch import clear_away
from snapd.manager.paths import DevicePaths, ServicePaths
from snapd.manager.process import evict

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 20.0


class PrivateService:
    """A daemon over `directory`/state, listening at `directory`/snapd.sock; a context manager.

    Closing ends the daemon and everything that it, or one before it on this directory, has started.
    """

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.server = f"unix:{directory}/snapd.sock"
        self._log_path = directory / "snapd.log"
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the daemon; 0 while none runs."""
        return self._daemon.pid if self._daemon is not None else 0

    def start(self) -> None:
        """Start the daemon; returns when it serves, ECONNREFUSED with its own words when it does not."""
        command = [sys.executable, "-I", "-m", "snapd.rpc.serve", "serve"]
        with open(self._log_path, "ab") as log:
            self._daemon = subprocess.Popen(
                [*command, "--state-dir", str(self.state), "--listen", self.server],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for whoever uses the service, who then stops it in order.
                start_new_session=True,
            )
        with Client(self.server) as client:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not _serves(client):
                if self._daemon.poll() is not None or time.monotonic() > deadline:
                    raise SnapdError(errno.ECONNREFUSED, f"the private snapd does not serve: {self.log()}")
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL the daemon alone."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def stop(self) -> None:
        """SIGTERM the daemon and wait; devices go on."""
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
            self._daemon = None

    def close(self) -> None:
        """Stop the daemon and end the devices that it would have left running for a successor."""
        self.stop()
        if not self.state.is_dir():
            return
        devices = ServicePaths(str(self.state)).run / "devices"
        for name in os.listdir(devices) if devices.is_dir() else ():
            paths = DevicePaths(devices / name)
            asyncio.run(clear_away(paths))
            evict(paths.merger_fence)
            paths.remove()

    def log(self) -> str:
        """What the daemon and its processes have said."""
        return self._log_path.read_text(errors="replace").strip()


def _serves(client: Client) -> bool:
    try:
        client.get_update("updates/none")
    except SnapdError as error:
        return error.errno == errno.ENODEV
    return True

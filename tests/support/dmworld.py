"""A machine with device-mapper and dm-user, as far as a test needs one: the doubles, and a client of the device."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from dmunodes import Nodes, dm_user_nodes
from fakedmsetup import opened

from snapd.manager.dmsetup import DmSettings

SECTOR = 512
BLOCK = 4096


class DmWorld:
    """`settings` are for the service; the rest looks at, and uses, what it makes."""

    def __init__(self, nodes: Nodes) -> None:
        directory = nodes.directory.parent
        self.control = directory / "control"
        self._nodes = nodes
        self._state = str(directory / "dm.json")
        script = directory / "dmsetup"
        double = Path(__file__).with_name("fakedmsetup.py")
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {double} {self._state} {self.control} "$@"\n')
        script.chmod(0o700)
        self.settings = DmSettings(str(script), str(nodes.directory), "/dev/mapper")

    def state(self) -> dict[str, Any]:
        """All tables, and the calls so far."""
        with opened(self._state) as state:
            return dict(json.loads(json.dumps(state)))

    def device(self) -> dict[str, Any]:
        """The tables of the one device."""
        (device,) = self.state()["devices"].values()
        return dict(device)

    def calls(self) -> list[str]:
        """The verbs so far, but those that only look."""
        verbs = [call.split()[0] for call in self.state()["calls"]]
        return [verb for verb in verbs if verb not in ("targets", "info")]

    def reboot(self) -> None:
        """Forget all devices; their nodes stay, since nobody will ask for them."""
        with opened(self._state) as state:
            state["devices"].clear()

    def set_open(self, is_open: bool) -> None:
        """Say that somebody has the device mounted, or has not any more."""
        with opened(self._state) as state:
            for device in state["devices"].values():
                device["open"] = is_open

    def read(self, sector: int, length: int, nodes: Nodes | None = None) -> tuple[int, bytes]:
        """Read the mapped device: errno number and data. Waits while it is suspended."""
        return self._io(nodes or self._nodes, 0, sector, length, b"")

    def write(self, sector: int, data: bytes) -> int:
        """Write the mapped device; the errno number."""
        return self._io(self._nodes, 1, sector, len(data), data)[0]

    def client(self) -> Nodes:
        """A connection of its own, for a thread."""
        return Nodes(self._nodes.directory, str(self.control))

    def _io(self, nodes: Nodes, kind: int, sector: int, length: int, data: bytes) -> tuple[int, bytes]:
        while True:
            # Under the lock, as the kernel takes a bio: no swap comes in between.
            with opened(self._state) as state:
                (device,) = state["devices"].values()
                if not device["suspended"]:
                    node = device["live"]
                    number = nodes.submit(node, kind, sector=sector, length=length, data=data)
                    break
        return nodes.wait(node, number)


@contextlib.contextmanager
def dm_world() -> Iterator[DmWorld]:
    """Skips the test where nothing can be mounted."""
    with dm_user_nodes() as nodes:
        yield DmWorld(nodes)


class Reader(threading.Thread):
    """Reads random blocks of the mapped device until `finish`, and compares."""

    def __init__(self, world: DmWorld, expected: bytes) -> None:
        super().__init__(daemon=True)
        self._world, self._expected = world, expected
        self._finished = threading.Event()
        self.reads = 0
        self.failures: list[str] = []

    def run(self) -> None:
        random, nodes = Random(1), self._world.client()
        while not self._finished.is_set():
            offset = random.randrange(len(self._expected) // BLOCK) * BLOCK
            number, data = self._world.read(offset // SECTOR, BLOCK, nodes)
            if number or data != self._expected[offset : offset + BLOCK]:
                self.failures.append(f"{os.strerror(number)} at {offset}" if number else f"wrong data at {offset}")
            self.reads += 1
        nodes.close()

    def finish(self) -> int:
        """End it; how many reads there were, all of them right."""
        self._finished.set()
        self.join(60)
        assert not self.is_alive(), "a read hangs"
        assert self.failures == []
        return self.reads

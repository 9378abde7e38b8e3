"""What the NBD tests add to a device under test: a listener on TCP, and a scene for an attack."""

import contextlib
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from devicerig import Device
from nbdpeer import Address, Peer

from snapd.client.nbd import NbdClient
from snapd.device.config import Descriptors

WAIT_S = 20
"""Below the time after which a client that takes nothing is cut: nobody else may have to wait for that."""
GROWTH_BYTES = 48 << 20
"""What the host may hold more at its worst than at its start: the arena, the credit, and the buffers of 64 clients."""


@contextlib.contextmanager
def listening_on_tcp(device: Device) -> Iterator[tuple[str, int]]:
    """Give a device that has not been started a TCP listener on the loopback interface; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        given = dict(zip(device.fds.names, device.fds.fds, strict=True))
        device.fds = Descriptors(given | {"nbd_tcp_listener": listener.fileno()})
        host, port = listener.getsockname()
        yield host, port


class Target(NamedTuple):
    """A running device, where it is attacked, and what its host held at its start."""

    device: Device
    address: Address
    uri: str
    private_bytes: int


@contextlib.contextmanager
def target(device: Device, over: str) -> Iterator[Target]:
    """Start the device, to be attacked over "unix" or "tcp"."""
    with device, listening_on_tcp(device) as (host, port):
        device.start()
        if over == "tcp":
            yield Target(device, (host, port), f"nbd://{host}:{port}", private_bytes(device))
        else:
            yield Target(device, device.nbd_path, device.uri, private_bytes(device))


@contextlib.contextmanager
def attack(target: Target, content: bytes) -> Iterator["Scene"]:
    """The scene of one attack, which must leave nothing behind."""
    scene = Scene(target, content)
    try:
        yield scene
        scene.check_over()
    finally:
        scene.close()


class Scene:
    """A device under attack. A well-behaved client, the witness, goes on reading its beginning, which is `content`."""

    def __init__(self, target: Target, content: bytes) -> None:
        self.device = target.device
        self.content = content
        self._target = target
        self._choice = random.Random(11)
        self._witness = NbdClient.connect(target.uri, WAIT_S)
        self._host = self.device.status()["pid"]
        self._descriptors = self.descriptors()

    def close(self) -> None:
        self._witness.close()

    def peer(self, *, structured: bool = False, allocation: bool = False) -> Peer:
        """A client that has negotiated."""
        return self.stranger().negotiate(structured=structured, allocation=allocation)

    def stranger(self) -> Peer:
        """A client that has not negotiated."""
        return Peer(self._target.address)

    def check(self, *, newcomers: bool = True) -> None:
        """The witness reads what it should, a new client does, too, and the host has not grown."""
        self.check_reads(self._witness, 8)
        if newcomers:
            with NbdClient.connect(self._target.uri, WAIT_S) as newcomer:
                self.check_reads(newcomer, 2)
        assert private_bytes(self.device) < self._target.private_bytes + GROWTH_BYTES

    def check_reads(self, client: NbdClient, count: int) -> None:
        for _ in range(count):
            length = self._choice.choice([1, 512, 4096, 70_001])
            offset = self._choice.randrange(len(self.content) - length)
            buffer = bytearray(length)
            client.read_into(buffer, offset)
            assert buffer == self.content[offset : offset + length]

    def check_over(self) -> None:
        """It is as before: only the witness is connected, nothing is in flight, nobody has died."""
        self.check()
        status = self.settle(lambda status: status["connections"] == 1 and not status["in_flight_bytes"])
        assert status["worker_restarts"] == 0
        assert status["pid"] == self._host
        assert self.descriptors() == self._descriptors
        self.check()

    def settle(self, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a status; every question is a turn for the host."""
        until = time.monotonic() + WAIT_S
        while not is_reached(status := self.device.status()):
            assert time.monotonic() < until, status
        return status

    def descriptors(self) -> int:
        """How many the host has open."""
        assert self.device.host is not None
        return len(os.listdir(f"/proc/{self.device.host.pid}/fd"))


def private_bytes(device: Device) -> int:
    """Memory of the host that it shares with nobody."""
    assert device.host is not None
    rollup = Path(f"/proc/{device.host.pid}/smaps_rollup").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", rollup, re.MULTILINE))


def shown(payload: bytes | bytearray, offset: int, content: bytes) -> bool:
    """Whether this is what the content has there."""
    return payload == content[offset : offset + len(payload)]

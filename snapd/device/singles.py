"""Requests of an NBD client that have a reply of their own, and what they need of its connection."""

from collections.abc import Callable
from typing import Protocol

from snapd.device.batch import Batch
from snapd.device.nbd import Command
from snapd.dmuser.arena import Arena, Region


class Client(Protocol):
    """What the requests need of their connection."""

    @property
    def free_credit_bytes(self) -> int:
        """What may be taken with `take_credit` right now."""
        ...

    def take_credit(self, charge_bytes: int) -> None:
        """Take so much of `free_credit_bytes`."""
        ...

    def admit(self, charge_bytes: int) -> bool:
        """Take credit for a request, or be called again when there is some."""
        ...

    def release(self, charge_bytes: int) -> None:
        """Give credit back."""
        ...

    def wait_for_room(self, ring: Arena) -> None:
        """Be called again when this part of the arena has room."""
        ...

    def send(self, pieces: list[memoryview | bytes], charge_bytes: int, region: Region | None) -> None:
        """Send a reply, then give its credit and its region back."""
        ...


class Single(Batch):
    """A request that has a reply of its own."""

    __slots__ = ("charge_bytes", "command", "cookie", "length", "started_us")

    def __init__(
        self,
        on_ready: Callable[[Batch], None],
        command: Command,
        cookie: int,
        length: int,
        charge_bytes: int,
        started_us: int,
    ) -> None:
        super().__init__(None, on_ready)
        self.command = command
        self.cookie = cookie
        self.length = length
        self.charge_bytes = charge_bytes
        self.started_us = started_us

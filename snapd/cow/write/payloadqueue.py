"""Units on their way to payloads: encoded on threads, handed back in the order they came.

Small units travel together, so that a thread has something to do; the tasks under way are bounded, and with them the
memory. What comes back does not depend on the number of threads (COW-110).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from snapd.cow.compress import Encoder
from snapd.cow.format import OpType
from snapd.cow.pool import OrderedPool
from snapd.cow.write.writeroptions import WriterOptions

_TASK_BYTES = 256 << 10


class Unit(NamedTuple):
    """An op whose payload is to encode `data`."""

    type: OpType
    new_block: int
    blocks: int
    source: int
    data: bytes


_Task = list[tuple[Unit, bytes]]


class PayloadQueue:
    """Takes units and gives each back with its payload; `is_empty` when it has given back all."""

    def __init__(self, options: WriterOptions) -> None:
        self._units: list[Unit] = []
        self._bytes = 0
        self.is_empty = True
        self._pool: OrderedPool[Encoder, _Task] = OrderedPool(
            options.threads, in_flight=2 * options.threads, make_state=options.encoder
        )

    def push(self, unit: Unit) -> Iterable[tuple[Unit, bytes]]:
        """Take a unit; returns those that are done and had to make room, which the caller must consume."""
        self._units.append(unit)
        self._bytes += len(unit.data)
        self.is_empty = False
        return () if self._bytes < _TASK_BYTES else self._submit()

    def drain(self) -> Iterator[tuple[Unit, bytes]]:
        """All units that are left."""
        yield from self._submit()
        for task in self._pool.drain():
            yield from task
        self.is_empty = True

    def close(self) -> None:
        """End the threads and drop what is left."""
        self._pool.close()

    def _submit(self) -> Iterator[tuple[Unit, bytes]]:
        units, self._units, self._bytes = self._units, [], 0
        for task in self._pool.push(_encoding(units)):
            yield from task


def _encoding(units: list[Unit]) -> Callable[[Encoder], _Task]:
    return lambda encoder: [(unit, encoder.encode(unit.data)) for unit in units]

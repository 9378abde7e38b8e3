"""Small COW files of any kind, for the tests of the writers."""

from collections.abc import Callable
from random import Random

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption
from snapd.cow.write.writer import CowWriter, WriterOptions, create_writer

BLOCK = b"\x41" * 4096
VERSIONS = [2, 3]

Call = Callable[[CowWriter], None]
"""Something done with a writer."""


def options(version: int, compress: str = "none", **changed: int) -> WriterOptions:
    """Options of a file of 100 target blocks without scratch."""
    fields: dict[str, int] = {"op_count_max": 100, "max_blocks": 100, **changed}
    return WriterOptions(version=version, compression=CompressOption.parse(compress), scratch=False, **fields)


def begin(settings: WriterOptions) -> tuple[SimStore, CowWriter]:
    """An empty file and its writer."""
    store = SimDisk(Random(0)).store("cow")
    return store, create_writer(store, settings)


def content(store: SimStore) -> bytes:
    """All bytes."""
    return read_bytes(store, 0, store.size())

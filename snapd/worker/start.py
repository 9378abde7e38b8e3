"""From descriptors to services: what a worker reads and writes, served on its channels."""

from collections.abc import Callable, Sequence

from snapd.block.file import file_store
from snapd.block.store import Readable
from snapd.cow.image.extentmap import ExtentMap
from snapd.cow.image.units import UnitCache
from snapd.cow.image.view import CowView
from snapd.dmuser.arena import map_arena
from snapd.dmuser.client import ChannelClient, ChannelEnd
from snapd.merge.oldview import OldView
from snapd.merge.sharedmap import SharedMap
from snapd.proc.log import Log
from snapd.worker.arenaservice import ArenaService
from snapd.worker.arguments import Arguments
from snapd.worker.backend import Backend, ImageBackend, StoreBackend
from snapd.worker.crew import Service
from snapd.worker.stream import StreamService

CACHE_BYTES = 12 << 20
"""Decoded units that all threads of a worker keep together."""


def make_services(arguments: Arguments, channels: Sequence[int], log: Log) -> list[Service]:
    """One service a channel, each with its own backend. `SnapdError` when something cannot be opened or read."""
    fds = arguments.inherited
    open_backend = _backends(fds, arguments.read_only)
    if "arena" in fds:
        arena = map_arena(fds["arena"])
        return [ArenaService(ChannelEnd(fd), arena, open_backend(), log) for fd in channels]
    return [StreamService(ChannelClient(fd), open_backend(), log) for fd in channels]


def _backends(fds: dict[str, int], read_only: bool) -> Callable[[], Backend]:
    """Makes the backend of one thread after the other."""
    base = file_store(fds["base"], "the base")
    if "cow" not in fds:
        store = StoreBackend(base)
        backend = ImageBackend(store, store.size_bytes) if read_only else store
        return lambda: backend
    extent_map = ExtentMap.load(fds["extent_map"])
    shared = SharedMap(fds["shared_map"]) if "shared_map" in fds else None
    payloads = file_store(fds["cow"], "the COW")
    units = UnitCache(CACHE_BYTES)

    def open_image() -> Backend:
        source: Readable = base
        if shared is not None:
            source = OldView(base, fds["undo_directory"], shared, extent_map)
        view = CowView(extent_map, payloads, source=source, base=base, units=units)
        return ImageBackend(view, view.size)

    return open_image

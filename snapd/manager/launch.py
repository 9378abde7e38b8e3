"""Starting, adopting and clearing away the device of a record, whatever its export is made of."""

import asyncio
import os
from collections.abc import Callable, Mapping

from snapd.manager import loopdevice
from snapd.manager.backends import BackEnds
from snapd.manager.devicehost import DeviceHost, evict_hosts
from snapd.manager.devicereport import Device
from snapd.manager.dmdevice import DmDevice, discard
from snapd.manager.paths import DevicePaths
from snapd.manager.records import DeviceRecord, ExportKind


async def start_device(
    record: DeviceRecord,
    paths: DevicePaths,
    stores: Mapping[str, int],
    back_ends: BackEnds,
    on_change: Callable[[], None],
) -> Device:
    """A device over borrowed `stores`; returns when it serves."""
    if record.export.kind is ExportKind.DM:
        return await DmDevice.start(record, paths, stores, back_ends.dm, on_change)
    return await DeviceHost.start(record, paths, stores, on_change)


async def adopt_device(
    record: DeviceRecord, paths: DevicePaths, back_ends: BackEnds, on_change: Callable[[], None]
) -> tuple[Device, dict[str, int]] | None:
    """The device that a former daemon left running, with its stores, which are the caller's; None when there is none.

    Then nothing that served it is left either, so that its stores can be opened again; but a device of device-mapper
    is, since it may be mounted.
    """
    if record.export.kind is ExportKind.DM:
        adopted_dm = await DmDevice.adopt(record, paths, back_ends.dm, on_change)
        if adopted_dm is not None:
            return adopted_dm
    else:
        adopted = await DeviceHost.adopt(record, paths, on_change)
        if adopted is not None:
            return adopted
    await clear_away(paths)
    if record.export.kind is not ExportKind.DM:
        await discard(paths, back_ends.dm)
    return None


async def clear_away(paths: DevicePaths) -> None:
    """End what serves a device without asking it, and its loop device; a device of device-mapper stays."""
    await asyncio.to_thread(evict_hosts, paths)
    await loopdevice.clear(paths.directory)


def close_stores(stores: Mapping[str, int]) -> None:
    """Give up our copies; the locks stay while a process holds its own."""
    for fd in stores.values():
        os.close(fd)

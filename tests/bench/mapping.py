"""A snapshot of a million ops in a private service, mapped from cold again and again."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Self

import numpy as np
from devicedata import DeviceData

from snapd.block.file import FileStore
from snapd.client.nbd import NbdClient
from snapd.client.service import Client
from snapd.cow.format import BLOCK_SIZE, OpType
from snapd.cow.parse.reader import CowFile
from snapd.ctl.demo_service import PrivateService

_UPDATE = "bench"
_SNAPSHOT = f"updates/{_UPDATE}/snapshots/s"


_STILL_S = 2.5


class MillionOps:
    """The service with one update; a context manager. `directory`, which it makes, has a short path."""

    def __init__(self, data: DeviceData, directory: Path) -> None:
        directory.mkdir()
        base, self._cow = directory / "base.img", directory / "update.cow"
        with open(base, "wb") as file:
            file.truncate(data.million_base_bytes)
        shutil.copyfile(data.million, self._cow)
        with open(self._cow, "rb") as file:
            cow = CowFile.parse(FileStore(file.fileno(), str(self._cow)))
        self._ops_start, self._op_count = cow.header.ops_start, cow.op_count
        with contextlib.ExitStack() as stack:
            service = stack.enter_context(PrivateService(directory))
            self._client = stack.enter_context(Client(service.server))
            self._client.create_update(_UPDATE)
            self._client.create_snapshot(f"updates/{_UPDATE}", "s", str(base), str(self._cow))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def change(self) -> None:
        """Have the first two one-block replace ops change places, so that the map made before is wrong."""
        records = np.memmap(self._cow, dtype="<u8", mode="r+", offset=self._ops_start, shape=(self._op_count, 2))
        first, second = np.flatnonzero(records[:1000, 1] >> np.uint64(57) == OpType.REPLACE << 3)[:2]
        records[[first, second], 0] = records[[second, first], 0]
        records.flush()
        # A map is kept only of a file that has lain still for a while.
        time.sleep(_STILL_S)

    def first_byte_ms(self) -> float:
        """From the request to map until the first bytes are there; the snapshot is unmapped before and afterwards."""
        begin = time.perf_counter()
        uri = self._client.map_snapshot(_SNAPSHOT).device.nbd_uri
        with NbdClient.connect(uri) as device:
            device.read_into(bytearray(BLOCK_SIZE), 0)
        end = time.perf_counter()
        self._client.unmap_snapshot(_SNAPSHOT)
        return (end - begin) * 1000

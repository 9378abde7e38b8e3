"""What runs for one snapshot in this daemon: its descriptors, its device host, its merger."""

from dataclasses import dataclass

from snapd.manager.devicehost import DeviceHost
from snapd.manager.merger import MergerProcess
from snapd.manager.paths import ServicePaths, device_id
from snapd.manager.records import SnapshotRecord
from snapd.manager.resources import Resources
from snapd.manager.states import SnapshotState
from snapd.manager.status import DeviceStatus, SnapshotStatus


@dataclass(slots=True)
class Runtime:
    """Empty for a snapshot that is neither mapped nor merging."""

    resources: Resources | None = None
    device: DeviceHost | None = None
    merger: MergerProcess | None = None
    merged_bytes: int = 0

    async def status(self, update_id: str, record: SnapshotRecord, service: ServicePaths) -> SnapshotStatus:
        """The snapshot as it is now."""
        undo = service.undo(record.uuid) / "undo.cow"
        return SnapshotStatus(
            update_id=update_id,
            record=record,
            undo_path=str(undo) if undo.exists() else "",
            merged_bytes=self._merged_bytes(record),
            merger_pid=self.merger.pid if self.merger is not None else 0,
            device=await self._device_status(record),
        )

    async def _device_status(self, record: SnapshotRecord) -> DeviceStatus | None:
        if self.device is None:
            if not record.mapped:
                return None
            # Promised, but not there: its files could not be opened after a restart.
            return DeviceStatus(device_id(record.uuid), "FAILED", "", 0, 0, 0, 0)
        said = await self.device.status()
        return DeviceStatus(
            id=device_id(record.uuid),
            state="FAILED" if said.get("state") == "CRASH_LOOP" else self.device.state,
            nbd_uri=self.device.nbd_uri,
            host_pid=self.device.pid,
            worker_pid=int(said.get("worker_pid") or 0),
            worker_restarts=int(said.get("worker_restarts", 0)),
            host_restarts=self.device.restarts,
        )

    def _merged_bytes(self, record: SnapshotRecord) -> int:
        if record.state in (SnapshotState.MERGED, SnapshotState.CONFIRMED):
            return record.changed_bytes
        return self.merged_bytes

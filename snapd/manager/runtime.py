"""What runs for one snapshot in this daemon: its descriptors, its device, its merger."""

from dataclasses import dataclass

from snapd.manager.devicereport import FAILED, Device
from snapd.manager.merger import MergerProcess
from snapd.manager.paths import ServicePaths
from snapd.manager.records import SnapshotRecord
from snapd.manager.resources import Resources
from snapd.manager.states import SnapshotState
from snapd.manager.status import DeviceStatus, SnapshotStatus


@dataclass(slots=True)
class Runtime:
    """Empty for a snapshot that is neither mapped nor merging."""

    resources: Resources | None = None
    device: Device | None = None
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
            device=await self.device_status(update_id, record),
        )

    async def device_status(self, update_id: str, record: SnapshotRecord) -> DeviceStatus | None:
        """The snapshot's device as it is now; None while it is not mapped."""
        if self.device is None and not record.mapped:
            return None
        return DeviceStatus(record.device(update_id), FAILED if self.device is None else await self.device.report())

    def _merged_bytes(self, record: SnapshotRecord) -> int:
        if record.state in (SnapshotState.MERGED, SnapshotState.CONFIRMED):
            return record.changed_bytes
        return self.merged_bytes

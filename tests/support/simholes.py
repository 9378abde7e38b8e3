"""A simulated disk's store that can have holes, as a pass-through worker wants one."""

from snapd.block.simdisk import SimDisk, SimStore


class HoleyStore(SimStore):
    """One file of `disk`, durable with `content`; `unmapped` has what was given up, as (offset, length)."""

    def __init__(self, disk: SimDisk, name: str, content: bytes) -> None:
        super().__init__(disk, name, content)
        disk.files[name] = self
        self.unmapped: list[tuple[int, int]] = []

    def unmap(self, offset: int, length: int) -> bool:
        self.unmapped.append((offset, length))
        self.zero(offset, length)
        return True

"""A stop at every store operation of a COW writer: afterwards the file is empty or finished, never in between."""

from random import Random

import pytest

from snapd.block.simdisk import SimDisk, Stop
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption, Encoder
from snapd.cow.errors import CowError
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.reader import CowFile
from snapd.cow.view import CowView
from snapd.cow.writer import CowWriter

UNITS = 90
OPTION = CompressOption.parse("none")


def write(disk: SimDisk, content: list[bytes]) -> None:
    """A file of 64 KiB units, large enough for several payload writes."""
    writer = CowWriter(disk.store("cow"), op_count_max=UNITS, option=OPTION, unit=64 << 10, scratch=False)
    encoder = Encoder(OPTION)
    for index, unit in enumerate(content):
        writer.replace(16 * index, 16, encoder.encode(unit))
    writer.finalize()


@pytest.mark.parametrize("power_cut", [True, False], ids=["power-cut", "kill"])
@pytest.mark.parametrize("seed", range(6))
def test_stop_anywhere(seed: int, power_cut: bool) -> None:
    """COW-95, COW-96: payloads and records are durable before the header that counts them."""
    random = Random(seed)
    content = [random.randbytes(64 << 10) for _ in range(UNITS)]
    rehearsal = SimDisk(Random(seed))
    write(rehearsal, content)
    assert rehearsal.operations > 6
    seen = set[int]()
    for stop_at in range(rehearsal.operations + 1):
        disk = SimDisk(Random(seed * 1000 + stop_at))
        disk.stop_at = stop_at
        try:
            write(disk, content)
        except Stop:
            assert stop_at < rehearsal.operations
        if power_cut:
            disk.power_cut()
        else:
            disk.kill()
        seen.add(ops_found(disk, content))
    assert seen >= {0, UNITS}, f"seed {seed}: {seen}"


def ops_found(disk: SimDisk, content: list[bytes]) -> int:
    """How many ops the file has; what it has reads as what was written."""
    file = disk.store("cow")
    # Stopped before the very first flush, there is no header or only its first zeros.
    if read_bytes(file, 0, min(8, file.size())) in (b"", bytes(8)):
        with pytest.raises(CowError):
            CowFile.parse(file)
        return 0
    cow = CowFile.parse(file)
    count = cow.header.op_count
    assert count in (0, UNITS)
    if count:
        base = SimDisk(Random(0)).store("base", bytes(16 * UNITS * BLOCK_SIZE))
        view = CowView(cow.block_map(base.size()), file, source=base, base=base)
        assert read_bytes(view, 0, base.size()) == b"".join(content)
    return count

"""The offline verbs as real processes, and COW files of any version for them."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random

from snapd.block.file import FileStore
from snapd.block.simdisk import SimDisk
from snapd.block.store import Store
from snapd.cow.compress import CompressOption
from snapd.cow.digests import SUFFIX, DigestLog
from snapd.cow.write.targetdigests import TargetDigests
from snapd.cow.write.writer import WriterOptions, create_writer

BLOCK = 4096
Call = tuple[str, int, int, int]


def snapctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `snapctl cow ...` to its end."""
    command = [sys.executable, "-m", "snapd.ctl", "cow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def done(*arguments: str | Path) -> str:
    """Standard output of a call that succeeds and says nothing on standard error."""
    result = snapctl(*arguments)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


def failed(*arguments: str | Path) -> str:
    """The one line on standard error of a call that fails, and changes and prints nothing."""
    result = snapctl(*arguments)
    assert (result.returncode, result.stdout) == (1, ""), result
    assert result.stderr.startswith("snapctl: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def blocks(count: int, seed: int) -> bytes:
    """Blocks that differ from each other, and compress to about a quarter."""
    random = Random(seed)
    return b"".join(random.randbytes(BLOCK // 4).ljust(BLOCK, b".") for _ in range(count))


def write_cow(
    path: Path,
    old: bytes,
    new: bytes,
    *calls: Call,
    version: int = 3,
    compress: str = "lz4",
    slots: int = 100,
    finish: bool = True,
    digests: bool = False,
) -> None:
    """A COW file of these calls as `write_calls` makes it, with its table beside it if `digests`."""
    with path.open("w+b") as file, open(f"{path}{SUFFIX}" if digests else os.devnull, "w+b") as table:
        log = FileStore(table.fileno()) if digests else None
        write_calls(
            FileStore(file.fileno()),
            log,
            old,
            new,
            *calls,
            version=version,
            compress=compress,
            slots=slots,
            finish=finish,
        )


def write_calls(
    store: Store,
    table: Store | None,
    old: bytes,
    new: bytes,
    *calls: Call,
    version: int = 3,
    compress: str = "lz4",
    slots: int = 100,
    finish: bool = True,
) -> None:
    """A COW of these calls, each (verb, target block, blocks, source block or, for an XOR, source byte).

    A label is ("label", number, 0, 0); data comes from `new`. Without `finish` the file ends with the last label.
    """
    options = WriterOptions(
        version=version,
        compression=CompressOption.parse(compress),
        op_count_max=slots if version == 3 else 0,
        unit=4 * BLOCK if version == 3 else BLOCK,
        cluster_ops=8,
        scratch=False,
    )
    told = None
    if table is not None:
        log = DigestLog.create(table, block_size=BLOCK)
        source = SimDisk(Random(0)).store("old", old)
        told = TargetDigests(log, source, len(old) // BLOCK, len(new) // BLOCK)
    with closing(create_writer(store, options, told)) as writer:
        for verb, block, count, source_place in calls:
            data = new[block * BLOCK : (block + count) * BLOCK]
            if verb == "copy":
                writer.copy(block, source_place, count)
            elif verb == "zero":
                writer.zero(block, count)
            elif verb == "raw":
                writer.raw(block, data)
            elif verb == "xor":
                piece = old[source_place : source_place + len(data)]
                mixed = bytes(a ^ b for a, b in zip(data, piece, strict=True))
                writer.xor(block, mixed, *divmod(source_place, BLOCK))
            else:
                writer.label(block)
        if finish:
            writer.finalize()

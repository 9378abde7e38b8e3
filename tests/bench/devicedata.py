"""The data that the figures of devices are measured on, about 2.5 GB, made once and kept (`benchcache`).

An update of an image, as COW files and as a qcow2 overlay. In the first 512 MiB ("whole"), about half of the stretches
of 64 KiB changed, in runs of four on average; 15 % of those are copies. In the 128 MiB behind them ("changed"),
everything is new. What is new compresses as well as programs do, but lies nowhere in the base: it is content of the
base from elsewhere, with each byte value replaced by another one.
"""

import subprocess
from pathlib import Path
from random import Random
from typing import NamedTuple

import benchcache
import benchdata
import images
import numpy as np

from snapd.cow.compress import CompressOption
from snapd.cow.diff.createoptions import CreateOptions
from snapd.cow.diff.xormode import XorMode
from snapd.cow.format import BLOCK_SIZE
from snapd.cow.verbs.create import create_cow

COWS = {"zstd-64k": ("zstd", 64 << 10), "lz4-4k": ("lz4", 4 << 10)}
"""Compression and bytes of a unit by name."""
_STRETCH_BYTES = 64 << 10
_MEAN_RUN = 4
_COPY_SHARE = 0.15
_COPY_DISTANCE = 9
_SEED = 7


class Region(NamedTuple):
    """A part of the image that reads are kept in."""

    offset_bytes: int
    size_bytes: int


WHOLE = Region(0, 512 << 20)
CHANGED = Region(512 << 20, 128 << 20)
IMAGE_BYTES = WHOLE.size_bytes + CHANGED.size_bytes


class DeviceData:
    """Paths of everything, which exist from the start.

    `base` is the old image and `overlay` the qcow2 file over it; `cow(name)` is the COW of that name, and `unchanged`
    one without ops. `million` is a COW with a million ops, for a base of `million_base_bytes` or more.
    """

    million_base_bytes = (benchdata.OP_COUNT + 1) * BLOCK_SIZE

    def __init__(self) -> None:
        cows = benchdata.BenchData()
        sources = (benchcache.__file__, benchdata.__file__, images.__file__, __file__)
        self.directory = benchcache.kept("device", sources, lambda directory: _make(directory, cows.new))
        self.base, self.overlay = self.directory / "base.img", self.directory / "overlay.qcow2"
        self.unchanged = self.directory / "unchanged.cow"
        self.million = cows.ascending

    def cow(self, name: str) -> Path:
        """The COW that was made as `COWS` says."""
        return self.directory / f"{name}.cow"

    def warm(self) -> None:
        """Have all of it in memory."""
        benchcache.warm((self.base, self.overlay, self.million, *map(self.cow, COWS)))


def _make(directory: Path, content: Path) -> None:
    base, target = directory / "base.img", directory / "target.img"
    _write_images(base, target, content)
    for name, (compress, unit) in COWS.items():
        options = CreateOptions(CompressOption.parse(compress), unit=unit, xor=XorMode.NONE)
        create_cow(base, target, directory / f"{name}.cow", options, lambda _done, _total: None)
    create_cow(base, base, directory / "unchanged.cow", CreateOptions(), lambda _done, _total: None)
    _write_overlay(directory / "overlay.qcow2", base, target)
    target.unlink()


def _write_images(base: Path, target: Path, content: Path) -> None:
    blocks = benchdata.UsedBlocks(content)
    # Round again where there are too few.
    blocks.numbers = np.resize(blocks.numbers, IMAGE_BYTES // BLOCK_SIZE)
    old = np.frombuffer(blocks.read(0, len(blocks.numbers)), dtype=np.uint8).reshape(-1, _STRETCH_BYTES)
    new = old.copy()
    # A permutation without a fixed point, odd multiplier: equal bytes stay equal, so that what compressed still does.
    other = (np.arange(256) * 5 + 3).astype(np.uint8)
    for stretch, is_copy in _changes(Random(_SEED)):
        if is_copy:
            new[stretch] = old[stretch + _COPY_DISTANCE]
        else:
            new[stretch] = other[old[(stretch + len(old) // 2) % len(old)]]
    base.write_bytes(old.data)
    target.write_bytes(new.data)


def _changes(random: Random) -> list[tuple[int, bool]]:
    """The stretches that change, each with whether it becomes a copy."""
    changes: list[tuple[int, bool]] = []
    whole, end = (size // _STRETCH_BYTES for size in (WHOLE.size_bytes, IMAGE_BYTES))
    at, changing = 0, True
    while at < whole:
        run = range(at, min(at + 1 + int(random.expovariate(1 / _MEAN_RUN)), whole))
        if changing:
            is_copy = random.random() < _COPY_SHARE
            changes += ((stretch, is_copy) for stretch in run)
        at, changing = run.stop, not changing
    return changes + [(stretch, False) for stretch in range(whole, end)]


def _write_overlay(overlay: Path, base: Path, target: Path) -> None:
    """What differs between the images, compressed with zstd in clusters of 64 KiB."""
    plain = overlay.with_suffix(".plain")
    on_target = ("-f", "qcow2", "-b", str(target), "-F", "raw", str(plain))
    on_base = ("-b", str(base), "-F", "raw")
    subprocess.run(["qemu-img", "create", "-q", *on_target], check=True)
    # Rebased, an overlay takes in what its old base had and its new one has not.
    subprocess.run(["qemu-img", "rebase", "-q", "-f", "qcow2", *on_base, str(plain)], check=True)
    layout = ("-O", "qcow2", "-o", "compression_type=zstd,cluster_size=64k", "-B", str(base), "-F", "raw")
    subprocess.run(["qemu-img", "convert", "-c", "-f", "qcow2", *layout, str(plain), str(overlay)], check=True)
    plain.unlink()

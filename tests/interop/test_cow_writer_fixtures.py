"""The reference writer's files written again from their plans: the same bytes, wherever the compressor makes the same.

The files are not part of the repository; the tests are skipped where they are not beside the checkout.
"""

import json
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cow_scripts import xored

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.compress import CompressOption, Decoder
from snapd.cow.format import Compression, OpType
from snapd.cow.parse.reader import CowFile
from snapd.cow.write.writer import CowWriter, WriterOptions, create_writer

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "fixtures" / "cow-interop.tar.xz"
pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason="the reference writer's files are not here")

FILES = [
    "v2_none",
    "v2_gz",
    "v2_lz4",
    "v2_lz4_labels",
    "v2_lz4_nocluster",
    "v2_zstd_noscratch",
    "v2_lz4_abort_label2",
    "v3_none_4k",
    "v3_gz_32k",
    "v3_brotli_8k",
    "v3_lz4_4k",
    "v3_zstd_64k",
    "v3_lz4_64k_labels",
    "v3_zstd_64k_seq_mixed",
    "v3_lz4_abort_label2",
]


@dataclass(frozen=True, slots=True)
class Reference:
    """One file of the reference writer, and what it was made from."""

    store: SimStore
    options: WriterOptions
    plan: list[list[str]]
    base: bytes
    target: bytes

    @property
    def last_label(self) -> int | None:
        """Up to where an unfinished file can be read."""
        labels = [int(line[1]) for line in self.plan if line[0] == "label"]
        return labels[-1] if self.plan[-1] == ["abort"] else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked files."""
    place = tmp_path_factory.mktemp("reference")
    with tarfile.open(ARCHIVE) as archive:
        # By attribute: the argument is younger than some Python 3.11.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(place)
    return place


@pytest.fixture(params=FILES)
def reference(request: pytest.FixtureRequest, folder: Path) -> Reference:
    """Each file with its plan."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert {entry["file"] for entry in manifest["cow"]} == {f"{name}.cow" for name in FILES}
    entry = next(entry for entry in manifest["cow"] if entry["file"] == f"{request.param}.cow")
    raw = (folder / "cow" / entry["file"]).read_bytes()
    options = WriterOptions(
        version=entry["version"],
        compression=CompressOption.parse(entry["compression"]),
        unit=entry["max_compression_size"],
        cluster_ops=entry["cluster_ops"],
        op_count_max=entry["op_count_max"],
        scratch="noscratch" not in entry["file"],
    )
    plan = [line.split() for line in (folder / entry["plan"]).read_text().splitlines()]
    images = [(folder / name).read_bytes() for name in ("base.img", entry["target"])]
    return Reference(SimDisk(Random(0)).store("reference", raw), options, plan, *images)


def content(store: SimStore) -> bytes:
    """All bytes."""
    return read_bytes(store, 0, store.size())


def run_plan(reference: Reference, writer: CowWriter) -> None:
    """Make the calls of the plan."""
    base, target = reference.base, reference.target
    for verb, *words in reference.plan:
        numbers = [int(word) for word in words]
        if verb == "abort":
            return
        if verb == "copy":
            writer.copy(*numbers)
        elif verb == "zero":
            writer.zero(*numbers)
        elif verb == "label":
            writer.label(*numbers)
        elif verb == "seq":
            writer.sequence(numbers)
        elif verb == "raw":
            block, count = numbers
            writer.raw(block, target[block * 4096 : (block + count) * 4096])
        else:
            assert verb == "xor"
            block, count, old_block, offset = numbers
            source = old_block * 4096 + offset
            wanted = target[block * 4096 : (block + count) * 4096]
            writer.xor(block, xored(wanted, base[source : source + len(wanted)]), old_block, offset)
    writer.finalize()


def units(cow: CowFile, store: SimStore) -> list[bytes]:
    """The decoded payloads of all ops that have one."""
    decoder = Decoder(Compression(cow.header.compression), version=cow.header.version)
    found = []
    for i in range(cow.op_count):
        op = cow.ops.op(i)
        if op.data_length:
            payload = read_bytes(store, int(cow.ops.payload[i]), op.data_length)
            found.append(bytes(decoder.decode(payload, op.blocks * 4096, op_index=i)))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_gives_the_same_file(reference: Reference, threads: int) -> None:
    """COW-104, COW-110, COW-223: byte for byte without a compressor and with a stock zlib, else op for op."""
    store = SimDisk(Random(0)).store("cow")
    writer = create_writer(store, replace(reference.options, threads=threads))
    run_plan(reference, writer)
    writer.close()
    algorithm = reference.options.compression.algorithm
    is_stock = algorithm is Compression.GZ and zlib.ZLIB_RUNTIME_VERSION == "1.2.13"
    if algorithm is Compression.NONE or is_stock:
        assert content(store) == content(reference.store)
        return
    theirs = CowFile.parse(reference.store, label=reference.last_label)
    ours = CowFile.parse(store, label=reference.last_label)
    assert ours.header == theirs.header
    assert ours.labels == theirs.labels
    assert ours.sequence.tolist() == theirs.sequence.tolist()
    assert ours.end is theirs.end
    for column in ("type", "new_block", "blocks"):
        assert getattr(ours.ops, column).tolist() == getattr(theirs.ops, column).tolist()
    reads_source = (ours.ops.type == OpType.COPY) | (ours.ops.type == OpType.XOR)
    assert ours.ops.source[reads_source].tolist() == theirs.ops.source[reads_source].tolist()
    assert units(ours, store) == units(theirs, reference.store)


def test_the_same_payloads_give_the_same_file(reference: Reference) -> None:
    """COW-24 to COW-36, COW-41 to COW-46, COW-51, COW-83: with their payloads put in, every byte is theirs."""
    theirs = CowFile.parse(reference.store, label=reference.last_label)
    store = SimDisk(Random(0)).store("cow")
    writer = create_writer(store, reference.options)
    if len(theirs.sequence):
        writer.sequence(theirs.sequence)
    labels = list(theirs.labels)
    for i in range(theirs.op_count + 1):
        while labels and labels[0].op_count == i:
            writer.label(labels.pop(0).label)
        if i == theirs.op_count:
            break
        op = theirs.ops.op(i)
        if op.type is OpType.COPY:
            writer.copy(op.new_block, op.source)
        elif op.type is OpType.ZERO:
            writer.zero(op.new_block)
        else:
            payload = read_bytes(reference.store, int(theirs.ops.payload[i]), op.data_length)
            writer.put(op.type, op.new_block, op.blocks, op.source, payload)
    if reference.last_label is None:
        writer.finalize()
        assert content(store) == content(reference.store)
        return
    # Of what came behind the label some was written, and does not count.
    end = theirs.header.data_start if theirs.cursor is None else theirs.cursor.op_pos
    assert content(store)[:end] == content(reference.store)[:end]
    assert units(CowFile.parse(store, label=reference.last_label), store) == units(theirs, reference.store)

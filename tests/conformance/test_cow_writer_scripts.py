"""Random scripts over both versions, all compressors, cluster sizes and units: the reader sees what the model says."""

from dataclasses import replace
from random import Random

import pytest
from cow_scripts import Append, Finalize, Label, Model, ScriptMaker, Step, open_writer, random_options
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.block.simdisk import SimDisk, SimStore
from snapd.block.store import read_bytes
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError
from snapd.cow.header import Header
from snapd.cow.parse.reader import CowFile, End
from snapd.cow.write.writer import CowWriter, create_writer

_SCRIPTS = settings(max_examples=120, deadline=None)


class Run:
    """A script on its way: the file, its table of digests, and the model."""

    def __init__(self, random: Random, version: int, *, with_digests: bool, cluster_ops: int | None = None) -> None:
        self.blocks = random.choice([6, 40, 90])
        self.options = random_options(random, version=version, blocks=self.blocks)
        if cluster_ops is not None:
            self.options = replace(self.options, cluster_ops=cluster_ops)
        self.maker = ScriptMaker(random, self.options, self.blocks)
        self.model = self.maker.model()
        self.store = SimDisk(Random(0)).store("cow")
        self.table = SimDisk(Random(0)).store("table") if with_digests else None
        self.steps: list[Step] = []
        self.writer = open_writer(self.store, self.table, self.model, None)
        if sequence := self.maker.sequence():
            self.writer.sequence(sequence)
            self.model.sequence = sequence

    def step(self) -> None:
        """One random step."""
        self.do(self.maker.step(self.model))

    def do(self, step: Step) -> None:
        self.steps.append(step)
        if isinstance(step, Label):
            self.writer.label(step.number)
        elif isinstance(step, Finalize):
            self.writer.finalize()
        elif isinstance(step, Append):
            self.writer.close()
            self.writer = open_writer(self.store, self.table, self.model, step)
        else:
            step.do(self.writer)
        self.model.apply(step)
        assert self.writer.op_count == len(self.model.ops)

    def check(self, *, label: int | None, op_count: int) -> None:
        """The file reads as the model says, up to a label or as a whole."""
        if label is None and set(self.model.sequence) - {op.new_block for op in self.model.ops}:
            with pytest.raises(CowError, match="V19"):
                CowFile.parse(self.store)
            return
        cow = CowFile.parse(self.store, label=label)
        assert cow.end is (End.LABEL if label is not None else End.FINISHED if cow.header.version == 2 else End.OPEN)
        assert cow.sequence.tolist() == self.model.sequence
        expected = [point for point in self.model.labels if label is None or point[0] <= label]
        assert list(cow.labels) == expected
        self.model.check(cow, self.store, op_count)
        if self.table is not None:
            state = DigestTable.load(self.table, op_count=op_count, ops_digest=cow.ops_digest)
            assert state.is_final or label is not None
            self.model.check_digests(state, op_count)

    def check_labels(self) -> None:
        """Version 2 keeps every label, version 3 the last four."""
        for number, op_count in self.model.labels:
            self.check(label=number, op_count=op_count)


@pytest.mark.parametrize("version", [2, 3])
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 25), with_digests=st.booleans())
@_SCRIPTS
def test_a_script_reads_as_its_model(version: int, seed: int, steps: int, with_digests: bool) -> None:
    """COW-24 to COW-36, COW-41 to COW-51, COW-81 to COW-93, COW-113: at every label, after every finalize."""
    run = Run(Random(seed), version, with_digests=with_digests)
    for _ in range(steps):
        run.step()
        if isinstance(run.steps[-1], Label):
            run.check_labels()
        elif isinstance(run.steps[-1], Finalize):
            run.check(label=None, op_count=len(run.model.ops))
    run.do(Finalize())
    run.check_labels()
    run.check(label=None, op_count=len(run.model.ops))
    run.writer.close()


@pytest.mark.parametrize("version", [2, 3])
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 20))
@_SCRIPTS
def test_neither_threads_nor_an_estimate_change_the_file(version: int, seed: int, steps: int) -> None:
    """COW-110, COW-127, COW-130, COW-131, COW-132: one, two and four threads, the same bytes; the estimate's size."""
    run = Run(Random(seed), version, with_digests=False)
    for _ in range(steps):
        step = run.maker.step(run.model)
        if not isinstance(step, Append):
            run.do(step)
    run.do(Finalize())
    files = [content(run.store)]
    for threads in (1, 2, 4):
        store = SimDisk(Random(0)).store("cow")
        writer = open_writer(store, None, Model(run.model.base, replace(run.options, threads=threads)), None)
        replay(writer, run)
        files.append(content(store))
    assert len(set(files)) == 1
    model = Model(run.model.base, replace(run.options, op_count_max=0))
    estimate = create_writer(None, model.options)
    replay(estimate, run)
    slots = run.options.op_count_max - estimate.op_count_max if version == 3 else 0
    assert estimate.size + 16 * slots == run.writer.size
    if version == 2:
        assert estimate.size == run.store.size()


@pytest.mark.parametrize("version", [2, 3])
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 25))
@_SCRIPTS
def test_what_an_append_drops_leaves_no_trace(version: int, seed: int, steps: int) -> None:
    """COW-87, COW-88, COW-91: the finished file is the one that was written without what was dropped."""
    run = Run(Random(seed), version, with_digests=False, cluster_ops=1024 if version == 3 else None)
    kept: list[Step] = []
    for _ in range(steps):
        run.step()
        last = run.steps[-1]
        if isinstance(last, Append):
            del kept[kept.index(Label(last.label)) + 1 :]
        else:
            kept.append(last)
    run.do(Finalize())
    store = SimDisk(Random(0)).store("cow")
    replay(open_writer(store, None, run.maker.model(), None), run, [*kept, Finalize()])
    if version == 2:
        assert content(run.store) == content(store)
        return
    one, other = Header.unpack(content(run.store)[:78]), Header.unpack(content(store)[:78])
    assert replace(one, resume_point_count=0) == replace(other, resume_point_count=0)
    records = slice(one.ops_start, one.ops_start + 16 * one.op_count)
    assert content(run.store)[records] == content(store)[records]
    payloads = slice(one.data_start, run.writer.size)
    assert content(run.store)[payloads] == content(store)[payloads]


def replay(writer: CowWriter, run: Run, steps: list[Step] | None = None) -> None:
    """The same calls again, or only these."""
    if run.model.sequence:
        writer.sequence(run.model.sequence)
    for step in run.steps if steps is None else steps:
        if isinstance(step, Label):
            writer.label(step.number)
        elif isinstance(step, Finalize):
            writer.finalize()
        elif not isinstance(step, Append):
            step.do(writer)
    writer.close()


def content(store: SimStore) -> bytes:
    """All bytes."""
    return read_bytes(store, 0, store.size())

"""COW writers on a simulated disk: random histories with stops of both kinds, and what must be left after each.

Everything follows from one seed, so that a failure replays: `SNAPD_CRASH_SEED=n` runs that seed alone,
`SNAPD_CRASH_SCALE=x` multiplies the number of histories.
"""

import contextlib
import copy
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from cow_scripts import Append, Copy, Finalize, Label, Model, ScriptMaker, Step, open_writer, random_options

from snapd.block.file import BlockDeviceStore
from snapd.block.simdisk import SimDisk, SimStore, Stop
from snapd.block.store import Buffer
from snapd.cow.digests import DigestTable
from snapd.cow.errors import CowError
from snapd.cow.format import SCRATCH_SIZE
from snapd.cow.parse.reader import CowFile, End
from snapd.cow.write.writer import CowWriter

_DEVICE_BYTES = 160 << 10


def seeds(count: int) -> list[int]:
    """`count` seeds, scaled by the environment, or the one it names."""
    if "SNAPD_CRASH_SEED" in os.environ:
        return [int(os.environ["SNAPD_CRASH_SEED"])]
    return list(range(max(1, int(count * float(os.environ.get("SNAPD_CRASH_SCALE", "1"))))))


class SimDevice(SimStore, BlockDeviceStore):
    """A block device on a simulated disk: what is written stays in its size."""

    def write(self, data: Buffer, offset: int) -> None:
        assert offset + len(data) <= self.size()
        super().write(data, offset)

    def truncate(self, size: int) -> None:
        BlockDeviceStore.truncate(self, size)


class Outcome:
    """What the file may be when it is read as a whole; `has_digests` unless an append has begun to drop it."""

    def __init__(self, model: Model, op_count: int | None = None) -> None:
        self.model = model
        self.op_count = len(model.ops) if op_count is None else op_count
        self.has_digests = True


class World:
    """One COW with its digests on a disk, the writer at work, and what it has promised.

    Promised is that the labels of `sure` can be read up to, in version 3 the last one, and a label that is `coming` if
    it is there; and that the file as a whole reads as one of `possible` or not at all, which for version 3, and
    while it `is_finished`, is no choice. Nothing is `sure` while a file is begun.
    """

    def __init__(
        self, seed: int, version: int, *, blocks: int = 0, on_device: bool = False, scratch: bool = False
    ) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        self.disk = SimDisk(random)
        if on_device:
            size = _DEVICE_BYTES + SCRATCH_SIZE * scratch
            self.disk.files["cow"] = SimDevice(self.disk, "cow", random.randbytes(size))
        blocks = blocks or random.choice([8, 24, 60])
        # Small blocks tear more often.
        self.options = replace(
            random_options(random, version=version, blocks=blocks),
            threads=1,
            block_size=random.choice([512, 1024]),
            scratch=scratch,
        )
        self.maker = ScriptMaker(random, self.options, blocks)
        self.log: list[str] = []
        self.model = self.maker.model()
        self.sure: Model | None = None
        self.possible: list[Outcome] = []
        self.coming: tuple[int, Outcome] | None = None
        self.is_finished = False
        self.writer: CowWriter | None = None

    @property
    def store(self) -> SimStore:
        return self.disk.store("cow")

    @property
    def table(self) -> SimStore:
        return self.disk.store("table")

    # Doing

    def random_step(self) -> None:
        """The next step: a beginning where no writer is at work, else any that is allowed now."""
        if self.writer is not None:
            self.do(self.maker.step(self.model))
        else:
            self.go_on()

    def go_on(self) -> None:
        """Append behind one of the last labels, or begin anew where there is none."""
        if self.sure is not None and self.model.labels:
            self.do(Append(self.random.choice(self.model.labels[-2:])[0]))
        else:
            self.create()

    def create(self, sequence: list[int] | None = None) -> None:
        """Begin a new file, sometimes with a sequence."""
        self.log.append("create")
        self.sure, self.coming, self.is_finished = None, None, False
        self.model = self.maker.model()
        empty = Outcome(self.model)
        self._drop_digests()
        if self.options.version == 3:
            self.possible.append(empty)
        self.writer = open_writer(self.store, self.table, self.model, None)
        self.sure = self.maker.model()
        self.possible = [outcome for outcome in self.possible if outcome is empty]
        if sequence is None:
            sequence = self.maker.sequence() if self.random.random() < 0.3 else []
        if sequence:
            self.log.append(f"sequence of {len(sequence)}")
            self.writer.sequence(sequence)
            self.model.sequence = sequence

    def do(self, step: Step) -> None:
        """One step, whose promise counts when it returns."""
        self.log.append(repr(step))
        model = copy.copy(self.model)
        model.ops, model.labels = list(self.model.ops), list(self.model.labels)
        model.apply(step)
        self.is_finished = False
        coming = Outcome(model)
        self.coming = (step.number, coming) if isinstance(step, Label) else None
        if isinstance(step, Append):
            # A label that was only coming is sure when somebody could go on behind it.
            if self.sure is not None and step.label in dict(self.sure.labels):
                self.sure = model
            self._drop_digests()
        if isinstance(step, Finalize) or (self.options.version == 3 and isinstance(step, Label | Append)):
            self.possible.append(coming)
        self._call(step)
        self.model = model
        if isinstance(step, Label | Append | Finalize):
            self.sure = model
            self.possible = [outcome for outcome in self.possible if outcome is coming]
            self.is_finished = isinstance(step, Finalize)

    def _drop_digests(self) -> None:
        for outcome in self.possible:
            outcome.has_digests = False

    def _call(self, step: Step) -> None:
        if isinstance(step, Append):
            self.writer = open_writer(self.store, self.table, self.model, step)
            return
        assert self.writer is not None
        if isinstance(step, Label):
            self.writer.label(step.number)
        elif isinstance(step, Finalize):
            self.writer.finalize()
        else:
            step.do(self.writer)

    def play(self, script: str) -> list[Callable[[], None]]:
        """A script in letters: (c)reate, (g)o on, (d)ata, (l)abel, (f)inalize; (s)equence: a file of 115 copies.

        Its sequence puts the resume points of version 3 out of the header's sector, and across no border.
        """
        actions: dict[str, Callable[[], None]] = {
            "c": self.create,
            "d": lambda: self.do(self.maker.data(self.model) or self.maker.label()),
            "l": lambda: self.do(self.maker.label()),
            "f": lambda: self.do(Finalize()),
            "s": lambda: copy_in_sequence(self, 115),
            "g": self.go_on,
        }
        return [actions[letter] for letter in script]

    def attempt(self, *, stop_at: int | None = None, steps: int = 1) -> bool:
        """Some random steps, stopped at one operation if they come so far; whether they were."""
        return self.attempt_all([self.random_step] * steps, stop_at=stop_at)

    def attempt_all(self, actions: Iterable[Callable[[], None]], *, stop_at: int | None = None) -> bool:
        """The same for given actions."""
        self.disk.stop_at = stop_at
        try:
            for action in actions:
                action()
        except Stop:
            return True
        finally:
            self.disk.stop_at = None
        return False

    def stop(self, *, power_cut: bool) -> None:
        """The process or the machine is gone; what is left is checked, and the next writer has to go on from there."""
        self.log.append("power cut" if power_cut else "kill")
        if power_cut:
            self.disk.power_cut()
        else:
            self.disk.kill()
        self.writer = None
        self.check()
        if self.coming is not None and self.random.random() < 0.5 and self._parse(label=self.coming[0]) is not None:
            self.model = self.coming[1].model
        elif self.sure is not None:
            self.model = copy.copy(self.sure)
            self.model.labels = self._labels_left(self.sure.labels)

    def check_power_cuts(self, count: int) -> None:
        """What `count` different power cuts would leave now; the disk stays as it is."""
        disk = self.disk
        # Several times as fast as a deep copy.
        image = pickle.dumps(disk)
        self.log.append("one of several power cuts")
        try:
            for i in range(count):
                self.disk = pickle.loads(image)
                self.disk.random.seed(f"{self.seed} {disk.operations} {i}")
                self.disk.power_cut()
                self.check()
        finally:
            self.disk = disk
        self.log.pop()

    def _labels_left(self, labels: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Version 3 has room for four labels: the first of them may have gone for one that was only coming."""
        if self.options.version == 2 or not labels:
            return labels
        found = [tuple(label) for label in CowFile.parse(self.store, label=labels[-1][0]).labels]
        return [label for label in labels if label in found]

    # Checking

    def check(self) -> None:
        """What is left is what was promised, or what was about to be; nothing is half, and the digests are there."""
        try:
            if self.sure is not None:
                for number, op_count in self.sure.labels if self.options.version == 2 else self.sure.labels[-1:]:
                    self._check_as(Outcome(self.sure, op_count), CowFile.parse(self.store, label=number))
            if self.coming is not None and (cow := self._parse(label=self.coming[0])) is not None:
                self._check_as(self.coming[1], cow)
            self._check_whole()
        except (AssertionError, CowError) as error:
            raise AssertionError(self.where(str(error))) from error

    def _check_whole(self) -> None:
        must_be_whole = self.is_finished or (self.options.version == 3 and self.sure is not None)
        # A sequence of which not all is there refuses the whole file, not its labels.
        is_short = any(outcome.model.sequence for outcome in self.possible)
        cow = self._parse()
        if cow is None:
            assert not must_be_whole or is_short, "the file is refused"
            return
        assert cow.end is (End.FINISHED if self.options.version == 2 else End.OPEN)
        outcomes = [outcome for outcome in self.possible if outcome.op_count == cow.op_count]
        assert outcomes, f"{cow.op_count} ops, expected {[outcome.op_count for outcome in self.possible]}"
        for outcome in outcomes[:-1]:
            with contextlib.suppress(AssertionError):
                self._check_as(outcome, cow)
                return
        self._check_as(outcomes[-1], cow)

    def _parse(self, *, label: int | None = None) -> CowFile | None:
        try:
            return CowFile.parse(self.store, label=label)
        except CowError:
            return None

    def _check_as(self, outcome: Outcome, cow: CowFile) -> None:
        outcome.model.check(cow, self.store, outcome.op_count)
        if outcome.has_digests:
            table = DigestTable.load(self.table, op_count=cow.op_count, ops_digest=cow.ops_digest)
            outcome.model.check_digests(table, cow.op_count)

    def where(self, what: str) -> str:
        """How to see it again."""
        return f"{what} (SNAPD_CRASH_SEED={self.seed}; {self.options}; {'; '.join(self.log)})"


def beyond_the_points(world: World, entries: int) -> list[Callable[[], None]]:
    """Version 3: a file with a sequence of `entries` blocks, and more labels than there are resume points."""
    return [lambda: copy_in_sequence(world, entries), *world.play("ldldldldldldldldl")]


def copy_in_sequence(world: World, entries: int) -> None:
    """A new file with a sequence, all of whose blocks are copied."""
    world.create(list(range(entries)))
    world.do(Copy(0, 5, entries))

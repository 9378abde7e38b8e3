"""Random walks over everything that can happen to a target (DMU-4, DMU-41, DMU-157).

A failing walk prints its seed; `DMU_SEED=n` walks that one alone.
"""

import contextlib
import os
from random import Random
from typing import Any

import pytest
from dmuforms import DirectForm, Form, NodeForm, Seen, SocketForm, data_of
from dmurig import NodeRig, Submitted, answer_header, assert_one_place

from snapd.block.bio import BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.dmuser.inflight import Channel
from snapd.dmuser.message import Answer, Flag
from snapd.dmuser.node import NodeFile
from snapd.dmuser.target import Target

SEEDS = [int(os.environ["DMU_SEED"])] if "DMU_SEED" in os.environ else list(range(20))
STEPS = 300
OPS = [BioOp.READ, BioOp.READ, BioOp.WRITE, BioOp.WRITE, BioOp.FLUSH, BioOp.DISCARD, BioOp.SECURE_ERASE]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"restart_grace_ms": 300},
    {"restart_grace_ms": 300, "request_timeout_ms": 500},
    {"attach_timeout_ms": 0},
]


class Walk:
    """The same steps on all forms, compared after every one."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        options = self.random.choice(OPTIONS)
        self.forms: list[Form] = [form(Random(seed), **options) for form in (DirectForm, NodeForm, SocketForm)]
        self.opened = 0
        self.open_names: list[int] = []
        self.read: dict[int, list[Seen]] = {}
        self.sector = 0

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.45:
            self.submit()
        elif choice < 0.50 and len(self.open_names) < 4:
            self.open(self.random.choice(["", "", "pair"]))
        elif choice < 0.60 and self.open_names:
            self.read_all(self.random.choice(self.open_names))
        elif choice < 0.93 and self.open_names:
            self.answer(self.random.choice(self.open_names))
        elif choice < 0.95 and self.open_names:
            self.close(self.random.choice(self.open_names))
        elif choice < 0.955 and self.open_names:
            self.poison(self.random.choice(self.open_names))
        else:
            self.let_time_pass(self.random.choice([0, 50, 400, 4000]))
        self.compare()

    def submit(self) -> None:
        op, size = self.random.choice(OPS), self.random.choice([512, 4096, 20_000])
        flags = int(self.random.choice([Flag(0), Flag.NOWAIT, Flag.FUA]))
        self.sector += 1
        for form in self.forms:
            one = Submitted(op, sector=self.sector, length=size, flags=flags)
            one.memory[:] = Random(self.sector).randbytes(len(one.memory)) if op is BioOp.WRITE else one.memory
            with contextlib.suppress(SnapdError):
                form.submit(one)
                form.submitted.append(one)

    def open(self, group: str) -> None:
        failed = 0
        for form in self.forms:
            try:
                form.open(self.opened, group)
            except SnapdError:
                failed += 1
        assert failed in (0, len(self.forms))
        if not failed:
            self.open_names.append(self.opened)
            self.read[self.opened] = []
        self.opened += 1

    def read_all(self, name: int) -> None:
        direct, node, stream = [form.read_all(name) for form in self.forms]
        assert direct == node == stream
        self.read[name] += direct

    def answer(self, name: int) -> None:
        if not self.read[name]:
            return
        request, _ = self.read[name].pop(self.random.randrange(len(self.read[name])))
        code = self.random.choice([0, 0, 0, 0, 1, 2, 77])
        for form in self.forms:
            form.answer(name, request.seq, code, data_of(request, code))

    def close(self, name: int) -> None:
        self.open_names.remove(name)
        for form in self.forms:
            form.close(name)

    def poison(self, name: int) -> None:
        self.open_names.remove(name)
        for form in self.forms:
            form.answer(name, (1 << 64) - 1, 0, b"")

    def let_time_pass(self, ms: int) -> None:
        for form in self.forms:
            form.clock.advance(ms)
            form.expire()

    def finish(self) -> None:
        """The target goes, then whoever still has it open: then everything has ended."""
        for form in self.forms:
            form.destroy()
        self.compare()
        while self.open_names:
            self.close(self.open_names[0])
            self.compare()
        for form in self.forms:
            assert all(one.result is not None for one in form.submitted)

    def compare(self) -> None:
        views = []
        for form in self.forms:
            assert_one_place(form.target, form.submitted)
            views.append((form.target.state, form.target.queued, [one.result for one in form.submitted]))
        assert views[0] == views[1] == views[2]


@pytest.mark.parametrize("seed", SEEDS)
def test_forms_agree(seed: int) -> None:
    """DMU-1 to 4, DMU-41, DMU-157, DMU-154: one place at any instant; direct, node and socket give the same results."""
    walk = Walk(seed)
    for _ in range(STEPS):
        walk.step()
    walk.finish()
    memories = [[bytes(one.memory) for one in form.submitted if one.result == 0] for form in walk.forms]
    assert memories[0] == memories[1] == memories[2]
    assert any(memories[0])


class HalfWalk:
    """Messages read and answered in part, by direct calls and by a node's files at once."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        options = self.random.choice(OPTIONS)
        self.clock = ManualClock()
        self.direct, self.rig = Target(self.clock, **options), NodeRig(**options)
        self.pairs: list[tuple[Submitted, Submitted]] = []
        self.channels: list[Pair] = []

    def step(self) -> None:
        choice = self.random.random()
        pair = self.random.choice(self.channels) if self.channels else None
        if choice < 0.35:
            self.submit()
        elif pair is None or (choice < 0.40 and len(self.channels) < 4):
            with contextlib.suppress(SnapdError):
                group = self.random.choice(["", "pair"])
                self.channels.append(Pair(self.direct.open(group), self.rig.node.open(group=group, nonblocking=True)))
        elif choice < 0.90:
            pair.go_on(self.random)
        elif choice < 0.94:
            self.channels.remove(pair)
            pair.direct.close()
            pair.file.close()
        else:
            ms = self.random.choice([0, 50, 400, 4000])
            self.clock.advance(ms)
            self.direct.expire()
            self.rig.advance(ms)
        self.compare()

    def submit(self) -> None:
        op, size = self.random.choice(OPS), self.random.choice([512, 1024])
        ours, theirs = Submitted(op, length=size), Submitted(op, length=size)
        self.direct.submit_or_wait(ours.bio)
        self.rig.node.submit(theirs.bio)
        self.pairs.append((ours, theirs))

    def finish(self) -> None:
        self.direct.destroy()
        self.rig.node.destroy()
        self.compare()
        for pair in self.channels:
            pair.direct.close()
            pair.file.close()
            self.compare()
        assert all(ours.result is not None for ours, _ in self.pairs)

    def compare(self) -> None:
        assert_one_place(self.direct, [ours for ours, _ in self.pairs])
        assert_one_place(self.rig.target, [theirs for _, theirs in self.pairs])
        assert [ours.result for ours, _ in self.pairs] == [theirs.result for _, theirs in self.pairs]
        assert self.direct.state == self.rig.target.state


class Pair:
    """The same channel on both targets, with what is half done on it."""

    def __init__(self, direct: Channel, file: NodeFile) -> None:
        self.direct, self.file = direct, file
        self.half_read = 0
        self.half_answered = 0
        self.whole: list[tuple[int, BioOp, int]] = []

    def go_on(self, random: Random) -> None:
        if random.random() < 0.5:
            self.read()
        else:
            self.answer(random)

    def read(self) -> None:
        if not self.half_read:
            if (message := self.direct.take()) is None:
                with pytest.raises(SnapdError):
                    self.file.read(40)
                return
            bio = message.bio
            self.half_read = 40 + (bio.length if bio.op is BioOp.WRITE else 0)
            self.reading = (message.seq, bio.op, bio.length)
            self.half_read -= len(self.file.read(17))
            return
        while self.half_read:
            self.half_read -= len(self.file.read(300))
        self.direct.handed_over()
        self.whole.append(self.reading)

    def answer(self, random: Random) -> None:
        if self.half_answered:
            assert self.file.write(bytes(self.half_answered)) == self.half_answered
            self.half_answered = 0
            self.direct.answered()
            return
        valid = [one for one in self.whole if self.direct.awaits(one[0])]
        if not valid:
            return
        seq, op, length = one = random.choice(valid)
        self.whole.remove(one)
        code = random.choice([Answer.SUCCESS, Answer.SUCCESS, Answer.ERROR])
        assert self.file.write(answer_header(seq, code)) == 40
        if self.direct.answer(seq, code) is not None:
            assert op is BioOp.READ
            self.half_answered = length - self.file.write(bytes(100))


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_agree(seed: int) -> None:
    """DMU-4, DMU-52, DMU-75: half-read and half-answered messages too are in one place, whatever comes between."""
    walk = HalfWalk(seed)
    for _ in range(STEPS):
        walk.step()
    walk.finish()

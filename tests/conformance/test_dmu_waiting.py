"""Backpressure: who waits for room in the queue (DMU-81 to DMU-84, DMU-143, DMU-183)."""

import errno

import pytest
from dmurig import EIO, OK, NodeRig, Rig, Submitted, assert_one_place, raises, read_one, serve

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.dmuser.message import Flag
from snapd.dmuser.target import QUEUE_MESSAGES, QUEUE_PAYLOAD_BYTES, WAITING_BIOS

GRACE_MS = 10_000


def full(rig: Rig) -> list[Submitted]:
    return [rig.submit() for _ in range(QUEUE_MESSAGES)]


def test_waiters_are_served_in_order_of_arrival() -> None:
    """DMU-143, DMU-81, DMU-84, DMU-137: a full queue makes submitters wait; they take their numbers in that order."""
    rig = Rig()
    bios = full(rig)
    waiting = [rig.wait_in_line(sector=i) for i in range(300)]
    assert rig.target.queued == QUEUE_MESSAGES
    channel = rig.target.open()
    seen = [serve(channel) for _ in range(QUEUE_MESSAGES + 300)]
    assert [message.seq for message in seen] == list(range(QUEUE_MESSAGES + 300))
    assert [message.bio.sector for message in seen[QUEUE_MESSAGES:]] == list(range(300))
    assert {bio.result for bio in [*bios, *waiting]} == {OK}


def test_nobody_overtakes_the_line() -> None:
    """DMU-143: while somebody waits nobody else gets in, not even a bio for which there would be room."""
    rig = Rig()
    rig.submit(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES)
    large = rig.wait_in_line(BioOp.WRITE, length=SECTOR_BYTES)
    small = rig.wait_in_line()
    assert not rig.target.has_room()
    with raises(errno.EAGAIN):
        rig.submit()
    channel = rig.target.open()
    assert [serve(channel).bio.op for _ in range(3)] == [BioOp.WRITE, BioOp.WRITE, BioOp.READ]
    assert (large.result, small.result) == (OK, OK)


def test_a_large_write_gets_its_turn() -> None:
    """DMU-183, DMU-143: above the payload limit it is admitted alone, and reads that came later do not starve it."""
    rig = Rig()
    rig.submit(BioOp.WRITE)
    large = rig.wait_in_line(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES + SECTOR_BYTES)
    next_one = rig.wait_in_line(BioOp.WRITE)
    channel = rig.target.open()
    read_one(channel)
    assert rig.target.queued == 1
    assert read_one(channel).bio is large.bio
    assert read_one(channel).bio is next_one.bio


def test_nowait_does_not_wait() -> None:
    """DMU-143: EAGAIN for a bio with NOWAIT, which takes no number; without need to wait it is taken like any other."""
    rig = Rig()
    rig.wait_in_line(flags=int(Flag.NOWAIT))
    full_after = [rig.submit() for _ in range(QUEUE_MESSAGES - 1)]
    with raises(errno.EAGAIN):
        rig.wait_in_line(flags=int(Flag.NOWAIT))
    assert full_after[-1].result is None
    assert rig.target.queued == QUEUE_MESSAGES


def test_the_line_is_bounded() -> None:
    """DMU-143: so many wait and no more; who is refused keeps its bio."""
    rig = Rig()
    full(rig)
    waiting = [rig.wait_in_line() for _ in range(WAITING_BIOS)]
    with raises(errno.EAGAIN):
        rig.wait_in_line()
    assert {bio.result for bio in waiting} == {None}


def test_refused_at_once_not_after_the_wait() -> None:
    """DMU-144, DMU-13: what is not taken does not stand in line."""
    rig = Rig()
    full(rig)
    with raises(errno.EOPNOTSUPP):
        rig.wait_in_line(BioOp.WRITE_SAME)


def test_restart_drains_queue_and_line() -> None:
    """DMU-143, DMU-148: with a stopped daemon nothing fails; the next one inside the grace serves all."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    bios = full(rig) + [rig.wait_in_line() for _ in range(200)]
    for _ in range(50):
        read_one(channel)
    assert_one_place(rig.target, bios)
    channel.close()
    assert_one_place(rig.target, bios)
    rig.advance(GRACE_MS - 1)
    again = rig.target.open()
    assert [serve(again).seq for _ in bios] == list(range(len(bios)))
    assert {bio.result for bio in bios} == {OK}


def test_time_out_in_turn() -> None:
    """DMU-91, DMU-143: a waiter's attach timeout runs from when it is queued, as room comes from those that failed."""
    rig = Rig()
    bios = full(rig)
    waiting = rig.wait_in_line()
    rig.advance(4000)
    assert {bio.result for bio in bios} == {EIO}
    assert waiting.result is None
    rig.advance(4000)
    assert waiting.result == EIO


@pytest.mark.parametrize("end", ["destroy", "give_up"])
def test_the_line_ends_with_the_target(end: str) -> None:
    """DMU-106, DMU-184: who waits fails with the queue, each once."""
    rig = Rig()
    bios = full(rig) + [rig.wait_in_line() for _ in range(10)]
    getattr(rig.target, end)()
    assert {bio.result for bio in bios} == {EIO}
    assert_one_place(rig.target, bios)


def test_waiting_holds_no_lock() -> None:
    """DMU-83, DMU-143: with the queue full and a line before it, daemons still finish messages, which makes room."""
    rig = NodeRig()
    bios = [rig.submit() for _ in range(QUEUE_MESSAGES + 100)]
    assert rig.target.queued == QUEUE_MESSAGES
    channel = rig.target.open()
    with rig.node.change():
        for _ in bios:
            serve(channel)
    assert {bio.result for bio in bios} == {OK}

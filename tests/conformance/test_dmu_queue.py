"""Numbers, order, answers, bounds, replay (DMU-39 to DMU-46, DMU-61 to DMU-80, DMU-137 to DMU-149, DMU-183)."""

import errno

import pytest
from dmurig import EIO, OK, Rig, Submitted, raises, read_one, serve

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.block.errors import SnapdError
from snapd.dmuser.message import SUSPECTS
from snapd.dmuser.target import MAX_REPLAYS, QUEUE_MESSAGES, QUEUE_PAYLOAD_BYTES, REPLAYED_OPS

GRACE_MS = 10_000


@pytest.mark.parametrize("channels", [1, 4, 16, 64])
def test_numbers(channels: int) -> None:
    """DMU-42 to DMU-45, DMU-137: numbers from 0, oldest first, increasing on each channel, no gap in the union."""
    rig = Rig()
    for _ in range(QUEUE_MESSAGES):
        rig.submit()
    opened = [rig.target.open() for _ in range(channels)]
    seen = [(i % channels, read_one(opened[i % channels]).seq) for i in range(QUEUE_MESSAGES)]
    assert [seq for _, seq in seen] == list(range(QUEUE_MESSAGES))


def test_answers_in_any_order() -> None:
    """DMU-46: answers need not follow the numbers."""
    rig = Rig()
    bios = [rig.submit() for _ in range(5)]
    channel = rig.target.open()
    numbers = [read_one(channel).seq for _ in bios]
    for seq in reversed(numbers):
        channel.answer(seq, 0)
        channel.answered()
        assert bios[seq].result == OK


def test_a_flush_waits_for_nothing_but_its_own_answer() -> None:
    """DMU-150, DMU-46: the target orders nothing; a flush may end while an older write is still with the daemon."""
    rig = Rig()
    channel = rig.target.open()
    write, flush = rig.submit(BioOp.WRITE), rig.submit(BioOp.FLUSH, length=0)
    read_one(channel)
    channel.answer(read_one(channel).seq, 0)
    assert (write.result, flush.result) == (None, OK)


@pytest.mark.parametrize(
    ("code", "result"),
    [(1, EIO), (2, errno.EOPNOTSUPP), (3, EIO), (1 << 63, EIO)],
    ids=["ERROR", "UNSUPPORTED", "unknown", "huge"],
)
def test_answer_codes(code: int, result: int) -> None:
    """DMU-12, DMU-65 to DMU-67: an error ends the bio at the header, and the channel stays usable."""
    rig = Rig()
    failed, next_one = rig.submit(), rig.submit()
    channel = rig.target.open()
    assert channel.answer(read_one(channel).seq, code) is None
    assert failed.result == result
    serve(channel)
    assert next_one.result == OK


def test_success_without_data_ends_at_the_header() -> None:
    """DMU-64: only a READ takes data after SUCCESS."""
    rig = Rig()
    channel = rig.target.open()
    for op in (BioOp.WRITE, BioOp.FLUSH, BioOp.DISCARD, BioOp.WRITE_ZEROES, BioOp.SECURE_ERASE):
        bio = rig.submit(op)
        assert channel.answer(read_one(channel).seq, 0) is None
        assert bio.result == OK


@pytest.mark.parametrize("case", ["never issued", "half read", "answered", "wrong channel"])
def test_invalid_number_poisons(case: str) -> None:
    """DMU-39, DMU-40, DMU-61, DMU-69, DMU-71, DMU-139: the channel is closed, and what it held fails at once."""
    rig = Rig()
    channel, other = rig.target.open(), rig.target.open()
    held = rig.submit()
    seq = read_one(channel).seq
    if case == "never issued":
        seq = 99
    elif case == "half read":
        rig.submit()
        half_read = channel.take()
        assert half_read is not None
        seq = half_read.seq
    elif case == "answered":
        rig.submit()
        seq = serve(channel).seq
    else:
        rig.submit()
        seq = read_one(other).seq
    with pytest.raises(SnapdError) as error:
        channel.answer(seq, 0)
    assert error.value.errno == errno.EINVAL
    assert held.result == EIO
    rig.submit()
    assert channel.take() is None
    assert other.take() is not None


def test_half_received_answer_is_no_answer() -> None:
    """DMU-75: a SUCCESS header whose data has not come whole counts for nothing when the channel closes."""
    rig = Rig()
    bio = rig.submit()
    channel = rig.target.open()
    assert channel.answer(read_one(channel).seq, 0) is not None
    assert bio.result is None
    channel.close()
    assert bio.result == EIO


def test_close_fails_messages_in_every_place() -> None:
    """DMU-76, DMU-77: being read, awaiting and being answered all end inside close; nothing goes elsewhere."""
    rig = Rig()
    channel, other = rig.target.open(), rig.target.open()
    answering, awaiting, reading = rig.submit(), rig.submit(), rig.submit()
    first = read_one(channel)
    read_one(channel)
    channel.take()
    channel.answer(first.seq, 0)
    channel.close()
    assert [bio.result for bio in (answering, awaiting, reading)] == [EIO] * 3
    assert other.take() is None
    channel.close()


def test_completion_may_submit_again() -> None:
    """DMU-117, DMU-140, DMU-41: completions run outside every state change, also when they come back in."""
    rig = Rig()
    channel = rig.target.open()
    depth: list[int] = []
    deepest: list[int] = []

    def on_complete(_bio: Bio, _: int) -> None:
        depth.append(1)
        deepest.append(len(depth))
        if len(deepest) < 50:
            rig.target.submit(Bio(BioOp.FLUSH, 0, 0, None, on_complete))
            serve(channel)
        depth.pop()

    rig.target.submit(Bio(BioOp.FLUSH, 0, 0, None, on_complete))
    serve(channel)
    assert deepest == [1] * 50


def test_completion_of_a_failed_queue_may_submit() -> None:
    """DMU-117: a submission from within a failing queue gets its own place and its own end."""
    rig = Rig(attach_timeout_ms=100)
    later: list[Submitted] = []
    rig.target.submit(Bio(BioOp.READ, 0, 0, memoryview(b""), lambda _bio, _: later.append(rig.submit())))
    bystander = rig.submit()
    rig.advance(100)
    assert bystander.result == EIO
    assert [bio.result for bio in later] == [None]
    rig.advance(100)
    assert later[0].result == EIO


def test_queue_is_bounded_by_messages() -> None:
    """DMU-143: the 129th unread message is refused with EAGAIN; reading one makes room; nothing fails."""
    rig = Rig()
    bios = [rig.submit() for _ in range(QUEUE_MESSAGES)]
    assert not rig.target.has_room()
    with pytest.raises(SnapdError) as error:
        rig.submit()
    assert error.value.errno == errno.EAGAIN
    channel = rig.target.open()
    read_one(channel)
    assert rig.target.has_room()
    assert rig.submit().result is None
    assert {bio.result for bio in bios} == {None}


def test_queue_is_bounded_by_payload() -> None:
    """DMU-143, DMU-183: 8 MiB of WRITE payload; a larger message is admitted when no other payload is queued."""
    rig = Rig()
    rig.submit(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES + SECTOR_BYTES)
    assert rig.target.has_room()
    assert not rig.target.has_room(SECTOR_BYTES)
    with pytest.raises(SnapdError):
        rig.submit(BioOp.WRITE)
    read_one(rig.target.open())
    rig.submit(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES)
    assert not rig.target.has_room(SECTOR_BYTES)


def test_payload_room_survives_replay_and_failure() -> None:
    """DMU-143, DMU-148: payload that is queued again counts again, and not any more once it failed."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    rig.submit(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES)
    read_one(channel)
    assert rig.target.has_room(SECTOR_BYTES)
    channel.close()
    assert not rig.target.has_room(SECTOR_BYTES)
    rig.advance(GRACE_MS)
    assert rig.target.has_room(QUEUE_PAYLOAD_BYTES)


def test_stopped_daemon_then_restart_drains() -> None:
    """DMU-143, DMU-148: with the queue full behind a dead daemon nobody fails, and the next daemon serves all."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    bios = [rig.submit() for _ in range(QUEUE_MESSAGES)]
    for _ in range(40):
        read_one(channel)
    bios += [rig.submit() for _ in range(40)]
    channel.close()
    rig.advance(GRACE_MS - 1)
    again = rig.target.open()
    assert [serve(again).seq for _ in bios] == list(range(len(bios)))
    assert {bio.result for bio in bios} == {OK}


def test_replay_keeps_numbers_and_order() -> None:
    """DMU-148: what was read and not answered comes first, in number order, with the same numbers and payload."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    ops = sorted(REPLAYED_OPS)
    bios = [rig.submit(op) for op in ops]
    unread = rig.submit()
    bios[1].memory[:4] = b"data"
    messages = [read_one(channel) for _ in ops]
    channel.answer(messages[0].seq, 0)
    channel.close()
    assert {bio.result for bio in bios} == {None}
    again = rig.target.open()
    replayed = [read_one(again) for _ in range(len(ops) + 1)]
    assert [message.seq for message in replayed] == list(range(len(ops) + 1))
    assert bytes(replayed[1].bio.data or b"")[:4] == b"data"
    for message in replayed:
        if again.answer(message.seq, 0) is not None:
            again.answered()
    assert {bio.result for bio in [*bios, unread]} == {OK}


def test_replay_merges_with_the_queue_in_number_order() -> None:
    """DMU-148, DMU-97: given back while another channel is open, a message stands before all younger ones."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    one, two = rig.target.open(), rig.target.open()
    for _ in range(4):
        rig.submit()
    read_one(one)
    read_one(two)
    read_one(one)
    one.close()
    assert [read_one(two).seq for _ in range(3)] == [0, 2, 3]


def test_what_may_not_run_twice_fails() -> None:
    """DMU-148, DMU-149: an op outside the list fails at the close, also inside the grace."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    erase, read = rig.submit(BioOp.SECURE_ERASE), rig.submit()
    read_one(channel)
    read_one(channel)
    channel.close()
    assert (erase.result, read.result) == (EIO, None)


def test_grace_ends() -> None:
    """DMU-148, DMU-99, DMU-100, DMU-103: queued, replayed and new messages wait to the end of the grace, then fail."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    replayed, queued = rig.submit(), rig.submit()
    read_one(channel)
    channel.close()
    rig.advance(6000)
    new = rig.submit()
    rig.advance(3999)
    assert [bio.result for bio in (replayed, queued, new)] == [None] * 3
    rig.advance(1)
    assert [bio.result for bio in (replayed, queued, new)] == [EIO] * 3
    late = rig.submit()
    rig.target.expire()
    assert late.result == EIO


def test_half_received_answer_is_replayed() -> None:
    """DMU-75, DMU-148: the replayed message is answered again from its beginning."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    bio = rig.submit()
    channel = rig.target.open()
    assert channel.answer(read_one(channel).seq, 0) is not None
    channel.close()
    assert bio.result is None
    assert serve(rig.target.open()).seq == 0
    assert bio.result == OK


def test_reattach_inside_the_grace_clears_terminated() -> None:
    """DMU-104: with the restart option a new daemon begins a new life."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    rig.submit()
    read_one(channel)
    channel.close()
    assert rig.target.state == "terminated"
    rig.target.open().close()
    assert rig.target.state == "never"


def test_message_that_ends_every_daemon_ends_itself() -> None:
    """DMU-149: replays of one message are bounded; after the last one it fails, and others go on."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    poison = rig.submit()
    for _ in range(MAX_REPLAYS):
        channel = rig.target.open()
        read_one(channel)
        channel.close()
        assert poison.result is None
    channel = rig.target.open()
    read_one(channel)
    channel.close()
    assert poison.result == EIO


def test_a_deep_queue_survives_the_deaths_of_its_daemons() -> None:
    """DMU-149: only the oldest that a daemon had may have ended it; the others are given back ever again."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    bios = [rig.submit() for _ in range(SUSPECTS + 8)]
    for _ in range(MAX_REPLAYS + 1):
        channel = rig.target.open()
        channel.handed_over(len(channel.take_all(QUEUE_MESSAGES)))
        channel.close()
    assert [bio.result for bio in bios] == [EIO] * SUSPECTS + [None] * 8
    again = rig.target.open()
    assert [serve(again).seq for _ in range(8)] == list(range(SUSPECTS, SUSPECTS + 8))


def test_give_up_fails_now_and_later() -> None:
    """DMU-184: after a crash loop nothing waits for the grace any more."""
    rig = Rig(restart_grace_ms=GRACE_MS)
    channel = rig.target.open()
    queued = rig.submit()
    read_one(channel)
    channel.close()
    rig.target.give_up()
    assert queued.result == EIO
    late = rig.submit()
    rig.target.expire()
    assert late.result == EIO


def test_a_batch_of_answers_is_taken_in_before_it_completes() -> None:
    """DMU-117, DMU-140, DMU-46, DMU-65: the first completion finds all answers of its batch taken in."""
    rig = Rig()
    channel = rig.target.open()
    seen: list[tuple[int, int]] = []

    def on_complete(_bio: Bio, number: int) -> None:
        seen.append((number, sum(channel.awaits(seq) for seq in range(3))))

    for _ in range(3):
        rig.target.submit(Bio(BioOp.READ, 0, SECTOR_BYTES, None, on_complete, place=0))
    channel.handed_over(len(channel.take_all(10)))
    channel.answer_all([(2, 0), (0, 1), (1, 2)])
    assert seen == [(OK, 0), (EIO, 0), (errno.EOPNOTSUPP, 0)]


def test_a_batch_with_an_invalid_number() -> None:
    """DMU-69, DMU-71: what came before it counts, what comes behind it does not, and the channel is closed."""
    rig = Rig()
    channel = rig.target.open()
    bios = [rig.submit(BioOp.FLUSH, length=0) for _ in range(3)]
    channel.handed_over(len(channel.take_all(10)))
    with raises(errno.EINVAL):
        channel.answer_all([(0, 0), (7, 0), (1, 0)])
    assert [bio.result for bio in bios] == [OK, EIO, EIO]
    assert not channel.is_open


@pytest.mark.parametrize("limit", [1, 3, QUEUE_MESSAGES, 1000])
def test_taking_many_at_once(limit: int) -> None:
    """DMU-43, DMU-143: up to so many of the oldest; the room for messages and payload they had is free again."""
    rig = Rig()
    channel = rig.target.open()
    for _ in range(QUEUE_MESSAGES):
        rig.submit(BioOp.WRITE, length=QUEUE_PAYLOAD_BYTES // QUEUE_MESSAGES)
    assert not rig.target.has_room(SECTOR_BYTES)
    taken = min(limit, QUEUE_MESSAGES)
    assert [message.seq for message in channel.take_all(limit)] == list(range(taken))
    assert rig.target.has_room(taken * QUEUE_PAYLOAD_BYTES // QUEUE_MESSAGES)
    assert rig.target.queued == QUEUE_MESSAGES - taken

"""The truth table of the attach timeout, row by row, with the clock in hand (DMU-90 to DMU-111)."""

import errno

import pytest
from dmurig import EIO, OK, Rig, read_one, serve

from snapd.block.errors import SnapdError
from snapd.dmuser.admission import ANDROID


def test_never_attached_waits_then_fails() -> None:
    """DMU-91, DMU-92: queued with a timer of 4000 ms; when it fires the message fails and leaves the queue."""
    rig = Rig()
    bio = rig.submit()
    assert rig.target.state == "never"
    assert rig.target.next_deadline_ms() == 4000
    rig.advance(3999)
    assert bio.result is None
    rig.advance(1)
    assert bio.result == EIO
    assert rig.target.queued == 0
    assert rig.target.next_deadline_ms() is None


def test_each_message_has_its_own_timer() -> None:
    """DMU-91, DMU-92: only the message whose time is over fails; the others keep their place."""
    rig = Rig()
    first = rig.submit()
    rig.advance(1000)
    second = rig.submit()
    rig.advance(3000)
    assert (first.result, second.result) == (EIO, None)
    assert rig.target.next_deadline_ms() == 5000
    assert serve(rig.target.open()).seq == 1
    assert second.result == OK


def test_attached_in_time() -> None:
    """DMU-93: a message read before its timer fires is served normally, however late its answer."""
    rig = Rig()
    bio = rig.submit()
    rig.advance(3999)
    channel = rig.target.open()
    message = read_one(channel)
    rig.advance(100_000)
    assert bio.result is None
    channel.answer(message.seq, 0)
    channel.answered()
    assert bio.result == OK


def test_timer_fires_while_attached_and_unread() -> None:
    """DMU-94, DMU-110, DMU-113: opening cancels no timer, but one that fires then does nothing and is spent."""
    rig = Rig()
    bio = rig.submit()
    channel = rig.target.open()
    assert rig.target.next_deadline_ms() == 4000
    rig.advance(4000)
    assert bio.result is None
    assert rig.target.next_deadline_ms() is None
    serve(channel)
    assert bio.result == OK


def test_attached_new_message_waits_without_limit() -> None:
    """DMU-95, DMU-96, DMU-87, DMU-169: no timer while a channel is open, read or not."""
    rig = Rig()
    channel = rig.target.open()
    unread, read = rig.submit(), rig.submit()
    read_one(channel)
    assert rig.target.next_deadline_ms() is None
    rig.advance(10_000_000)
    assert (unread.result, read.result) == (None, None)
    assert rig.target.stuck_channel() is None


def test_request_timeout_names_the_stuck_channel() -> None:
    """DMU-96, DMU-184: a request that was read is watched from then on; the bio itself does not fail by it."""
    rig = Rig(request_timeout_ms=30_000)
    idle, busy = rig.target.open(), rig.target.open()
    bio = rig.submit()
    rig.advance(5000)
    read_one(busy)
    assert rig.target.next_deadline_ms() == 35_000
    rig.advance(29_999)
    assert rig.target.stuck_channel() is None
    rig.advance(1)
    assert rig.target.stuck_channel() is busy
    assert bio.result is None
    busy.close()
    assert rig.target.stuck_channel() is None
    assert bio.result == EIO
    assert idle.is_open


def test_one_of_several_channels_closes() -> None:
    """DMU-97, DMU-98, DMU-78: what it had read fails inside close, what is queued is not touched."""
    rig = Rig()
    leaving, staying = rig.target.open(), rig.target.open()
    in_flight, elsewhere, queued = rig.submit(), rig.submit(), rig.submit()
    read_one(leaving)
    kept = read_one(staying)
    leaving.close()
    assert (in_flight.result, elsewhere.result, queued.result) == (EIO, None, None)
    staying.answer(kept.seq, 0)
    staying.answered()
    serve(staying)
    assert (elsewhere.result, queued.result) == (OK, OK)


def test_last_close_fails_in_flight_and_queued() -> None:
    """DMU-99, DMU-100, DMU-79, DMU-169: in flight fails inside close, queued as soon as the timers run."""
    rig = Rig()
    channel = rig.target.open()
    in_flight, queued = rig.submit(), rig.submit()
    read_one(channel)
    channel.close()
    assert rig.target.state == "terminated"
    assert in_flight.result == EIO
    assert queued.result is None
    assert rig.target.next_deadline_ms() == 0
    rig.target.expire()
    assert queued.result == EIO


@pytest.mark.parametrize("waited_ms", [1000, 4000], ids=["DMU-101 timer running", "DMU-102 timer spent"])
def test_last_close_does_not_wait_for_the_first_timer(waited_ms: int) -> None:
    """DMU-101, DMU-102: a message from before the attach fails at once too, whether its timer runs or is spent."""
    rig = Rig()
    read, unread = rig.submit(), rig.submit()
    channel = rig.target.open()
    rig.advance(waited_ms)
    read_one(channel)
    channel.close()
    rig.target.expire()
    assert (read.result, unread.result) == (EIO, EIO)


def test_terminated_new_message_fails_at_once() -> None:
    """DMU-103: after the daemon is gone a new message fails as soon as the timers run, never inside `submit`."""
    rig = Rig()
    channel = rig.target.open()
    rig.submit()
    read_one(channel)
    channel.close()
    rig.advance(60_000)
    late = rig.submit()
    assert rig.target.next_deadline_ms() == 60_000
    rig.target.expire()
    assert late.result == EIO


def test_reattach_serves_and_stays_terminated_without_grace() -> None:
    """DMU-104, DMU-105: who attaches before the timers run gets the queue; the next close is final again."""
    rig = Rig()
    channel = rig.target.open()
    rig.submit()
    read_one(channel)
    queued = rig.submit()
    channel.close()
    again = rig.target.open()
    rig.target.expire()
    serve(again)
    assert queued.result == OK
    again.close()
    assert rig.target.state == "terminated"


def test_probe_open_changes_nothing() -> None:
    """DMU-119 (against DMU-111): only a channel that has read a message makes a target "terminated" by closing."""
    rig = Rig()
    before = rig.submit()
    probe = rig.target.open()
    during = rig.submit()
    rig.advance(1000)
    probe.close()
    assert rig.target.state == "never"
    rig.advance(3000)
    assert (before.result, during.result) == (EIO, None)
    rig.advance(1000)
    assert during.result == EIO


def test_destroy_fails_the_queue_at_once() -> None:
    """DMU-106, DMU-107, DMU-57, DMU-73: queued fails in destroy, read may still be answered, nothing new is read."""
    rig = Rig()
    channel = rig.target.open()
    read, queued = rig.submit(), rig.submit()
    message = read_one(channel)
    rig.target.destroy()
    assert (read.result, queued.result) == (None, EIO)
    assert rig.target.state == "destroyed"
    assert channel.take() is None
    channel.answer(message.seq, 0)
    channel.answered()
    assert read.result == OK
    with pytest.raises(SnapdError) as error:
        rig.submit()
    assert error.value.errno == errno.ENODEV


def test_destroy_then_close_fails_what_was_not_answered() -> None:
    """DMU-107, DMU-80: read and never answered ends at the close, grace or not; DMU-34: no new channel."""
    rig = Rig(restart_grace_ms=10_000)
    channel = rig.target.open()
    read = rig.submit()
    read_one(channel)
    rig.target.destroy()
    channel.close()
    assert read.result == EIO
    with pytest.raises(SnapdError):
        rig.target.open()


def test_changed_timeout_is_for_new_messages() -> None:
    """DMU-108, DMU-109: what is queued keeps its deadline; 0 fails a new one as soon as the timers run."""
    rig = Rig()
    old = rig.submit()
    rig.target.attach_timeout_ms = 0
    new = rig.submit()
    rig.target.expire()
    assert (old.result, new.result) == (None, EIO)
    rig.advance(4000)
    assert old.result == EIO


def test_presence_is_the_number_of_channels() -> None:
    """DMU-85, DMU-86, DMU-90: with two channels, closing one leaves the target attached."""
    rig = Rig()
    one, two = rig.target.open(), rig.target.open()
    rig.submit()
    read_one(one)
    one.close()
    assert rig.target.state == "attached"
    two.close()
    assert rig.target.state == "terminated"


def test_writes_and_reads_alike() -> None:
    """DMU-91, DMU-100: the table does not depend on the operation."""
    rig = Rig()
    bios = [rig.submit(op) for op in sorted(ANDROID.ops)]
    rig.advance(4000)
    assert [bio.result for bio in bios] == [EIO] * len(bios)

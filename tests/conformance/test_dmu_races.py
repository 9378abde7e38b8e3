"""The races of the kernel's driver as schedules on ours (DMU-112 to DMU-125, DMU-160, DMU-172, DMU-173)."""

import errno
import gc
import select
import sys

import pytest
from dmurig import (
    EIO,
    OK,
    Call,
    NodeRig,
    Rig,
    Submitted,
    answer_header,
    assert_one_place,
    raises,
    read_one,
    read_request,
    write_all,
)

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.dmuser.target import QUEUE_MESSAGES


def test_two_sleeping_readers_of_one_file() -> None:
    """DMU-112, DMU-134, DMU-173: both wake for one WRITE; one has its header, the other its data, nothing is lost."""
    rig = NodeRig()
    file = rig.node.open()
    readers = [Call(file.read, 1 << 16) for _ in range(2)]
    rig.schedule.reached("sleep")
    rig.schedule.reached("sleep")
    write = Submitted(BioOp.WRITE)
    write.memory[:] = b"w" * SECTOR_BYTES
    rig.schedule.hold("copy out")
    rig.node.submit(write.bio)
    rig.schedule.reached("copy out")
    # The other one has looked, found the message begun and a copy under way, and sleeps again.
    rig.schedule.reached("sleep")
    rig.schedule.release("copy out")
    header, payload = sorted((reader.result() for reader in readers), key=len)
    assert (len(header), payload) == (40, b"w" * SECTOR_BYTES)
    assert file.write(answer_header(0)) == 40
    assert write.result == OK


def test_a_second_reader_waits_for_the_one_that_copies() -> None:
    """DMU-112, DMU-134: while one read copies, another on the same file waits, and goes on behind it."""
    rig = NodeRig()
    file = rig.node.open()
    rig.submit(BioOp.WRITE)
    rig.schedule.hold("copy out")
    first = Call(file.read, 40)
    rig.schedule.reached("copy out")
    second = Call(file.read, 1 << 16)
    rig.schedule.reached("sleep")
    rig.schedule.release("copy out")
    assert (len(first.result()), len(second.result())) == (40, SECTOR_BYTES)


def test_a_second_writer_waits_for_the_one_that_copies() -> None:
    """DMU-134, DMU-74: two writes of one file never mix; what the second brings stands behind the first."""
    rig = NodeRig()
    file = rig.node.open()
    read, flush = rig.submit(), rig.submit(BioOp.FLUSH, length=0)
    read_request(file)
    read_request(file)
    rig.schedule.hold("copy in")
    first = Call(file.write, answer_header(0) + b"r" * SECTOR_BYTES)
    rig.schedule.reached("copy in")
    second = Call(file.write, answer_header(1))
    # Another file's answers are not held up meanwhile (DMU-136).
    other = rig.node.open()
    elsewhere = rig.submit(BioOp.FLUSH, length=0)
    read_request(other)
    write_all(other, answer_header(2))
    assert elsewhere.result == OK
    rig.schedule.release("copy in")
    assert (first.result(), second.result()) == (552, 40)
    assert (read.result, bytes(read.memory), flush.result) == (OK, b"r" * SECTOR_BYTES, OK)


@pytest.mark.parametrize("end", ["close", "destroy"])
def test_a_timer_that_fired_under_a_daemon_hides_nothing(end: str) -> None:
    """DMU-113, DMU-114, DMU-102, DMU-172: fired while attached, then the daemon dies or the target goes: EIO, all."""
    rig = Rig()
    bios = [rig.submit() for _ in range(4)]
    channel = rig.target.open()
    rig.advance(4000)
    read_one(channel)
    if end == "destroy":
        rig.target.destroy()
        assert [bio.result for bio in bios] == [None, EIO, EIO, EIO]
    channel.close()
    rig.target.expire()
    assert [bio.result for bio in bios] == [EIO] * 4
    assert rig.target.queued == 0


@pytest.mark.parametrize("end", ["expire", "destroy", "give_up"])
def test_the_failing_queue_is_nobody_elses(end: str) -> None:
    """DMU-115, DMU-121: completions that go back into the target find it without the messages that are failing."""
    rig = Rig()
    seen: list[tuple[int, int]] = []

    def on_complete(_bio: Bio, number: int) -> None:
        seen.append((number, rig.target.queued))
        rig.target.expire()
        rig.target.destroy()

    for _ in range(5):
        rig.target.submit(Bio(BioOp.FLUSH, 0, 0, None, on_complete))
    rig.clock.advance(4000)
    getattr(rig.target, end)()
    assert seen == [(EIO, 0)] * 5


def test_a_read_message_is_nobodys_but_the_readers() -> None:
    """DMU-116: claimed by a reader and half copied, neither its timer nor destroy ends it; the close does, once."""
    rig = NodeRig()
    bio = rig.submit(BioOp.WRITE)
    file = rig.node.open()
    rig.schedule.hold("copy out")
    reader = Call(file.read, 40)
    rig.schedule.reached("copy out")
    rig.advance(4000)
    rig.node.destroy()
    rig.advance(4000)
    assert bio.result is None
    rig.schedule.release("copy out")
    assert len(reader.result()) == 40
    assert len(file.read(SECTOR_BYTES)) == SECTOR_BYTES
    file.close()
    assert bio.result == EIO


@pytest.mark.parametrize("end", ["answer", "data", "close", "destroy", "expire", "poison"])
def test_completions_run_under_no_lock(end: str) -> None:
    """DMU-117, DMU-140: whatever ends a bio, its completion may submit, answer and destroy on the same node."""
    rig = NodeRig()
    free: list[bool] = []
    again: list[Submitted] = []

    def on_complete(_bio: Bio, _number: int) -> None:
        free.append(rig.node.lock.acquire(blocking=False))
        rig.node.lock.release()
        if end != "destroy":
            again.append(rig.submit(BioOp.FLUSH, length=0))
        if end == "answer":
            assert read_request(file)[0].seq == 1
            assert file.write(answer_header(1)) == 40

    data = memoryview(bytearray(SECTOR_BYTES))
    op = BioOp.READ if end == "data" else BioOp.WRITE
    bio = Bio(op, 0, SECTOR_BYTES, data, on_complete)
    file = rig.node.open()
    if end == "expire":
        file.close()
    rig.node.submit(bio)
    if end in ("destroy", "expire"):
        rig.clock.advance(4000)
    else:
        read_request(file)
    if end == "answer":
        file.write(answer_header(0))
        assert again[0].result == OK
    elif end == "data":
        write_all(file, answer_header(0) + bytes(SECTOR_BYTES))
    elif end == "poison":
        file.write(answer_header(9))
    elif end == "close":
        file.close()
    else:
        getattr(rig.node, end)()
    assert free == [True]


def test_a_write_is_over_before_its_completions() -> None:
    """DMU-140, DMU-62, DMU-134: what a completion begins to write is not the outer write's to go on with."""
    rig = NodeRig()
    file = rig.node.open()
    data = memoryview(bytearray(SECTOR_BYTES))
    rig.node.submit(Bio(BioOp.WRITE, 0, SECTOR_BYTES, data, lambda _bio, _: begun.append(file.write(answer_header(1)))))
    read = rig.submit()
    read_request(file)
    read_request(file)
    begun: list[int] = []
    assert file.write(answer_header(0) + b"behind") == 40
    assert begun == [40]
    write_all(file, b"r" * SECTOR_BYTES)
    assert (read.result, bytes(read.memory)) == (OK, b"r" * SECTOR_BYTES)


def test_the_lock_is_not_held_while_bytes_are_copied() -> None:
    """DMU-142, DMU-122: with a reader and a writer stopped in the middle of a copy, everybody else gets through."""
    rig = NodeRig()
    file = rig.node.open()
    read = rig.submit()
    read_request(file)
    rig.submit(BioOp.WRITE)
    rig.schedule.hold("copy out")
    rig.schedule.hold("copy in")
    reader = Call(file.read, 40)
    writer = Call(file.write, answer_header(0) + bytes(SECTOR_BYTES))
    rig.schedule.reached("copy out")
    rig.schedule.reached("copy in")
    others = [Call(rig.submit) for _ in range(64)]
    submitted = [other.result() for other in others]
    rig.advance(1)
    assert rig.node.open(nonblocking=True).poll()
    assert read.result is None
    rig.schedule.release("copy out")
    rig.schedule.release("copy in")
    assert (len(reader.result()), writer.result()) == (40, 552)
    assert read.result == OK
    assert rig.target.queued == len(submitted)


def test_memory_goes_back_when_nobody_copies_any_more() -> None:
    """DMU-76, DMU-152: a close in the middle of a copy ends the message only when the copy is over."""
    rig = NodeRig()
    file = rig.node.open()
    bio = rig.submit(BioOp.WRITE)
    file.read(40)
    rig.schedule.hold("copy out")
    reader = Call(file.read, SECTOR_BYTES)
    rig.schedule.reached("copy out")
    closer = Call(file.close)
    with raises(errno.EBADF):
        # Once the close has begun, the file is closed to everybody.
        while True:
            file.poll()
    assert file._channel.is_open
    rig.schedule.release("copy out")
    reader.result()
    closer.result()
    assert bio.result == EIO


def test_poison_waits_for_the_reader_that_copies() -> None:
    """DMU-71, DMU-152: a poisoned channel gives its half-read message up when its reader has finished its copy."""
    rig = NodeRig()
    file = rig.node.open()
    bio = rig.submit(BioOp.WRITE)
    file.read(40)
    rig.schedule.hold("copy out")
    reader = Call(file.read, SECTOR_BYTES)
    rig.schedule.reached("copy out")
    writer = Call(file.write, answer_header(7))
    while file.poll() & select.POLLOUT:
        pass
    assert file._channel.is_open
    rig.schedule.release("copy out")
    assert len(reader.result()) == SECTOR_BYTES
    assert writer.result() == 40
    assert bio.result == EIO


def test_probe_that_opens_and_closes() -> None:
    """DMU-119, DMU-111, DMU-171: it takes nothing from the attach timeout of who waits; only a reader's death does."""
    rig = Rig()
    bio = rig.submit()
    for _ in range(3):
        rig.target.open().close()
    rig.advance(3999)
    assert (bio.result, rig.target.state) == (None, "never")
    channel = rig.target.open()
    read_one(channel)
    channel.close()
    assert (bio.result, rig.target.state) == (EIO, "terminated")


def test_close_ends_every_message_once() -> None:
    """DMU-120, DMU-41: many messages in every place of a channel, one close, each bio completed exactly once."""
    rig = Rig()
    channel, other = rig.target.open(), rig.target.open()
    bios = [rig.submit(BioOp.READ if i % 2 else BioOp.WRITE) for i in range(QUEUE_MESSAGES)]
    messages = [read_one(channel) for _ in range(100)]
    channel.take()
    channel.take()
    assert channel.answer(messages[1].seq, 0) is not None
    channel.close()
    assert [bio.result for bio in bios] == [EIO] * 102 + [None] * 26
    assert_one_place(rig.target, bios)
    other.close()
    rig.target.expire()
    assert [bio.result for bio in bios] == [EIO] * QUEUE_MESSAGES


def test_destroy_with_two_channels_open() -> None:
    """DMU-123, DMU-88: what is queued fails in destroy itself, however many channels are open."""
    rig = Rig()
    channels = [rig.target.open() for _ in range(2)]
    queued = rig.submit()
    rig.target.destroy()
    assert queued.result == EIO
    for channel in channels:
        channel.close()


@pytest.mark.parametrize("op", [op for op in BioOp if op <= BioOp.SECURE_ERASE])
@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_may_remain_unread_of_a_finished_message(op: BioOp, code: int) -> None:
    """DMU-124: an answer to a READ that fails, or to a range without data, ends it as it is; nothing is expected."""
    rig = NodeRig()
    file = rig.node.open()
    bio = rig.submit(op, length=4096)
    read_request(file)
    assert file.write(answer_header(0, code) + b"") == 40
    assert (bio.result is None) == (op is BioOp.READ and not code)


@pytest.mark.parametrize("end", ["answer", "close", "destroy", "refuse", "poison", "replay"])
def test_a_bio_has_one_owner(end: str) -> None:
    """DMU-160, DMU-121: when a bio has ended, or was refused, nothing in the target refers to it any more."""
    rig = Rig(restart_grace_ms=1000 if end == "replay" else 0)
    submitted = Submitted(flags=1 << 30 if end == "refuse" else 0)
    before = sys.getrefcount(submitted.bio)
    channel = rig.target.open()
    if end == "refuse":
        with raises(errno.EOPNOTSUPP):
            rig.target.submit(submitted.bio)
    else:
        rig.target.submit(submitted.bio)
    if end in ("answer", "close", "poison", "replay"):
        seq = read_one(channel).seq
    if end == "answer":
        channel.answer(seq, 0)
        channel.answered()
    elif end == "poison":
        with raises(errno.EINVAL):
            channel.answer(99, 0)
    elif end == "destroy":
        rig.target.destroy()
    channel.close()
    if end == "replay":
        rig.advance(1000)
    assert (submitted.result is None) == (end == "refuse")
    gc.collect()
    after = sys.getrefcount(submitted.bio)
    assert after == before


@pytest.mark.parametrize("opens_first", [True, False])
def test_open_against_destroy(opens_first: bool) -> None:
    """DMU-141, DMU-34: before, it is a whole channel on a target that is going; afterwards ENXIO."""
    rig = NodeRig()
    bio = rig.submit()
    if opens_first:
        file = rig.node.open()
        assert read_request(file)[0].seq == 0
        rig.node.destroy()
        write_all(file, answer_header(0) + bytes(SECTOR_BYTES))
        assert bio.result == OK
        return
    rig.node.destroy()
    with raises(errno.ENXIO):
        rig.node.open()
    assert bio.result == EIO

"""The control node in memory: reads, writes and the other file operations (DMU-50 to DMU-75, DMU-126 to DMU-141)."""

import errno
import select
import threading
from random import Random

import pytest
from dmurig import EIO, OK, PATIENCE_S, Call, NodeRig, Submitted, answer_header, raises, read_request, write_all

from snapd.block.bio import SECTOR_BYTES, Bio, BioOp
from snapd.dmuser.message import Answer
from snapd.dmuser.node import NodeFile

MIB = 1 << 20


def number_of(file: NodeFile) -> int:
    """The number of the next whole message."""
    return read_request(file)[0].seq


class TestReading:
    def test_a_read_stays_on_one_side_of_the_border(self) -> None:
        """DMU-50, DMU-164: with 64 KiB of room a WRITE gives 40 bytes, then its data, then the next message."""
        rig = NodeRig()
        file = rig.node.open()
        rig.submit(BioOp.WRITE, length=1024).memory[:] = b"w" * 1024
        rig.submit()
        assert [len(file.read(65536)) for _ in range(3)] == [40, 1024, 40]

    def test_several_buffers_do_not_cross_the_border_either(self) -> None:
        """DMU-133, DMU-164: readv fills its buffers in turn, up to the end of the header; writev takes as many."""
        rig = NodeRig()
        file = rig.node.open()
        write = rig.submit(BioOp.WRITE, length=512)
        write.memory[:] = bytes(range(256)) * 2
        small, large = bytearray(30), bytearray(600)
        assert file.readv([small, large]) == 40
        assert large[10:] == bytes(590)
        assert file.readv([small, large]) == 512
        assert bytes(small) + bytes(large[:482]) == bytes(write.memory)
        header = answer_header(0)
        assert file.writev([header[:3], header[3:], b"behind"]) == 40
        assert write.result == OK

    @pytest.mark.parametrize("step", [1, 13, 341, 65536])
    def test_reads_of_any_size(self, step: int) -> None:
        """DMU-51, DMU-52: the same bytes in the same order; the cursor lives between the reads, on one channel."""
        rig = NodeRig()
        file, other = rig.node.open(), rig.node.open(nonblocking=True)
        sizes = [512, 0, 1024]
        for i, size in enumerate(sizes):
            rig.submit(BioOp.WRITE, sector=i, length=size).memory[:] = bytes([i]) * size
        for i, size in enumerate(sizes):
            request, payload = read_request(file, step)
            assert (request.seq, request.sector, payload) == (i, i, bytes([i]) * size)
        with raises(errno.EAGAIN):
            other.read(40)

    def test_a_message_of_any_size_is_streamed(self) -> None:
        """DMU-178: nothing limits the length; what is not whole sectors of 4096 arrives as it is."""
        rig = NodeRig()
        file = rig.node.open()
        large = rig.submit(BioOp.WRITE, sector=3, length=16 * MIB)
        large.memory[-1] = 7
        odd = rig.submit(sector=5, length=1536)
        request, payload = read_request(file, MIB)
        assert (request.length, payload[-1]) == (16 * MIB, 7)
        assert read_request(file)[0][3:] == (5, 1536)
        write_all(file, answer_header(1) + b"r" * 1536)
        assert bytes(odd.memory) == b"r" * 1536

    def test_only_an_empty_queue_blocks(self) -> None:
        """DMU-53, DMU-54, DMU-135: a reader sleeps without a lock, writes on its channel go on, a message wakes it."""
        rig = NodeRig()
        file = rig.node.open()
        first = rig.submit(BioOp.FLUSH, length=0)
        read_request(file)
        sleeper = Call(file.read, 40)
        rig.schedule.reached("sleep")
        assert file.write(answer_header(0)) == 40
        assert first.result == OK
        rig.submit(sector=9)
        assert len(sleeper.result()) == 40

    def test_every_sleeper_looks_and_one_gets_it(self) -> None:
        """DMU-48: a new message goes to one reader, the others go back to sleep."""
        rig = NodeRig()
        sleepers = [Call(rig.node.open().read, 40) for _ in range(3)]
        for _ in sleepers:
            rig.schedule.reached("sleep")
        rig.submit()
        rig.schedule.reached("sleep")
        rig.schedule.reached("sleep")
        rig.submit()
        rig.submit()
        assert sorted(sleeper.result()[0] for sleeper in sleepers) == [0, 1, 2]

    def test_a_signal_ends_the_sleep(self) -> None:
        """DMU-55: the sleeping read ends, nothing is consumed, and the file goes on; later reads sleep again."""
        rig = NodeRig()
        file = rig.node.open()

        def interrupt() -> None:
            rig.schedule.reached("sleep")
            file.interrupt()

        sender = threading.Thread(target=interrupt)
        sender.start()
        with raises(errno.EINTR):
            file.read(40)
        sender.join()
        rig.submit(sector=4)
        assert read_request(file)[0].sector == 4

    def test_non_blocking(self) -> None:
        """DMU-56: EAGAIN where the kernel's node would sleep in spite of O_NONBLOCK (DMU-165)."""
        rig = NodeRig()
        file = rig.node.open(nonblocking=True)
        with raises(errno.EAGAIN):
            file.read(40)
        rig.submit()
        assert len(file.read(40)) == 40

    def test_reading_nothing(self) -> None:
        """DMU-164: a read of no bytes waits for a message, returns 0 and consumes nothing, not even the message."""
        rig = NodeRig()
        file, other = rig.node.open(), rig.node.open()
        sleeper = Call(file.read, 0)
        rig.schedule.reached("sleep")
        rig.submit()
        assert sleeper.result() == b""
        assert number_of(other) == 0

    def test_destroyed_target(self) -> None:
        """DMU-57, DMU-58, DMU-72, DMU-73, DMU-33, DMU-174: a half-read message is finished, then ENOTBLK for good.

        A sleeping reader wakes with it; answers go on.
        """
        rig = NodeRig()
        file, idle = rig.node.open(), rig.node.open()
        half_read, queued = rig.submit(BioOp.WRITE), rig.submit()
        assert len(file.read(10)) == 10
        sleeping_file = rig.node.open()
        read_request(sleeping_file)
        sleeper = Call(idle.read, 40)
        rig.schedule.reached("sleep")
        late = rig.submit()
        assert len(sleeper.result()) == 40
        sleeper = Call(idle.read, 40)
        rig.schedule.reached("sleep")
        rig.node.destroy()
        assert sleeper.errno() == errno.ENOTBLK
        assert len(file.read(65536)) == 30
        assert len(file.read(65536)) == 512
        for _ in range(2):
            with raises(errno.ENOTBLK):
                file.read(40)
        with raises(errno.ENOTBLK):
            file.read(0)
        assert file.write(answer_header(0)) == 40
        assert half_read.result == OK
        write_all(idle, answer_header(2) + bytes(512))
        assert late.result == OK
        assert queued.result is None
        sleeping_file.close()
        assert queued.result == EIO


class TestWriting:
    @pytest.mark.parametrize("step", [1, 39, 41, 65536])
    def test_answers_in_any_pieces(self, step: int) -> None:
        """DMU-60, DMU-63, DMU-166: short headers succeed, and one write may hold header and data."""
        rig = NodeRig()
        file = rig.node.open()
        bio = rig.submit(length=1024)
        read_request(file)
        answer = answer_header(0) + b"x" * 1024
        assert file.write(answer[:step]) == min(step, len(answer))
        write_all(file, answer[step:], step)
        assert (bio.result, bytes(bio.memory)) == (OK, b"x" * 1024)

    def test_one_write_ends_at_the_end_of_an_answer(self) -> None:
        """DMU-62, DMU-166: bytes behind it are not taken, the count is short, and the rest is sent again."""
        rig = NodeRig()
        file = rig.node.open()
        read, flush = rig.submit(), rig.submit(BioOp.FLUSH, length=0)
        read_request(file)
        read_request(file)
        answers = answer_header(0) + bytes(512) + answer_header(1)
        assert file.write(answers) == 552
        assert (read.result, flush.result) == (OK, None)
        assert file.write(answers[552:]) == 40
        assert flush.result == OK

    @pytest.mark.parametrize("code", [1, 2, 3, 1 << 63])
    def test_no_data_follows_an_error(self, code: int) -> None:
        """DMU-65, DMU-67, DMU-68, DMU-166: the write ends at the header; what follows is the next header."""
        rig = NodeRig()
        file = rig.node.open()
        failed, held = rig.submit(), rig.submit()
        read_request(file)
        read_request(file)
        assert file.write(answer_header(0, code) + b"\xff" * 512) == 40
        assert failed.result is not None
        assert failed.result != OK
        assert file.write(b"\xff" * 512) == 40
        assert held.result == EIO
        with raises(errno.EINVAL):
            file.write(b"\xff" * 472)

    @pytest.mark.parametrize("case", ["never issued", "answered", "half read", "another channel's", "early"])
    def test_invalid_number(self, case: str) -> None:
        """DMU-69, DMU-71, DMU-72, DMU-125, DMU-168: that write returns its bytes, every later one EINVAL.

        What the channel holds fails at once, and no message comes to it any more; the target goes on without it.
        """
        rig = NodeRig()
        file, other = rig.node.open(), rig.node.open()
        held, second, third = rig.submit(), rig.submit(BioOp.WRITE), rig.submit()
        seq = number_of(file)
        if case == "never issued":
            seq = 99
        elif case == "answered":
            write_all(file, answer_header(number_of(file)))
            seq = 1
        elif case == "half read":
            # The header is there, the payload is not: a reply now is no reply (DMU-40).
            seq = file.read(40)[0]
        elif case == "another channel's":
            seq = number_of(other)
        else:
            seq = 1
        assert file.write(answer_header(seq)) == 40
        assert held.result == EIO
        for _ in range(2):
            with raises(errno.EINVAL):
                file.write(b"")
            with raises(errno.EINVAL):
                file.read(40)
        assert file.poll() == select.POLLIN
        while third.result is None:
            request, _ = read_request(other)
            write_all(other, answer_header(request.seq) + (bytes(512) if request.op == BioOp.READ else b""))
        assert second.results in ([], [OK], [EIO])

    def test_a_poisoned_sleeper_wakes(self) -> None:
        """DMU-71: who sleeps in a read of a channel that is poisoned is told so."""
        rig = NodeRig()
        file = rig.node.open()
        sleeper = Call(file.read, 40)
        rig.schedule.reached("sleep")
        file.write(answer_header(5))
        assert sleeper.errno() == errno.EINVAL

    def test_writing_nothing(self) -> None:
        """DMU-70 (against DMU-168): no bytes are 0 everywhere: at the border, in a header, in READ data."""
        rig = NodeRig()
        file = rig.node.open()
        bio = rig.submit()
        read_request(file)
        answer = answer_header(0) + bytes(512)
        for at in (0, 17, 100, 552):
            assert file.write(b"") == 0
            if at < 552:
                file.write(answer[at : {0: 17, 17: 100, 100: 552}[at]])
        assert bio.result == OK

    def test_data_behind_success_must_come(self) -> None:
        """DMU-167, DMU-75: after SUCCESS for a READ nothing ends the message but its data, or the close."""
        rig = NodeRig()
        file = rig.node.open()
        bio = rig.submit()
        read_request(file)
        file.write(answer_header(0, Answer.SUCCESS))
        file.write(answer_header(0, Answer.ERROR))
        assert bio.result is None
        file.close()
        assert bio.result == EIO


class TestFile:
    def test_operations_it_has_not(self) -> None:
        """DMU-126, DMU-127, DMU-129, DMU-130: ESPIPE, EOPNOTSUPP, EOPNOTSUPP, ENOTTY."""
        file = NodeRig().node.open()
        with raises(errno.ESPIPE):
            file.seek(0)
        with raises(errno.EOPNOTSUPP):
            file.splice(1)
        with raises(errno.EOPNOTSUPP):
            file.fasync()
        with raises(errno.ENOTTY):
            file.ioctl(0x5401)

    def test_poll(self) -> None:
        """DMU-128: readable when a read would not wait or would fail, writable unless poisoned."""
        rig = NodeRig()
        file = rig.node.open()
        assert file.poll() == select.POLLOUT
        rig.submit(BioOp.WRITE)
        assert file.poll() == select.POLLIN | select.POLLOUT
        file.read(40)
        assert file.poll() == select.POLLIN | select.POLLOUT
        file.read(512)
        assert file.poll() == select.POLLOUT
        rig.node.destroy()
        assert file.poll() == select.POLLIN | select.POLLOUT

    def test_closed(self) -> None:
        """DMU-76, DMU-170: close ends what was begun, wakes who sleeps, and nothing works afterwards."""
        rig = NodeRig()
        file, other = rig.node.open(), rig.node.open()
        half_read, queued = rig.submit(), rig.submit()
        file.read(20)
        sleeper = Call(other.read, 0)
        assert sleeper.result() == b""
        file.close()
        file.close()
        assert (half_read.result, queued.result) == (EIO, None)
        for refuse in (lambda: file.read(1), lambda: file.write(b"x"), file.poll):
            with raises(errno.EBADF):
                refuse()
        number_of(other)
        sleeper = Call(other.read, 40)
        rig.schedule.reached("sleep")
        other.close()
        assert sleeper.errno() == errno.EBADF
        assert queued.result == EIO

    def test_no_limit_in_flight(self) -> None:
        """DMU-49, DMU-179: the queue is bounded, what has been read is not: 1024 unanswered on one channel."""
        rig = NodeRig()
        file = rig.node.open()
        bios = [rig.submit() for _ in range(1024)]
        assert [number_of(file) for _ in bios] == list(range(1024))
        for seq in reversed(range(1024)):
            write_all(file, answer_header(seq) + bytes(512))
        assert {bio.result for bio in bios} == {OK}

    @pytest.mark.parametrize("threads", [1, 4, 16, 64])
    def test_numbers_of_many_readers(self, threads: int) -> None:
        """DMU-42 to DMU-45, DMU-136 to DMU-138: each reader sees them increase, together there is no gap."""
        rig = NodeRig()
        results: list[int] = []
        done = threading.Semaphore(0)

        def on_complete(_bio: Bio, number: int) -> None:
            results.append(number)
            done.release()

        def read(file: NodeFile) -> list[int]:
            numbers: list[int] = []
            with raises(errno.ENOTBLK):
                while True:
                    request, payload = read_request(file)
                    assert payload == request.sector.to_bytes(512, "little")
                    numbers.append(request.seq)
                    write_all(file, answer_header(request.seq))
            return numbers

        readers = [Call(read, rig.node.open()) for _ in range(threads)]
        for sector in range(400):
            data = memoryview(bytearray(sector.to_bytes(512, "little")))
            rig.node.submit(Bio(BioOp.WRITE, sector, 512, data, on_complete))
        for _ in range(400):
            assert done.acquire(timeout=PATIENCE_S)
        rig.node.destroy()
        seen = [reader.result() for reader in readers]
        assert all(numbers == sorted(numbers) for numbers in seen)
        assert sorted(number for numbers in seen for number in numbers) == list(range(400))
        assert set(results) == {OK}


@pytest.mark.parametrize("pace", [1, 171, 65536], ids=["1 byte", "a third", "64 KiB"])
def test_daemons_of_any_pace(pace: int) -> None:
    """DMU-50, DMU-51, DMU-60 to 63: however a daemon cuts its reads and writes, image and reads are the same."""
    random = Random(7)
    expected = bytearray(64 * SECTOR_BYTES)
    image = bytearray(expected)
    rig = NodeRig()
    file = rig.node.open()
    for _ in range(60):
        sector = random.randrange(60)
        length = random.choice([0, 1, 1, 2, 4]) * SECTOR_BYTES
        span = slice(sector * SECTOR_BYTES, sector * SECTOR_BYTES + length)
        bio = Submitted(random.choice([BioOp.READ, BioOp.WRITE, BioOp.FLUSH]), sector=sector, length=length)
        if bio.bio.op is BioOp.WRITE:
            bio.memory[:] = expected[span] = random.randbytes(length)
        rig.node.submit(bio.bio)
        request, payload = read_request(file, pace)
        answer = answer_header(request.seq)
        if request.op == BioOp.WRITE:
            image[span] = payload
        elif request.op == BioOp.READ:
            answer += bytes(image[span])
        write_all(file, answer, pace)
        assert bio.result == OK
        assert bio.bio.op is not BioOp.READ or bio.memory == expected[span]
    assert image == expected

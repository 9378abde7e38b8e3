"""The supervisor's decisions, with processes that die when the test says so."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from answers import pack_answer

from snapd.block.bio import Bio, BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.device.loop import Loop
from snapd.device.supervisor import EXIT_MS, KILLED_MS, START_RETRY_MS, Process, Supervisor, WorkerState
from snapd.dmuser.arenachannel import ArenaChannel
from snapd.dmuser.message import SUSPECTS, Answer
from snapd.dmuser.target import MAX_REPLAYS, REPLAYS_AFTER_ANSWERS, Target
from snapd.proc.deaths import CRASH_LOOP_DEATHS, CRASH_LOOP_MS
from snapd.proc.log import Log

GRACE_MS = 10_000
REQUEST_TIMEOUT_MS = 30_000
_SEQ = struct.Struct("<Q")


class Worker:
    """A process as its supervisor sees it: `exit` makes its pidfd readable."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.pidfd, self._exit = os.pipe()
        self.channel = channel
        self.killed = False
        self.reaped = False
        self.status = 1

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout_ms: int | None = None) -> int:  # noqa: ARG002
        self.reaped = True
        os.close(self.pidfd)
        return self.status

    def exit(self) -> None:
        """Die: the kernel closes the channel and then reports the exit."""
        self.channel.close()
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1


class Bench:
    """A supervisor with everything around it."""

    def __init__(self, *, replaces: bool = True) -> None:
        self.clock = ManualClock()
        self.loop = Loop()
        self.target = Target(
            self.clock,
            restart_grace_ms=GRACE_MS if replaces else 0,
            request_timeout_ms=REQUEST_TIMEOUT_MS if replaces else 0,
        )
        self.workers: list[Worker] = []
        self.refuse_start = False
        self.supervisor = Supervisor(
            self.loop, self.target, self._start, self.clock, Log("test", self.clock), replaces=replaces
        )
        self.supervisor.start()

    def _start(self) -> tuple[Process, ArenaChannel]:
        if self.refuse_start:
            raise SnapdError(errno.ENOMEM, "start a worker: no memory")
        assert all(worker.reaped for worker in self.workers), "two workers at once"
        ours, theirs = socket.socketpair()
        self.workers.append(Worker(100 + len(self.workers), theirs))
        return self.workers[-1], ArenaChannel(self.target, ours)

    @property
    def worker(self) -> Worker:
        return self.workers[-1]

    def turn(self, ms: int = 0) -> None:
        """Let time pass and the loop go round until nothing more happens."""
        self.clock.advance(ms)
        for _ in range(4):
            self.loop.run_once(0)
            self.supervisor.expire()
            self.supervisor.send()

    def read(self) -> list[int]:
        """Submit a READ with its place in an arena; what it ends with will be in the list."""
        results: list[int] = []
        self.target.submit(Bio(BioOp.READ, 0, 512, None, lambda _bio, number: results.append(number), place=0))
        return results

    def answer_one(self) -> None:
        """The worker reads one request and answers it."""
        (seq,) = _SEQ.unpack(self.worker.channel.recv(40)[:8])
        self.worker.channel.sendall(pack_answer(seq, Answer.SUCCESS))
        self.turn()

    def die(self, ms: int = 0, status: int = 1) -> None:
        """The worker dies, and time passes."""
        self.worker.status = status
        self.worker.exit()
        self.turn(ms)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    end(bench)


@pytest.fixture
def fail_fast() -> Iterator[Bench]:
    bench = Bench(replaces=False)
    yield bench
    end(bench)


def end(bench: Bench) -> None:
    bench.supervisor.stop()
    assert bench.supervisor.state is WorkerState.STOPPED
    for worker in bench.workers:
        worker.exit()
        assert worker.reaped


def test_death_is_followed_by_one_successor(bench: Bench) -> None:
    """DMU-148: the unanswered read reaches the next worker with its number."""
    result = bench.read()
    bench.turn()
    assert len(bench.worker.channel.recv(100)) == 40
    bench.worker.exit()
    bench.turn()
    assert len(bench.workers) == 2
    assert bench.supervisor.state is WorkerState.RUNNING
    assert bench.supervisor.restarts == 1
    assert bench.worker.channel.recv(100)[:8] == bytes(8)
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS))
    bench.turn()
    assert result == [0]


def test_successor_waits_for_the_exit(bench: Bench) -> None:
    """DMU-185: a worker that hangs up is killed, and nothing starts before its exit is reported."""
    bench.worker.channel.close()
    bench.turn()
    assert not bench.worker.killed
    bench.turn(EXIT_MS)
    assert bench.worker.killed
    assert len(bench.workers) == 1
    assert bench.supervisor.state is WorkerState.RESTARTING
    bench.worker.exit()
    bench.turn()
    assert len(bench.workers) == 2


def test_successor_waits_for_the_last_answers(bench: Bench) -> None:
    """DMU-76: an answer that lies in the socket when the exit is seen still counts."""
    result = bench.read()
    bench.turn()
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS))
    # The exit is seen first, with the answer still in the socket.
    process = bench.worker
    bench.supervisor._on_exit(0)
    assert process.reaped
    assert len(bench.workers) == 1
    process.exit()
    bench.turn()
    assert result == [0]
    assert len(bench.workers) == 2


def test_stuck_worker_is_killed(bench: Bench) -> None:
    """DMU-184: after `request_timeout_ms` the worker is killed; its late answer is not taken; the read is replayed."""
    result = bench.read()
    bench.turn()
    bench.turn(REQUEST_TIMEOUT_MS - 1)
    assert not bench.worker.killed
    bench.turn(1)
    assert bench.worker.killed
    assert result == []
    with pytest.raises(BrokenPipeError):
        bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS))
    assert bench.supervisor.next_deadline_ms() == REQUEST_TIMEOUT_MS + GRACE_MS
    bench.worker.exit()
    bench.turn()
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS))
    bench.turn()
    assert result == [0]


def test_nonsense_costs_the_worker_its_life(bench: Bench) -> None:
    """DMU-71, DMU-156: an unknown number poisons the channel; the worker is killed and replaced."""
    result = bench.read()
    bench.turn()
    bench.worker.channel.sendall(pack_answer(77, Answer.SUCCESS))
    bench.turn()
    assert bench.worker.killed
    bench.worker.exit()
    bench.turn()
    assert len(bench.workers) == 2
    assert result == []


def test_crash_loop(bench: Bench) -> None:
    """Five deaths without an answer within a minute: no further worker, what waits fails, what comes fails at once."""
    result = bench.read()
    for _ in range(CRASH_LOOP_DEATHS):
        assert bench.supervisor.state is WorkerState.RUNNING
        bench.worker.exit()
        bench.turn(100)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP
    assert len(bench.workers) == CRASH_LOOP_DEATHS
    assert bench.supervisor.worker_pid == 0
    assert result == [errno.EIO]
    late = bench.read()
    bench.turn()
    assert late == [errno.EIO]
    assert bench.supervisor.next_deadline_ms() is None


def test_worker_that_answered_is_replaced_for_ever(bench: Bench) -> None:
    """DMU-148: what ends a worker that can serve is not the worker's fault; every death still counts as a restart."""
    count = 10 * CRASH_LOOP_DEATHS
    for _ in range(count):
        result = bench.read()
        bench.turn()
        bench.answer_one()
        assert result == [0]
        bench.die()
    assert bench.supervisor.state is WorkerState.RUNNING
    assert bench.supervisor.restarts == count


def test_deaths_without_an_answer_count_among_others(bench: Bench) -> None:
    """Workers that answered in between do not hide that most of them do not come up."""
    for _ in range(CRASH_LOOP_DEATHS - 1):
        bench.die()
        bench.read()
        bench.turn()
        bench.answer_one()
        bench.die()
    assert bench.supervisor.worker_pid == bench.worker.pid
    bench.die()
    assert bench.supervisor.state is WorkerState.CRASH_LOOP


KILLED = 137


def test_read_outlives_workers_that_are_killed_at_once(bench: Bench) -> None:
    """DMU-148: a worker that was killed before it answered may never have looked at the read; it does not count."""
    result = bench.read()
    kills = KILLED_MS // 50
    for _ in range(kills):
        bench.turn()
        bench.die(50, status=KILLED)
        assert bench.supervisor.state is WorkerState.RUNNING
    assert (result, bench.supervisor.restarts) == ([], kills)
    bench.answer_one()
    assert result == [0]
    # That was an answer: from here it begins again.
    bench.read()
    for _ in range(kills):
        bench.turn()
        bench.die(50, status=KILLED)
    assert bench.supervisor.state is WorkerState.RUNNING


def test_kills_without_end_are_a_crash_loop(bench: Bench) -> None:
    """Nobody waits longer than the grace for a worker that is always killed before it answers anything."""
    result = bench.read()
    for _ in range(11):
        assert bench.supervisor.state is WorkerState.RUNNING
        bench.turn()
        bench.die(KILLED_MS // 10, status=KILLED)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP
    assert result == [errno.EIO]


def test_idle_workers_that_are_killed_are_a_crash_loop(bench: Bench) -> None:
    """The death table: where nobody waits, five deaths of any kind are enough."""
    for _ in range(CRASH_LOOP_DEATHS):
        assert bench.supervisor.state is WorkerState.RUNNING
        bench.die(status=KILLED)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP


def test_our_own_kill_is_none_from_outside(bench: Bench) -> None:
    """Workers that hang up, or get stuck, and do not go by themselves are a crash loop like those that crash."""
    for _ in range(CRASH_LOOP_DEATHS):
        bench.worker.channel.close()
        bench.turn()
        bench.turn(EXIT_MS)
        assert bench.worker.killed
        bench.die(status=KILLED)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP


@pytest.mark.parametrize("code", [Answer.ERROR, Answer.UNSUPPORTED])
def test_an_error_is_an_answer(bench: Bench, code: Answer) -> None:
    """A worker on a bad disk serves, too: its death is no sign that workers cannot come up."""
    for number in range(2 * CRASH_LOOP_DEATHS):
        bench.read()
        bench.turn()
        bench.worker.channel.sendall(pack_answer(number, code))
        bench.turn()
        bench.die()
    assert bench.supervisor.state is WorkerState.RUNNING


@pytest.mark.parametrize("said", [b"", bytes(39), pack_answer(77, Answer.SUCCESS)], ids=["nothing", "half", "nonsense"])
def test_half_an_answer_or_a_wrong_one_is_none(bench: Bench, said: bytes) -> None:
    """DMU-69: only a whole answer to a request that was given to the worker shows that it serves."""
    result = bench.read()
    for _ in range(CRASH_LOOP_DEATHS):
        bench.turn()
        bench.worker.channel.sendall(said)
        bench.turn()
        bench.die()
    assert bench.supervisor.state is WorkerState.CRASH_LOOP
    assert result == [errno.EIO]


def test_request_that_ends_every_worker_ends_itself(bench: Bench) -> None:
    """DMU-148: after so many replays it fails, and workers that answer others before they die go on being replaced."""
    poison = bench.read()
    bench.turn()
    for _ in range(MAX_REPLAYS // REPLAYS_AFTER_ANSWERS):
        good = bench.read()
        bench.turn()
        first = bench.worker.channel.recv(40)
        second = bench.worker.channel.recv(40)
        assert first[:8] == bytes(8)
        bench.worker.channel.sendall(pack_answer(_SEQ.unpack(second[:8])[0], Answer.SUCCESS))
        bench.turn()
        assert (good, poison) == ([0], [])
        bench.die()
    assert poison == []
    bench.die()
    assert poison == [errno.EIO]
    assert bench.supervisor.state is WorkerState.RUNNING
    assert bench.supervisor.restarts == MAX_REPLAYS // REPLAYS_AFTER_ANSWERS + 1


def test_deep_queue_survives_many_deaths(bench: Bench) -> None:
    """DMU-148: what a dead worker had not come to is not suspected of having ended it."""
    results: list[list[int]] = []
    while len(results) < 10 * SUSPECTS:
        if not bench.target.has_room():
            bench.turn()
        results.append(bench.read())
    bench.turn()
    assert bench.target.in_flight == len(results)
    while bench.target.in_flight:
        # As a worker does it: as many as it answers at once, and then it is killed.
        for _ in range(SUSPECTS):
            bench.answer_one()
        bench.die()
    assert results == [[0]] * (10 * SUSPECTS)
    assert bench.supervisor.restarts == 10 > MAX_REPLAYS // REPLAYS_AFTER_ANSWERS


def test_nobody_is_started_where_workers_are_not_replaced(fail_fast: Bench) -> None:
    """DMU-99, DMU-100, DMU-103: the first death fails what is in flight at once, and what comes later too."""
    bench = fail_fast
    answered = bench.read()
    bench.turn()
    bench.answer_one()
    assert answered == [0]
    in_flight = bench.read()
    bench.turn()
    # DMU-96: it may think for as long as it likes.
    bench.turn(10 * REQUEST_TIMEOUT_MS)
    assert bench.supervisor.next_deadline_ms() is None
    assert in_flight == []
    bench.die()
    assert in_flight == [errno.EIO]
    assert bench.supervisor.state is WorkerState.FAILED
    late = bench.read()
    bench.turn()
    assert late == [errno.EIO]
    bench.turn(CRASH_LOOP_MS)
    assert (len(bench.workers), bench.supervisor.worker_pid, bench.supervisor.restarts) == (1, 0, 0)
    assert bench.supervisor.next_deadline_ms() is None


def test_hang_up_fails_at_once_where_workers_are_not_replaced(fail_fast: Bench) -> None:
    """DMU-99: what is in flight fails inside the close, before the process has gone."""
    result = fail_fast.read()
    fail_fast.turn()
    fail_fast.worker.channel.close()
    fail_fast.turn()
    assert result == [errno.EIO]
    fail_fast.turn(EXIT_MS)
    assert fail_fast.worker.killed
    fail_fast.die()
    assert fail_fast.supervisor.state is WorkerState.FAILED


def test_deaths_far_apart_are_no_crash_loop(bench: Bench) -> None:
    for _ in range(3 * CRASH_LOOP_DEATHS):
        bench.worker.exit()
        bench.turn(CRASH_LOOP_MS // (CRASH_LOOP_DEATHS - 1))
    assert bench.supervisor.state is WorkerState.RUNNING


def test_failed_start_is_tried_again(bench: Bench) -> None:
    bench.refuse_start = True
    bench.worker.exit()
    bench.turn()
    assert bench.supervisor.worker_pid == 0
    assert bench.supervisor.next_deadline_ms() == START_RETRY_MS
    bench.refuse_start = False
    bench.turn(START_RETRY_MS)
    assert bench.supervisor.state is WorkerState.RUNNING
    assert bench.supervisor.worker_pid == bench.worker.pid


@pytest.mark.parametrize("has_answered", [False, True])
def test_start_that_never_works_is_a_crash_loop(bench: Bench, has_answered: bool) -> None:
    """Also behind a worker that served well."""
    if has_answered:
        bench.read()
        bench.turn()
        bench.answer_one()
    bench.refuse_start = True
    bench.worker.exit()
    for _ in range(CRASH_LOOP_DEATHS):
        bench.turn(START_RETRY_MS)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP
    assert bench.supervisor.next_deadline_ms() is None


def test_full_socket_waits_for_the_worker(bench: Bench) -> None:
    """DMU-143: a worker that does not read is not sent to; when it reads, the rest follows, nothing lost or cut."""
    results: list[list[int]] = []
    while bench.target.has_room():
        results.append(bench.read())
        bench.supervisor.send()
    bench.turn()
    assert bench.target.queued
    received = bytearray()
    while bench.target.queued or bench.target.in_flight < len(results):
        received += bench.worker.channel.recv(1 << 20)
        bench.turn()
    bench.worker.channel.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            received += bench.worker.channel.recv(1 << 20)
    assert [seq for (seq,) in struct.iter_unpack("<Q32x", received)] == [*range(len(results))]

"""The supervisor's decisions, with processes that die when the test says so."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from answers import pack_answer

from snapd.block.bio import Bio, BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.device.loop import Loop
from snapd.device.supervisor import START_RETRY_MS, Process, Supervisor, WorkerState
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.message import Answer
from snapd.dmuser.target import Target
from snapd.proc.deaths import CRASH_LOOP_DEATHS, CRASH_LOOP_MS
from snapd.proc.log import Log

GRACE_MS = 10_000
REQUEST_TIMEOUT_MS = 30_000


class Worker:
    """A process as its supervisor sees it: `exit` makes its pidfd readable."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.pidfd, self._exit = os.pipe()
        self.channel = channel
        self.killed = False
        self.reaped = False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout_ms: int | None = None) -> int:  # noqa: ARG002
        self.reaped = True
        os.close(self.pidfd)
        return 137

    def exit(self) -> None:
        """Die: the kernel closes the channel and then reports the exit."""
        self.channel.close()
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1


class Bench:
    """A supervisor with everything around it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = Loop()
        self.target = Target(self.clock, restart_grace_ms=GRACE_MS, request_timeout_ms=REQUEST_TIMEOUT_MS)
        self.workers: list[Worker] = []
        self.refuse_start = False
        self.supervisor = Supervisor(self.loop, self.target, self._start, self.clock, Log("test", self.clock))
        self.supervisor.start()

    def _start(self) -> tuple[Process, SocketChannel]:
        if self.refuse_start:
            raise SnapdError(errno.ENOMEM, "start a worker: no memory")
        assert all(worker.reaped for worker in self.workers), "two workers at once"
        ours, theirs = socket.socketpair()
        self.workers.append(Worker(100 + len(self.workers), theirs))
        return self.workers[-1], SocketChannel(self.target, ours)

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

    def read(self, length: int = 512) -> list[int]:
        results: list[int] = []
        self.target.submit(Bio(BioOp.READ, 0, length, memoryview(bytearray(length)), results.append))
        return results


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.supervisor.stop()
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
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS) + bytes(512))
    bench.turn()
    assert result == [0]


def test_successor_waits_for_the_exit(bench: Bench) -> None:
    """DMU-185: a worker that hangs up is killed, and nothing starts before its exit is reported."""
    bench.worker.channel.close()
    bench.turn(5000)
    assert bench.worker.killed
    assert len(bench.workers) == 1
    assert bench.supervisor.state is WorkerState.RESTARTING
    bench.worker.exit()
    bench.turn()
    assert len(bench.workers) == 2


def test_successor_waits_for_the_last_answers(bench: Bench) -> None:
    """DMU-76: an answer that lies in the socket when the exit is seen still counts."""
    # More than is taken in at once, so that the exit is seen with the rest of it still in the socket.
    result = bench.read(100_352)
    bench.turn()
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS) + bytes(100_352))
    bench.worker.exit()
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
        bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS) + bytes(512))
    assert bench.supervisor.next_deadline_ms() == REQUEST_TIMEOUT_MS + GRACE_MS
    bench.worker.exit()
    bench.turn()
    bench.worker.channel.sendall(pack_answer(0, Answer.SUCCESS) + bytes(512))
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
    """DMU-184: five deaths within a minute: no further worker, what waits fails, what comes fails at once."""
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


def test_start_that_never_works_is_a_crash_loop(bench: Bench) -> None:
    bench.refuse_start = True
    bench.worker.exit()
    for _ in range(CRASH_LOOP_DEATHS):
        bench.turn(START_RETRY_MS)
    assert bench.supervisor.state is WorkerState.CRASH_LOOP
    assert bench.supervisor.next_deadline_ms() is None


def test_full_socket_waits_for_the_worker(bench: Bench) -> None:
    """DMU-143: a worker that does not read is not sent to; when it reads, the rest follows."""
    data = memoryview(bytearray(1 << 20))
    while bench.target.has_room(len(data)):
        bench.target.submit(Bio(BioOp.WRITE, 0, len(data), data, lambda _: None))
        bench.supervisor.send()
    bench.turn()
    queued = bench.target.queued
    while bench.target.queued == queued:
        assert bench.worker.channel.recv(1 << 20)
        bench.turn()
    assert bench.target.queued < queued

"""Slow I/O aside: in order, errors as numbers, and everything told on the loop's own thread."""

import errno
import threading
import time
from collections.abc import Callable

from snapd.block.errors import SnapdError
from snapd.device.loop import Loop
from snapd.device.slowio import SlowIo

WAIT_S = 30


def go_round(loop: Loop, is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end
        loop.run_once(100)


def test_order_errors_and_thread() -> None:
    """One after the other, as submitted; what fails says why, and the next is done all the same."""
    loop = Loop()
    slow = SlowIo(loop)
    done_work: list[tuple[int, int]] = []
    told: list[tuple[int, int, int]] = []

    def submit(i: int) -> None:
        def work() -> None:
            done_work.append((i, threading.get_ident()))
            if i % 3:
                raise SnapdError(errno.ENOSPC if i % 3 == 1 else errno.EIO, "it does not work")

        slow.submit(work, lambda number: told.append((i, number, threading.get_ident())))

    for i in range(30):
        submit(i)
    go_round(loop, lambda: len(told) == 30)
    assert [i for i, _ in done_work] == [*range(30)]
    numbers = [0, errno.ENOSPC, errno.EIO]
    assert told == [(i, numbers[i % 3], threading.get_ident()) for i in range(30)]
    assert {thread for _, thread in done_work}.isdisjoint({threading.get_ident()})


def test_the_loop_goes_on_meanwhile() -> None:
    """Work that takes its time holds up neither the loop nor what is submitted from a completion."""
    loop = Loop()
    slow = SlowIo(loop)
    gate = threading.Event()
    told: list[str] = []

    def first_done(_number: int) -> None:
        told.append("first")
        slow.submit(lambda: None, lambda _number: told.append("second"))

    slow.submit(lambda: assert_true(gate.wait(WAIT_S)), first_done)
    for _ in range(10):
        loop.run_once(0)
    assert told == []
    gate.set()
    go_round(loop, lambda: len(told) == 2)
    assert told == ["first", "second"]


def assert_true(value: bool) -> None:
    assert value

"""Work on threads whose results come back in the order it was given, with a bound on what is under way.

Invariant: what the caller sees does not depend on the number of threads; only the time does.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

State = TypeVar("State")
Result = TypeVar("Result")


class OrderedPool(Generic[State, Result]):
    """Runs `work(state)`, each thread having one `state` made by `make_state` (an encoder, say).

    At most `in_flight` results are held or being made; giving more waits for the oldest. A failure of `work` is
    raised where its result would have come. With one thread everything runs in the caller's.
    """

    def __init__(self, threads: int, *, in_flight: int, make_state: Callable[[], State]) -> None:
        self._in_flight = in_flight
        self._waiting: deque[Future[Result]] = deque()
        self._own_state = make_state() if threads <= 1 else None
        self._local = threading.local()

        def start_thread() -> None:
            self._local.state = make_state()

        self._pool = ThreadPoolExecutor(threads, initializer=start_thread) if threads > 1 else None

    def push(self, work: Callable[[State], Result]) -> Iterator[Result]:
        """Give work; returns the results that had to be taken out for it, which the caller must consume."""
        if self._pool is None:
            assert self._own_state is not None
            return iter((work(self._own_state),))
        self._waiting.append(self._pool.submit(lambda: work(self._local.state)))
        return self._take(self._in_flight)

    def drain(self) -> Iterator[Result]:
        """All results that are left."""
        return self._take(0)

    def run(self, works: Iterable[Callable[[State], Result]]) -> Iterator[Result]:
        """Give all `works`, yield their results and close, also when the caller stops early."""
        try:
            for work in works:
                yield from self.push(work)
            yield from self.drain()
        finally:
            self.close()

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _take(self, keep: int) -> Iterator[Result]:
        while len(self._waiting) > keep:
            yield self._waiting.popleft().result()

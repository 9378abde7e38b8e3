"""The crew: one thread a channel, and the main thread, which waits for the signal to go.

SIGTERM and SIGINT drain: what has been received is answered, then the process ends. They are blocked from the very
start and taken by `sigwait`, so none is lost between a look at a flag and a blocking read, and none interrupts a store.
The channels of one worker are of one device: when one ends, all do.
"""

import signal
import threading
from collections.abc import Sequence
from typing import Protocol

from snapd.block.errors import SnapdError
from snapd.dmuser.client import INTERRUPT
from snapd.proc.log import Log

_THREAD_ENDED = signal.SIGUSR2
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, _THREAD_ENDED)
_STOP_AGAIN_SECONDS = 0.05


class Service(Protocol):
    """What one thread does."""

    def run(self) -> None:
        """Serve until the end of the channel, or until stopped; `SnapdError` when that is not an orderly one."""
        ...

    def stop(self) -> None:
        """From another thread, any number of times: let `run` come to its end."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


def hold_signals() -> None:
    """Keep the signals that end a worker until `run_crew` asks for them; before any thread is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    # There must be a handler, or the signal would end the process; it only makes read(2) return.
    signal.signal(INTERRUPT, lambda _number, _frame: None)


def run_crew(services: Sequence[Service], log: Log) -> bool:
    """Serve until a channel ends or a signal says so; whether all of them ended in order."""
    ended_well: list[Service] = []
    main = threading.get_ident()

    def work(service: Service) -> None:
        try:
            service.run()
            ended_well.append(service)
        except SnapdError as error:
            log.line(str(error))
        finally:
            service.close()
            signal.pthread_kill(main, _THREAD_ENDED)

    threads = [threading.Thread(target=work, args=(service,)) for service in services]
    for thread in threads:
        thread.start()
    signal.sigwait(_END_SIGNALS)
    while any(thread.is_alive() for thread in threads):
        for service, thread in zip(services, threads, strict=True):
            service.stop()
            thread.join(_STOP_AGAIN_SECONDS)
    return len(ended_well) == len(services)

"""Daemons that are not ours: whoever connects to the device's dm-user socket serves it (DMU-151).

The target's attach timeout, restart grace and request timeout hold for them as for our own worker; only that a stuck
one cannot be killed by us, so it is cut off.
"""

from snapd.block.errors import SnapdError
from snapd.device.loop import READABLE, WRITABLE, Loop
from snapd.device.supervisor import WorkerState
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.listener import ChannelListener
from snapd.dmuser.target import Target
from snapd.proc.log import Log


class Daemons:
    """The channels of a target whose daemons come and go by themselves; drives it as a `Supervisor` does."""

    worker_pid = 0
    restarts = 0

    def __init__(self, loop: Loop, target: Target, listener: ChannelListener, log: Log) -> None:
        self._loop = loop
        self._target = target
        self._listener = listener
        self._log = log
        self._interest: dict[SocketChannel, int] = {}
        self._stopped = False

    @property
    def state(self) -> WorkerState:
        """RUNNING while a daemon is connected."""
        if self._stopped:
            return WorkerState.STOPPED
        return WorkerState.RUNNING if self._interest else WorkerState.RESTARTING

    def start(self) -> None:
        """Let daemons connect."""
        self._loop.watch(self._listener.fileno(), READABLE, self._on_listener)

    def send(self) -> None:
        """Hand the target's messages to the daemons, as far as their sockets take them; to each in its turn."""
        for channel in list(self._interest):
            queued = self._target.queued
            channel.send()
            if self._target.queued < queued:
                # Who has got something is last next time.
                self._interest[channel] = self._interest.pop(channel)
            interest = READABLE | (WRITABLE if channel.wants_to_send else 0)
            if interest != self._interest[channel]:
                self._interest[channel] = interest
                self._loop.change(channel.fileno(), interest)

    def next_deadline_ms(self) -> int | None:
        """When `expire` will have something to do."""
        return self._target.next_deadline_ms()

    def expire(self) -> None:
        """Cut off a daemon that is stuck, and let the target's timers run."""
        stuck = self._target.stuck_channel()
        for channel in list(self._interest):
            if stuck is not None and channel.serves(stuck):
                self._drop(channel, "a request has not been answered in time")
        self._target.expire()

    def stop(self) -> None:
        """Hang up on everybody."""
        self._stopped = True
        self._loop.forget(self._listener.fileno())
        for channel in list(self._interest):
            self._drop(channel, "")

    def _on_listener(self, _events: int) -> None:
        try:
            channel = self._listener.accept()
        except SnapdError as error:
            self._log.line(f"daemon refused: {error}")
            return
        if channel is not None:
            self._interest[channel] = READABLE
            self._loop.watch(channel.fileno(), READABLE, lambda _events: self._on_channel(channel))

    def _on_channel(self, channel: SocketChannel) -> None:
        if channel not in self._interest:
            return
        try:
            if not channel.receive():
                self._drop(channel, "")
        except SnapdError as error:
            self._drop(channel, f"broke the protocol: {error}")

    def _drop(self, channel: SocketChannel, reason: str) -> None:
        if reason:
            self._log.line(f"daemon cut off: {reason}")
        del self._interest[channel]
        self._loop.forget(channel.fileno())
        channel.close()

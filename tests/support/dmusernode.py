"""A double of the kernel's dm-user nodes: a directory of files that behave as DMU-161 to DMU-181 say.

    python tests/support/dmusernode.py --mount DIR --control SOCK

serves `DIR/NAME` over raw /dev/fuse (root is needed for the mount) until SIGTERM, so that a worker process can open,
read and write a real file as it would a node. What the kernel does is a model of its own here, written from the
observed rows alone; it shares nothing with `snapd.dmuser.target`. "ready" on standard output says that the mount is
there, "not permitted" that it cannot be had.

Orders come over the unix stream socket SOCK, one line each, one reply each, in order; any number of connections:

    create NAME SIZE [TIMEOUT_MS]                  a target of SIZE bytes and its node; unattached requests fail after
                                                   TIMEOUT_MS (default 4000, DMU-169)
    submit NAME TYPE FLAGS SECTOR LENGTH           queue a request, all numbers; for TYPE 1 the LENGTH bytes follow the
                                                   line. Replies "ok ID"
    wait NAME ID                                   "ok ERRNO LENGTH" when the request has ended, and for a READ that
                                                   succeeded its LENGTH bytes
    await NAME WHAT COUNT                          "ok" as soon as WHAT is COUNT; WHAT: `opens` (open channels),
                                                   `readers` (reads that block), `queued` (requests nobody has read),
                                                   `unanswered` (requests read, also in part), `poisoned` (channels),
                                                   `held` (writes that `hold` has stopped)
    hold NAME BYTES                                stop the writes of an answer of which BYTES of payload have come,
                                                   until a `hold NAME -1`; no kernel does, it is for looking at a worker
                                                   in the middle of an answer
    remove NAME                                    as `dmsetup remove`: EBUSY with a request under way, else readers
                                                   get ENOTBLK (DMU-174)

A refused order is answered "error ERRNO". What the double cannot show: a zero-length read never reaches a FUSE file
system (DMU-164), a write of more than 1 MiB arrives in several, and `epoll_ctl` is not refused (DMU-165).
"""

import argparse
import contextlib
import errno
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import NoReturn

from dmunodefuse import FuseFront
from dmunodemodel import WRITE, Message, Node, Refused


class Orders:
    """One connection that gives orders; `pending` is what its next reply waits for."""

    def __init__(self, connection: socket.socket, front: FuseFront) -> None:
        self.connection = connection
        self._front = front
        self._received = bytearray()
        self._pending: Callable[[], bytes | None] | None = None

    def receive(self) -> bool:
        """Take in what has come; False when the other end is closed."""
        try:
            data = self.connection.recv(1 << 20)
        except ConnectionError:
            return False
        self._received += data
        return bool(data)

    def go_on(self) -> bool:
        """Carry out an order if one is complete and does not have to wait; whether one was."""
        self._pending = self._pending or self._next()
        if self._pending is None:
            return False
        try:
            reply = self._pending()
        except Refused as refusal:
            reply = b"error %d\n" % refusal.number
        if reply is None:
            return False
        self._pending = None
        # Whoever asked may be gone; the next look at the connection tells.
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(reply)
        return True

    def _next(self) -> Callable[[], bytes | None] | None:
        end = self._received.find(b"\n")
        if end < 0:
            return None
        order, *words = self._received[:end].decode().split()
        name, *numbers = words
        if order == "submit":
            kind, flags, sector, length = map(int, numbers)
            data_end = end + 1 + (length if kind == WRITE else 0)
            if len(self._received) < data_end:
                return None
            data = bytes(self._received[end + 1 : data_end])
            del self._received[:data_end]
            return lambda: b"ok %d\n" % self._node(name).submit(kind, flags, sector, length, data)
        del self._received[: end + 1]
        if order == "create":
            return lambda: self._create(name, *map(int, numbers))
        if order == "remove":
            return lambda: self._remove(name)
        if order == "wait":
            return lambda: self._result(self._node(name).messages[int(numbers[0])])
        if order == "hold":
            return lambda: self._hold(name, int(numbers[0]))
        if order == "await":
            return lambda: b"ok\n" if self._node(name).count(numbers[0]) == int(numbers[1]) else None
        return self._refuse

    def _node(self, name: str) -> Node:
        if name not in self._front.nodes:
            raise Refused(errno.ENXIO)
        return self._front.nodes[name]

    def _create(self, name: str, size_bytes: int, timeout_ms: int = 4000) -> bytes:
        # A name in use is reported as want of memory (DMU-162).
        if name in self._front.nodes:
            raise Refused(errno.ENOMEM)
        self._front.add(name, Node(size_bytes, timeout_ms))
        return b"ok\n"

    def _remove(self, name: str) -> bytes:
        self._node(name)
        self._front.remove(name)
        return b"ok\n"

    def _hold(self, name: str, count: int) -> bytes:
        self._node(name).hold_bytes = count
        return b"ok\n"

    def _result(self, message: Message) -> bytes | None:
        if message.result is None:
            return None
        content = message.content if message.result == 0 else b""
        return b"ok %d %d\n" % (message.result, len(content)) + content

    def _refuse(self) -> NoReturn:
        raise Refused(errno.EINVAL)


def serve(front: FuseFront, listener: socket.socket, stop_fd: int) -> None:
    """Until `stop_fd` is readable. One thread: nothing here blocks, so nothing can wait for itself."""
    poll = select.poll()
    for fd in (front.device, listener.fileno(), stop_fd):
        poll.register(fd, select.POLLIN)
    clients: dict[int, Orders] = {}
    while True:
        waiting = [node for node in front.nodes.values() if not node.channels]
        deadlines = [m.deadline for node in waiting for m in node.queue if m.deadline is not None]
        timeout_ms = max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None
        for fd, _ in poll.poll(timeout_ms):
            if fd == stop_fd:
                return
            if fd == listener.fileno():
                connection, _ = listener.accept()
                clients[connection.fileno()] = Orders(connection, front)
                poll.register(connection, select.POLLIN)
            elif fd in clients and not clients[fd].receive():
                poll.unregister(fd)
                clients.pop(fd).connection.close()
        for node in front.nodes.values():
            node.expire()
        front.serve()
        # An order can let a read go on, and that can be what another order waits for.
        while any(orders.go_on() for orders in clients.values()):
            front.wake()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mount", required=True)
    parser.add_argument("--control", required=True)
    arguments = parser.parse_args()
    stop, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(arguments.control)
    listener.listen()
    try:
        front = FuseFront(arguments.mount)
    except PermissionError:
        print("not permitted", flush=True)
        return
    try:
        print("ready", flush=True)
        serve(front, listener, stop.fileno())
    finally:
        front.unmount()


if __name__ == "__main__":
    main()

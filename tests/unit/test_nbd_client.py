"""The NBD client against a server that misbehaves on purpose."""

import errno
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest

from snapd.block.errors import SnapdError
from snapd.client.nbd import NbdClient
from snapd.device.handshake import Handshake
from snapd.device.nbd import REPLY, REPLY_MAGIC, REQUEST

SIZE = 1 << 20
Script = Callable[[socket.socket], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], str]]:
    """Runs a script for one client; returns the path to connect to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "nbd")
        listener.bind(path)
        listener.listen()
        threads = []

        def start(script: Script) -> str:
            def run() -> None:
                client, _ = listener.accept()
                with client:
                    script(client)

            threads.append(threading.Thread(target=run))
            threads[-1].start()
            return path

        yield start
        for thread in threads:
            thread.join()


def negotiate(client: socket.socket) -> None:
    handshake = Handshake(SIZE, read_only=True, can_multi_conn=True)
    client.sendall(handshake.greeting)
    received = b""
    while not handshake.finished:
        received += client.recv(4096)
        used, replies = handshake.feed(received)
        received = received[used:]
        client.sendall(replies)


def take(client: socket.socket, count: int) -> list[tuple[int, int, int]]:
    """(cookie, offset, length) of so many requests."""
    raw = b""
    while len(raw) < count * REQUEST.size:
        raw += client.recv(count * REQUEST.size - len(raw))
    return [REQUEST.unpack_from(raw, i * REQUEST.size)[3:] for i in range(count)]


def test_replies_in_any_order(serve: Callable[[Script], str]) -> None:
    def script(client: socket.socket) -> None:
        negotiate(client)
        for cookie, offset, length in reversed(take(client, 3)):
            client.sendall(REPLY.pack(REPLY_MAGIC, 0, cookie) + bytes([offset >> 18]) * length)
        assert client.recv(100)[4:8] == b"\0\0\0\2"

    buffer = bytearray(600_000)
    with NbdClient.connect(serve(script)) as client:
        assert client.size_bytes == SIZE
        client.read_into(buffer, 0)
    assert buffer == bytes(1 << 18) + b"\1" * (1 << 18) + b"\2" * (600_000 - (2 << 18))


def test_one_error_leaves_the_connection_usable(serve: Callable[[Script], str]) -> None:
    def script(client: socket.socket) -> None:
        negotiate(client)
        (one, _, length), (two, _, _) = take(client, 2)
        client.sendall(REPLY.pack(REPLY_MAGIC, errno.EIO, two) + REPLY.pack(REPLY_MAGIC, 0, one) + bytes(length))
        ((cookie, _, length),) = take(client, 1)
        client.sendall(REPLY.pack(REPLY_MAGIC, 0, cookie) + b"y" * length)
        client.recv(100)

    with NbdClient.connect(f"nbd+unix:///?socket={serve(script)}") as client:
        with pytest.raises(SnapdError, match="error 5") as error:
            client.read_into(bytearray(400_000), 0)
        assert error.value.errno == errno.EIO
        buffer = bytearray(10)
        client.read_into(buffer, 0)
        assert buffer == b"y" * 10


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        (REPLY.pack(REPLY_MAGIC, 0, 99), errno.EPROTO),
        (REPLY.pack(1, 0, 0), errno.EPROTO),
        (REPLY.pack(REPLY_MAGIC, 0, 0) + b"short", errno.ENOTCONN),
        (b"", errno.ENOTCONN),
    ],
    ids=["unknown cookie", "bad magic", "cut payload", "hang up"],
)
def test_broken_server(serve: Callable[[Script], str], reply: bytes, number: int) -> None:
    def script(client: socket.socket) -> None:
        negotiate(client)
        take(client, 1)
        client.sendall(reply)

    with NbdClient.connect(serve(script)) as client:
        with pytest.raises(SnapdError) as error:
            client.read_into(bytearray(100), 0)
        assert error.value.errno == number


@pytest.mark.parametrize(
    ("greeting", "number"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", errno.EPROTO),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(136), errno.EPROTO),
        (b"", errno.ENOTCONN),
        (
            Handshake.greeting + struct.pack(">QIII", 0x3E889045565A9, 7, 0x80000006, 0),
            errno.ENXIO,
        ),
    ],
    ids=["another protocol", "old style", "hang up", "no such export"],
)
def test_broken_handshake(serve: Callable[[Script], str], greeting: bytes, number: int) -> None:
    path = serve(lambda client: client.sendall(greeting))
    with pytest.raises(SnapdError) as error:
        NbdClient.connect(path)
    # A server that is gone may also be noticed while sending.
    assert error.value.errno in (number, errno.EPIPE, errno.ECONNRESET)


@pytest.mark.parametrize("address", ["http://host/", "nbd+unix:///", "", "nbds://host"])
def test_bad_address(address: str) -> None:
    with pytest.raises(SnapdError) as error:
        NbdClient.connect(address)
    assert error.value.errno == errno.EINVAL


def test_nobody_listens() -> None:
    with pytest.raises(SnapdError, match="connect to /nonexistent/nbd") as error:
        NbdClient.connect("/nonexistent/nbd")
    assert error.value.errno == errno.ENOENT


def test_full_backlog() -> None:
    """A client waits for its place in the line, for as long as it may wait for anything."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(directory, "nbd")
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            with pytest.raises(SnapdError) as error:
                NbdClient.connect(path, timeout_s=1)
            assert error.value.errno == errno.EAGAIN
            waiting = threading.Thread(target=lambda: NbdClient.connect(path).close())
            waiting.start()
            listener.accept()[0].close()
            server, _ = listener.accept()
            with server:
                negotiate(server)
                waiting.join()

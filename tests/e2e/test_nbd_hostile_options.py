"""Clients that negotiate wrongly, for ever or not at all: they end themselves, and hurt nobody else.

While one misbehaves, a well-behaved client goes on reading the right bytes on its own connection and another can
connect; afterwards the host holds nothing of it.
"""

import contextlib
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from devicerig import SIZE, Device, Images
from nbdpeer import FLAGS, NEGOTIATION, contexts, info, option, request
from nbdrig import Scene, Target, attack, shown, target

from snapd.device.handshake import MAX_OPTION_BYTES, MAX_OPTIONS, Handshake
from snapd.device.nbd import GREETING, Command, Option, OptionReply

READ, WRITE, BLOCK_STATUS = Command.READ, Command.WRITE, Command.BLOCK_STATUS
HUGE = 0xFFFFFFFF


@pytest.fixture(scope="module", params=["unix", "tcp"])
def attacked(request: pytest.FixtureRequest) -> Iterator[Target]:
    """One host for all tests: what one leaves behind, the next would notice."""
    with target(Device(Images(seed=23)), request.param) as running:
        yield running


@pytest.fixture
def scene(attacked: Target) -> Iterator[Scene]:
    with attack(attacked, attacked.device.images.new) as scene:
        yield scene


@pytest.mark.parametrize("leave", ["close", "half close"])
def test_options_cut_at_every_byte(scene: Scene, leave: str) -> None:
    """A client that goes in the middle of an option, with or without waiting for an answer."""
    for cut in range(len(NEGOTIATION)):
        with scene.stranger() as peer:
            assert peer.send(NEGOTIATION[:cut])
            if leave == "half close":
                peer.socket.shutdown(socket.SHUT_WR)
                assert peer.rest()[: GREETING.size] == Handshake.greeting
        if not cut % 20:
            scene.check()


@pytest.mark.parametrize("length", [MAX_OPTION_BYTES + 1, 0x7FFFFFFF, HUGE])
def test_huge_options(scene: Scene, length: int) -> None:
    """An option that announces more than it may is the end, whether its data comes or not."""
    for number in [*Option, 5, 11, HUGE]:
        with scene.stranger() as peer:
            peer.greet()
            peer.send(option(number, length=length))
            scene.check()
            peer.send(bytes(1 << 16))
            assert peer.rest() == b""


def test_announced_option_data_that_never_comes(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for number in Option:
            peer = stack.enter_context(scene.stranger())
            peer.greet()
            assert peer.send(option(number, bytes(100), length=MAX_OPTION_BYTES))
        scene.check()


def test_thousands_of_options(scene: Scene) -> None:
    """The number of options is bounded, and so is what is said in answer to them."""
    with scene.stranger() as peer:
        peer.greet()
        peer.send(option(Option.LIST) * 10_000)
        scene.check()
        assert len(peer.rest()) <= (MAX_OPTIONS + 1) * 100


@pytest.mark.parametrize(
    "stream",
    [
        bytes(4),
        struct.pack(">I", HUGE),
        struct.pack(">I", 7),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes.fromhex("16030100c8010000c40303") + bytes(193),
        FLAGS + option(Option.GO, info(), magic=b"IHAVEOPS"),
        FLAGS + request(READ, 1, 0, 512),
        b"\xff" * 100_000,
    ],
    ids=["no flags", "all flags", "unknown flag", "http", "tls", "bad magic", "no negotiation", "all ones"],
)
def test_no_nbd_client(scene: Scene, stream: bytes) -> None:
    with scene.stranger() as peer:
        peer.send(stream)
        scene.check()
        assert peer.rest() in (Handshake.greeting, b"")


def test_unknown_options_with_data(scene: Scene) -> None:
    """They are refused one by one, and the client that asked goes on as any other."""
    with scene.stranger() as peer:
        peer.greet()
        for number in (0, 4, Option.STRUCTURED_REPLY + 3, 12, 99, 1 << 31, HUGE):
            assert peer.ask(number, bytes(1000)) == [(OptionReply.ERR_UNSUP, b"")]
        assert peer.ask(5) == [(OptionReply.ERR_UNSUP, b"")]
        peer.take_export(peer.ask(Option.GO, info()))
        assert shown(peer.read(5000, 5000), 5000, scene.content)


@pytest.mark.parametrize("count", [0, 1, 2, HUGE])
def test_lying_metadata_queries(scene: Scene, count: int) -> None:
    with scene.stranger() as peer:
        peer.greet()
        peer.ask(Option.STRUCTURED_REPLY)
        data = contexts()[:4] + struct.pack(">II", count, HUGE) + b"base:"
        for number in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
            assert peer.ask(number, data) == [(OptionReply.ERR_INVALID, b"")]
        scene.check()


@pytest.mark.parametrize("seed", range(10))
def test_damaged_streams(scene: Scene, seed: int) -> None:
    """A conversation with a few bytes changed, in pieces of any size."""
    choice = random.Random(seed)
    stream = bytearray(NEGOTIATION)
    for cookie in range(40):
        command = choice.choice([READ, READ, WRITE, Command.TRIM, BLOCK_STATUS, Command.FLUSH])
        stream += request(command, cookie, choice.randrange(SIZE), choice.randrange(8000)) + bytes(10)
    for _ in range(choice.randrange(1, 6)):
        stream[choice.randrange(len(stream))] = choice.randrange(256)
    with scene.stranger() as peer:
        at = 0
        while at < len(stream):
            piece = choice.randrange(1, 400)
            if not peer.send(bytes(stream[at : at + piece])):
                break
            at += piece
        scene.check()
    scene.check()

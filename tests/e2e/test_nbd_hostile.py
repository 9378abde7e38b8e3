"""Clients that are broken, slow or malicious, against a real device host: they end themselves, and hurt nobody else.

While one misbehaves, a well-behaved client goes on reading the right bytes on its own connection and another can
connect; afterwards the host holds nothing of it. Every reply that a client may expect comes exactly once.
"""

import contextlib
import errno
import itertools
import random
import socket
from collections.abc import Callable, Iterator

import pytest
from devicerig import SIZE, Device, Images
from nbdpeer import FLAGS, NEGOTIATED, NEGOTIATION, Peer, info, option, request
from nbdrig import Scene, Target, attack, shown, target

from snapd.device.export import MAX_CONNECTIONS
from snapd.device.handshake import Handshake
from snapd.device.nbd import GREETING, MAX_REQUEST_BYTES, REQUEST, Command, CommandFlag, Option, OptionReply

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


# Requests that make no sense, from a client that is served on.


BAD_RANGES = [
    (SIZE, 1),
    (SIZE - 1, 2),
    (0, SIZE + 1),
    (0, MAX_REQUEST_BYTES + 1),
    (0, 0x7FFFFFFF),
    (0, 0x80000000),
    (0, HUGE),
    (SIZE - 1, HUGE),
    (1 << 63, 512),
    ((1 << 63) - 1, 1),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 512, 512),
    ((1 << 64) - 4096, 8192),
    ((1 << 64) - 1, HUGE),
]


@pytest.mark.parametrize("structured", [False, True])
def test_ranges_outside_the_device(scene: Scene, structured: bool) -> None:
    """Each is refused, none of the good ones between them is."""
    commands = [READ, BLOCK_STATUS] if structured else [READ]
    with scene.peer(structured=structured, allocation=structured) as peer:
        for offset, length in BAD_RANGES:
            for command in commands:
                assert peer.call(command, offset, length).error in (errno.EINVAL, errno.EOVERFLOW, errno.ENOSPC)
            assert shown(peer.read(1234, 999), 1234, scene.content)
        for offset, length in BAD_RANGES:
            peer.send(peer.ready(READ, offset, length), peer.ready(READ, 777, 7777))
        for reply in peer.replies():
            assert bool(reply.error) == (reply.offset != 777)
            assert reply.error or shown(reply.data, 777, scene.content)


@pytest.mark.parametrize("structured", [False, True])
def test_unknown_commands_and_flags(scene: Scene, structured: bool) -> None:
    good = {READ, Command.DISC, Command.FLUSH, Command.CACHE}
    with scene.peer(structured=structured) as peer:
        for command in {*range(20), 0x7FFF, 0x8000, 0xFFFF} - good:
            if command != WRITE:
                assert peer.call(command, 0, 4096).error
        for flags in (1 << 5, 1 << 15, 0xFFFF, CommandFlag.REQ_ONE, CommandFlag.FAST_ZERO, CommandFlag.NO_HOLE):
            assert peer.call(READ, 0, 4096, flags=flags).error == errno.EINVAL
        assert shown(peer.read(0, 4096), 0, scene.content)


def test_block_status_that_was_not_agreed_on(scene: Scene) -> None:
    for structured in (False, True):
        with scene.peer(structured=structured) as peer:
            assert peer.call(BLOCK_STATUS, 0, 4096).error == errno.EINVAL
            assert shown(peer.read(0, 100), 0, scene.content)


def test_changes_to_a_read_only_export(scene: Scene) -> None:
    """They are refused, whatever their range; the payload of a write is skipped."""
    with scene.peer() as peer:
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            for offset, length in [(0, 4096), (0, 0), *BAD_RANGES]:
                assert peer.call(command, offset, length).error == errno.EPERM
        for length in (1, 4096, 3 << 20):
            payload = request(READ, 99, 0, 512) * (length // REQUEST.size + 1)
            peer.send(peer.ready(READ, 1, 2), peer.ready(WRITE, 0, length, payload=payload[:length]))
            assert {reply.command: reply.error for reply in peer.replies()} == {READ: 0, WRITE: errno.EPERM}
        assert shown(peer.read(0, SIZE), 0, scene.content)


def test_write_payload_that_never_comes(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for sent in (0, 1, 100_000):
            peer = stack.enter_context(scene.peer())
            assert peer.send(peer.ready(WRITE, 0, MAX_REQUEST_BYTES, payload=bytes(sent)))
        scene.check()


@pytest.mark.parametrize("length", [MAX_REQUEST_BYTES + 1, HUGE])
def test_write_payload_beyond_the_maximum(scene: Scene, length: int) -> None:
    """Nobody waits for a payload of 4 GiB: it is the end of the connection."""
    with scene.peer() as peer:
        peer.send(peer.ready(WRITE, 0, length))
        scene.check()
        assert len(peer.rest()) <= 100


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698, HUGE])
def test_bad_request_magic(scene: Scene, magic: int) -> None:
    with scene.peer() as peer:
        assert shown(peer.read(0, 100), 0, scene.content)
        peer.send(request(READ, 7, 0, 512, magic=magic), request(READ, 8, 0, 512))
        assert peer.rest() == b""


def test_goodbye_and_more(scene: Scene) -> None:
    """What follows a DISC is not looked at."""
    with scene.peer() as peer:
        peer.send(request(Command.DISC, 1), b"\xff" * 100_000)
        assert peer.rest() == b""


# Connections that are left half open, or all at once.


def steps(scene: Scene) -> Iterator[tuple[str, Peer]]:
    """A client at each point of its life, once more for each."""
    peer = scene.stranger()
    yield "connected", peer
    peer = scene.stranger()
    peer.receive(GREETING.size)
    yield "greeted", peer
    peer = scene.stranger()
    peer.greet()
    yield "flags sent", peer
    peer = scene.stranger()
    peer.greet()
    peer.ask(Option.STRUCTURED_REPLY)
    peer.send(option(Option.GO, info())[:-1])
    yield "inside an option", peer
    yield "negotiated", scene.peer(structured=True)
    peer = scene.peer()
    peer.send(request(READ, 1, 0, 512)[:13])
    yield "inside a request", peer
    peer = scene.peer()
    peer.send(*(peer.ready(READ, 4096 * i, 65_536) for i in range(50)))
    yield "reads in flight", peer
    peer = scene.peer()
    peer.send(peer.ready(WRITE, 0, 1 << 20, payload=bytes(1000)))
    yield "inside a payload", peer


@pytest.mark.parametrize("how", ["SHUT_RD", "SHUT_WR", "SHUT_RDWR"])
def test_half_open(scene: Scene, how: str) -> None:
    """Either direction shut at each point of a client's life, the client staying."""
    with contextlib.ExitStack() as stack:
        for _point, peer in steps(scene):
            stack.enter_context(peer)
            peer.socket.shutdown(getattr(socket, how))
            scene.check()


@pytest.mark.parametrize("flags", [0, 1])
def test_vanishing_clients(scene: Scene, flags: int) -> None:
    """They go with reads in flight, and with replies that they have not taken."""
    choice = random.Random(flags)
    for _ in range(40):
        with scene.peer(structured=bool(flags)) as peer:
            peer.send(*(peer.ready(READ, choice.randrange(SIZE - 70_000), 70_000) for _ in range(32)))
            if choice.randrange(2):
                peer.reply()
    scene.check()


def test_flood_of_connections(scene: Scene) -> None:
    """Far more than there may be, none of which negotiates: whoever does is let in, in the place of the oldest."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.stranger()) for _ in range(3 * MAX_CONNECTIONS)]
        scene.check()
        assert scene.device.status()["connections"] <= MAX_CONNECTIONS
        for peer in peers[: MAX_CONNECTIONS // 2]:
            peer.socket.close()
        scene.check()


def test_flood_of_idle_clients(scene: Scene) -> None:
    """Those that have negotiated may stay, however idle; others are refused, until there is room again."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.peer()) for _ in range(MAX_CONNECTIONS - 1)]
        with scene.stranger() as refused:
            assert refused.rest() == b""
        scene.check(newcomers=False)
        for peer in peers:
            assert shown(peer.read(4096, 4096), 4096, scene.content)
        peers[0].socket.close()
        scene.settle(lambda status: status["connections"] < MAX_CONNECTIONS)
        scene.check()


def test_flood_of_short_connections(scene: Scene) -> None:
    for turn in range(500):
        with scene.stranger():
            if not turn % 50:
                scene.check()


# Clients that do not read, or hardly write.


@pytest.mark.parametrize("count", [1, 3, 12])
def test_clients_that_never_read(scene: Scene, count: int) -> None:
    """They ask for much and take nothing: what they hold is theirs, others get on."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.peer()) for _ in range(count)]
        for peer in peers:
            peer.send_what_fits(b"".join(request(READ, cookie, 0, 1 << 20) for cookie in range(64)))
        scene.check()
        scene.check()


def test_flood_of_small_requests(scene: Scene) -> None:
    """A pipeline of very many requests, whose client reads nothing until it can send no more; then each is answered."""
    with scene.peer() as peer:
        requests = b"".join(peer.ready(READ, i * 512 % SIZE, 512) for i in range(200_000))
        sent = peer.send_what_fits(requests)
        scene.check()
        whole = sent // REQUEST.size
        peer.under_way = dict(itertools.islice(peer.under_way.items(), whole))
        for reply in peer.replies():
            assert not reply.error
            assert shown(reply.data, reply.offset, scene.content)
        scene.check()


@pytest.mark.parametrize("structured", [False, True])
def test_byte_at_a_time(scene: Scene, structured: bool) -> None:
    """However slowly it comes, what was asked is answered."""
    with scene.stranger() as peer:
        peer.structured = structured
        assert peer.receive(GREETING.size) == Handshake.greeting
        trickle(peer, NEGOTIATION if structured else FLAGS + option(Option.GO, info()), scene.check)
        for number in NEGOTIATED if structured else (Option.GO,):
            assert peer.option_replies(number)[-1] == (OptionReply.ACK, b"")
        trickle(peer, peer.ready(READ, 3, 10_000) + peer.ready(READ, 70_000, 1), scene.check)
        for reply in peer.replies():
            assert shown(reply.data, reply.offset, scene.content)


def trickle(peer: Peer, stream: bytes, between: Callable[[], None]) -> None:
    for at in range(len(stream)):
        assert peer.send(stream[at : at + 1])
        if not at % 16:
            between()


@pytest.mark.parametrize("seed", range(4))
def test_every_reply_once(scene: Scene, seed: int) -> None:
    """Good and bad requests in any order, in pieces of any size, by several clients at once; read now and then."""
    choice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.peer(structured=bool(i % 2))) for i in range(4)]
        unsent = dict.fromkeys(peers, b"")
        for _ in range(400):
            peer = choice.choice(peers)
            length = choice.choice([1, 512, 4096, 65_536, 300_000])
            offset = choice.choice([choice.randrange(SIZE - length), SIZE - 1, 1 << 63])
            raw = unsent[peer] + peer.ready(READ, offset, length)
            cut = choice.randrange(len(raw) + 1)
            peer.send(raw[:cut])
            unsent[peer] = raw[cut:]
            while len(peer.under_way) > 12:
                peer.send(unsent[peer])
                unsent[peer] = b""
                check_reply(peer, scene.content)
        for peer in peers:
            peer.send(unsent[peer])
            while peer.under_way:
                check_reply(peer, scene.content)
            # Nothing comes after the last one.
            peer.send(request(Command.DISC, 0))
            assert peer.rest() == b""


def check_reply(peer: Peer, new: bytes) -> None:
    reply = peer.reply()
    if reply.offset + reply.length > SIZE:
        assert reply.error == errno.EINVAL
    else:
        assert not reply.error
        assert shown(reply.data, reply.offset, new)

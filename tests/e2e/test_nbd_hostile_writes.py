"""Broken, slow or malicious clients of a device that can be written to: they write what they said, or nothing.

They have the second half of the device; the first half belongs to a well-behaved client, whose content never changes.
"""

import contextlib
import errno
import itertools
import random
import struct
from collections.abc import Iterator

import pytest
from devicerig import BLOCK, SIZE, Device, Images
from nbdpeer import Peer, request
from nbdrig import Scene, Target, attack, shown, target

from snapd.device.nbd import MAX_REQUEST_BYTES, REQUEST, Command, CommandFlag

WRITE, TRIM, ZEROES, FLUSH, READ = Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.FLUSH, Command.READ
FUA, NO_HOLE = CommandFlag.FUA, CommandFlag.NO_HOLE
THEIRS = SIZE // 2
ZERO_BLOCK = bytes(BLOCK)


@pytest.fixture(scope="module", params=["raw", "worker"])
def attacked(request: pytest.FixtureRequest) -> Iterator[Target]:
    """One host for all tests: what one leaves behind, the next would notice."""
    with target(Device(Images(seed=29), request.param), "unix") as running:
        yield running


@pytest.fixture
def scene(attacked: Target) -> Iterator[Scene]:
    with attack(attacked, attacked.device.images.old[:THEIRS]) as scene:
        yield scene


def content(scene: Scene) -> bytes:
    with scene.peer() as peer:
        return peer.read(0, SIZE)


@pytest.mark.parametrize("sent", [0, 1, 511, 300_000])
def test_payload_that_never_comes(scene: Scene, sent: int) -> None:
    """Sixty clients that announce as much as they may: what has not come whole is nowhere held for long."""
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            peer = stack.enter_context(scene.peer())
            assert peer.send(peer.ready(WRITE, SIZE - (1 << 20), 1 << 20, payload=bytes(sent)))
        scene.check()


@pytest.mark.parametrize("length", [MAX_REQUEST_BYTES + 1, 0x80000000, 0xFFFFFFFF])
def test_payload_beyond_the_maximum(scene: Scene, length: int) -> None:
    before = content(scene)
    with scene.peer() as peer:
        peer.send(request(WRITE, 1, THEIRS, length), bytes(1 << 20))
        assert len(peer.rest()) <= 100
    assert content(scene) == before


def test_vanishing_writers(scene: Scene) -> None:
    """Cut off anywhere in its payload, a write changes nothing outside its range."""
    choice = random.Random(1)
    at, length = THEIRS + 8 * BLOCK, 100 * BLOCK
    before = content(scene)
    for _ in range(40):
        with scene.peer() as peer:
            raw = peer.ready(WRITE, at, length, payload=b"v" * length)
            peer.send(raw[: choice.randrange(len(raw))])
    after = content(scene)
    assert (after[:at], after[at + length :]) == (before[:at], before[at + length :])
    changed = {before[i : i + 512] == after[i : i + 512] or after[i : i + 512] for i in range(at, at + length, 512)}
    assert changed <= {True, b"v" * 512}


def test_byte_at_a_time(scene: Scene) -> None:
    payload = random.Random(2).randbytes(1536)
    with scene.peer() as peer:
        raw = peer.ready(WRITE, THEIRS + 512, len(payload), payload=payload)
        for at in range(len(raw)):
            assert peer.send(raw[at : at + 1])
            if not at % 100:
                scene.check()
        assert not peer.reply().error
        assert peer.read(THEIRS + 512, len(payload)) == payload


@pytest.mark.parametrize("structured", [False, True])
def test_changes_that_are_refused(scene: Scene, structured: bool) -> None:
    """Parts of sectors, ranges outside the device, unknown flags: the payload is skipped, and nothing changes."""
    before = content(scene)
    ranges = [
        *((1, 512), (0, 511), (THEIRS + 100, 100), (SIZE, 512), (SIZE - 512, 1024), (SIZE - 1, 1)),
        *((1 << 63, 512), ((1 << 64) - 512, 512), ((1 << 64) - 512, 1024), ((1 << 64) - 1, 1)),
    ]
    with scene.peer(structured=structured) as peer:
        for offset, length in ranges:
            # The payload looks like requests that would do harm.
            payload = (request(ZEROES, 7, 0, THEIRS) * 40)[:length]
            for command in (WRITE, TRIM, ZEROES):
                reply = peer.call(command, offset, length, payload=payload if command == WRITE else b"")
                assert reply.error in (errno.EINVAL, errno.ENOSPC), (command, offset, length)
        for flags in (CommandFlag.DF, CommandFlag.REQ_ONE, CommandFlag.FAST_ZERO, 1 << 5, 1 << 15, NO_HOLE):
            for command in (WRITE, TRIM, ZEROES):
                if (command, flags) != (ZEROES, NO_HOLE):
                    payload = ZERO_BLOCK if command == WRITE else b""
                    assert peer.call(command, 0, BLOCK, flags=flags, payload=payload).error == errno.EINVAL
        assert peer.read(0, SIZE) == before


def test_flood_of_small_writes(scene: Scene) -> None:
    """A pipeline of very many, whose client takes no reply until it can send no more; then each is answered, once."""
    count = 60_000
    with scene.peer() as peer:
        each = REQUEST.size + 512
        stream = b"".join(
            peer.ready(WRITE, THEIRS + i * 512 % THEIRS, 512, payload=struct.pack(">Q", i) * 64) for i in range(count)
        )
        sent = peer.send_what_fits(stream)
        scene.check()
        whole, part = divmod(sent, each)
        if part:
            # The rest of one that has been begun.
            assert peer.send(stream[sent : sent + each - part])
            whole += 1
        peer.under_way = dict(itertools.islice(peer.under_way.items(), whole))
        assert not any(reply.error for reply in peer.replies())
        last = {i * 512 % THEIRS: i for i in range(whole)}
        found = peer.read(THEIRS, THEIRS)
        assert all(found[at : at + 512] == struct.pack(">Q", i) * 64 for at, i in last.items())


def test_flood_of_everything_slow(scene: Scene) -> None:
    """Flushes, discards and zeroes by the thousand, from several clients that take no reply meanwhile."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.peer(structured=bool(i % 2))) for i in range(4)]
        for peer in peers:
            for _ in range(250):
                peer.send(
                    peer.ready(ZEROES, THEIRS, BLOCK, flags=FUA),
                    peer.ready(TRIM, THEIRS, 1 << 20),
                    peer.ready(FLUSH),
                    peer.ready(WRITE, THEIRS, BLOCK, flags=FUA, payload=ZERO_BLOCK),
                )
        scene.check()
        for peer in peers:
            assert not any(reply.error for reply in peer.replies())


@pytest.mark.parametrize("seed", range(4))
def test_every_change_once(scene: Scene, seed: int) -> None:
    """Good and bad changes by several clients, each on blocks of its own, in pieces of any size; then all is there."""
    choice = random.Random(seed)
    share = THEIRS // 4
    model = bytearray(content(scene))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(scene.peer(structured=bool(i % 2))) for i in range(4)]
        unsent = dict.fromkeys(peers, b"")

        def settle(peer: Peer) -> None:
            peer.send(unsent[peer])
            unsent[peer] = b""
            for reply in peer.replies():
                assert bool(reply.error) == (reply.offset >= SIZE or reply.offset % 512 != 0)

        for _ in range(300):
            number = choice.randrange(4)
            peer = peers[number]
            # No two requests for the same bytes are in flight: those may be done in any order.
            settle(peer)
            for slot in range(choice.randrange(1, 9)):
                first = THEIRS + number * share + slot * share // 8
                offset = first + choice.randrange(20) * 512
                length = choice.choice([512, 4096, 9 * 512, 40 * 512])
                data = choice.randbytes(length)
                command = choice.choice([WRITE, WRITE, WRITE, ZEROES])
                flags = choice.choice([0, 0, FUA]) | (choice.choice([0, NO_HOLE]) if command == ZEROES else 0)
                bad = choice.randrange(6)
                if bad == 0:
                    offset = choice.choice([offset + 1, SIZE, 1 << 62])
                else:
                    model[offset : offset + length] = data if command == WRITE else bytes(length)
                payload = data if command == WRITE else b""
                raw = unsent[peer] + peer.ready(command, offset, length, flags=flags, payload=payload)
                cut = choice.randrange(len(raw) + 1)
                peer.send(raw[:cut])
                unsent[peer] = raw[cut:]
        for peer in peers:
            settle(peer)
            assert not peer.call(FLUSH).error
            # Nothing comes after the last one.
            peer.send(request(Command.DISC, 0))
            assert peer.rest() == b""
    assert shown(content(scene), 0, bytes(model)), f"seed {seed}"
    with open(scene.device.base_path, "rb") as store:
        assert store.read() == model

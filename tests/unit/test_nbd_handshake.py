"""The fixed newstyle handshake, byte by byte, and what it does with nonsense."""

import errno
import random
import struct

import pytest

from snapd.block.errors import SnapdError
from snapd.device.nbd import MAX_OPTION_BYTES, MAX_OPTIONS, Handshake

SIZE = 5 << 20
FLAGS = struct.pack(">I", 3)
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
EXPORT_FLAGS = struct.pack(">H", 0x103)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY_MAGIC + struct.pack(">III", number, kind, len(data)) + data


def info(name: bytes = b"", requests: tuple[int, ...] = ()) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def export_replies(number: int) -> bytes:
    return (
        reply(number, 3, struct.pack(">HQ", 0, SIZE) + EXPORT_FLAGS)
        + reply(number, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))
        + reply(number, 1)
    )


def test_greeting() -> None:
    assert Handshake(SIZE).greeting == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("requests", [(), (0,), (3, 0, 1)])
def test_go(requests: tuple[int, ...]) -> None:
    handshake = Handshake(SIZE)
    stream = FLAGS + option(7, info(requests=requests))
    assert handshake.feed(stream + b"\x25\x60\x95\x13") == (len(stream), export_replies(7))
    assert handshake.finished


def test_info_then_go() -> None:
    handshake = Handshake(SIZE)
    used, replies = handshake.feed(FLAGS + option(6, info()))
    assert replies == export_replies(6)
    assert not handshake.finished
    assert handshake.feed(option(7, info()))[1] == export_replies(7)
    assert handshake.finished
    assert used == 26


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0)])
def test_export_name(flags: int, padding: int) -> None:
    handshake = Handshake(SIZE)
    _, replies = handshake.feed(struct.pack(">I", flags) + option(1))
    assert replies == struct.pack(">Q", SIZE) + EXPORT_FLAGS + bytes(padding)
    assert handshake.finished


def test_list() -> None:
    handshake = Handshake(SIZE)
    assert handshake.feed(FLAGS + option(3))[1] == reply(3, 2, bytes(4)) + reply(3, 1)
    assert handshake.feed(option(3, b"x"))[1] == reply(3, 0x80000003)


def test_abort() -> None:
    handshake = Handshake(SIZE)
    assert handshake.feed(FLAGS + option(2) + option(7, info()))[1] == reply(2, 1)
    assert handshake.aborted
    assert not handshake.finished


@pytest.mark.parametrize("number", [0, 4, 5, 8, 9, 10, 11, 0xFFFFFFFF])
def test_unknown_option(number: int) -> None:
    handshake = Handshake(SIZE)
    assert handshake.feed(FLAGS + option(number, b"some data"))[1] == reply(number, 0x80000001)
    assert handshake.feed(option(7, info()))[1] == export_replies(7)


def test_unknown_export() -> None:
    handshake = Handshake(SIZE)
    assert handshake.feed(FLAGS + option(7, info(b"other")))[1] == reply(7, 0x80000006)
    assert not handshake.finished
    with pytest.raises(SnapdError) as error:
        handshake.feed(option(1, b"other"))
    assert error.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    "data",
    [b"", bytes(5), bytes(7), struct.pack(">IH", 100, 0), struct.pack(">IH", 0, 3), b"\xff" * 6, info() + b"x"],
)
def test_malformed_info(data: bytes) -> None:
    handshake = Handshake(SIZE)
    assert handshake.feed(FLAGS + option(7, data))[1] == reply(7, 0x80000003)
    assert not handshake.finished


@pytest.mark.parametrize("cut", range(30))
def test_bytes_in_any_pieces(cut: int) -> None:
    handshake = Handshake(SIZE)
    stream = FLAGS + option(6, info()) + option(7, info())
    used, replies = handshake.feed(stream[:cut])
    rest_used, rest = handshake.feed(stream[used:])
    assert used + rest_used == len(stream)
    assert replies + rest == export_replies(6) + export_replies(7)


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">I", 0),
        struct.pack(">I", 7),
        struct.pack(">I", 0xFFFFFFFF),
        FLAGS + b"IHAVEOPS" + bytes(8),
        FLAGS + b"IHAVEOPT" + struct.pack(">II", 7, MAX_OPTION_BYTES + 1),
        FLAGS + option(99) * (MAX_OPTIONS + 1),
    ],
    ids=["old style", "unknown flag", "all flags", "bad magic", "huge option", "endless options"],
)
def test_hang_up(stream: bytes) -> None:
    with pytest.raises(SnapdError) as error:
        Handshake(SIZE).feed(stream)
    assert error.value.errno == errno.EPROTO


@pytest.mark.parametrize("seed", range(200))
def test_nonsense_never_gets_through(seed: int) -> None:
    """Random options end in replies, in waiting for more, or in EPROTO; never in another error."""
    choice = random.Random(seed)
    stream = FLAGS
    for _ in range(choice.randrange(6)):
        data = choice.randbytes(choice.randrange(40))
        stream += option(choice.choice([1, 2, 3, 6, 7, 8, choice.getrandbits(32)]), data)
    raw = bytearray(stream)
    for _ in range(choice.randrange(3)):
        raw[choice.randrange(len(raw))] = choice.randrange(256)
    handshake = Handshake(SIZE)
    try:
        used, _ = handshake.feed(raw)
    except SnapdError as error:
        used = 0
        if error.errno != errno.EPROTO:
            raise
    assert used <= len(raw)

"""The fixed newstyle handshake, byte by byte, and what it does with nonsense."""

import errno
import random
import struct

import pytest

from snapd.block.errors import SnapdError
from snapd.device.handshake import MAX_OPTION_BYTES, MAX_OPTIONS, Handshake

SIZE = 5 << 20
FLAGS = struct.pack(">I", 3)
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
READ_ONLY, WRITABLE, DF = 0x10F, 0x16D, 0x80
INFO, GO, STRUCTURED, LIST_META, SET_META = 6, 7, 8, 9, 10
ACK, ERR_INVALID, ERR_UNKNOWN = 1, 0x80000003, 0x80000006
ALLOCATION = b"base:allocation"


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY_MAGIC + struct.pack(">III", number, kind, len(data)) + data


def info(name: bytes = b"", requests: tuple[int, ...] = ()) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def export_replies(number: int, flags: int = READ_ONLY, min_block: int = 1) -> bytes:
    return (
        reply(number, 3, struct.pack(">HQH", 0, SIZE, flags))
        + reply(number, 3, struct.pack(">HIII", 3, min_block, 4096, 32 << 20))
        + reply(number, ACK)
    )


def contexts(*queries: bytes, name: bytes = b"") -> bytes:
    texts = b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) + texts


def context_reply(number: int) -> bytes:
    return reply(number, 4, struct.pack(">I", 1) + ALLOCATION) + reply(number, ACK)


def start(*, read_only: bool = True, can_multi_conn: bool = True) -> Handshake:
    return Handshake(SIZE, read_only=read_only, can_multi_conn=can_multi_conn)


def structured() -> Handshake:
    handshake = start()
    assert handshake.feed(FLAGS + option(STRUCTURED))[1] == reply(STRUCTURED, ACK)
    return handshake


def test_greeting() -> None:
    assert Handshake.greeting == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("requests", [(), (0,), (3, 0, 1)])
def test_go(requests: tuple[int, ...]) -> None:
    handshake = start()
    stream = FLAGS + option(7, info(requests=requests))
    assert handshake.feed(stream + b"\x25\x60\x95\x13") == (len(stream), export_replies(7))
    assert handshake.finished


def test_info_then_go() -> None:
    handshake = start()
    used, replies = handshake.feed(FLAGS + option(6, info()))
    assert replies == export_replies(6)
    assert not handshake.finished
    assert handshake.feed(option(7, info()))[1] == export_replies(7)
    assert handshake.finished
    assert used == 26


@pytest.mark.parametrize(("flags", "padding"), [(1, 124), (3, 0)])
def test_export_name(flags: int, padding: int) -> None:
    handshake = start()
    _, replies = handshake.feed(struct.pack(">I", flags) + option(1))
    assert replies == struct.pack(">QH", SIZE, READ_ONLY) + bytes(padding)
    assert handshake.finished


def test_list() -> None:
    handshake = start()
    assert handshake.feed(FLAGS + option(3))[1] == reply(3, 2, bytes(4)) + reply(3, 1)
    assert handshake.feed(option(3, b"x"))[1] == reply(3, 0x80000003)


def test_abort() -> None:
    handshake = start()
    assert handshake.feed(FLAGS + option(2) + option(7, info()))[1] == reply(2, 1)
    assert handshake.aborted
    assert not handshake.finished


@pytest.mark.parametrize("number", [0, 4, 5, 11, 12, 0xFFFFFFFF])
def test_unknown_option(number: int) -> None:
    handshake = start()
    assert handshake.feed(FLAGS + option(number, b"some data"))[1] == reply(number, 0x80000001)
    assert handshake.feed(option(7, info()))[1] == export_replies(7)


def test_unknown_export() -> None:
    handshake = start()
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
    handshake = start()
    assert handshake.feed(FLAGS + option(7, data))[1] == reply(7, 0x80000003)
    assert not handshake.finished


@pytest.mark.parametrize(
    ("read_only", "can_multi_conn", "flags", "min_block"),
    [(True, True, READ_ONLY, 1), (True, False, 0x0F, 1), (False, True, WRITABLE, 512), (False, False, 0x6D, 512)],
)
def test_what_an_export_can_do(read_only: bool, can_multi_conn: bool, flags: int, min_block: int) -> None:
    handshake = start(read_only=read_only, can_multi_conn=can_multi_conn)
    assert handshake.feed(FLAGS + option(INFO, info()))[1] == export_replies(INFO, flags, min_block)
    handshake.feed(option(STRUCTURED))
    assert handshake.feed(option(GO, info()))[1] == export_replies(GO, flags | DF, min_block)


def test_plain_client() -> None:
    handshake = start()
    handshake.feed(FLAGS + option(GO, info()))
    assert (handshake.finished, handshake.structured, handshake.allocation_context) == (True, False, False)


def test_structured_replies() -> None:
    """Asked for twice they are granted twice; data with the request is an error that changes nothing."""
    handshake = start()
    assert handshake.feed(FLAGS + option(STRUCTURED, b"x"))[1] == reply(STRUCTURED, ERR_INVALID)
    assert not handshake.structured
    assert handshake.feed(option(STRUCTURED) * 2)[1] == reply(STRUCTURED, ACK) * 2
    assert handshake.structured
    assert handshake.feed(option(1))[1] == struct.pack(">QH", SIZE, READ_ONLY | DF)


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_contexts_need_structured_replies(number: int) -> None:
    handshake = start()
    assert handshake.feed(FLAGS + option(number, contexts(ALLOCATION)))[1] == reply(number, ERR_INVALID)
    handshake.feed(option(STRUCTURED) + option(GO, info()))
    assert not handshake.allocation_context


@pytest.mark.parametrize(
    ("queries", "is_listed"),
    [
        ((), True),
        ((ALLOCATION,), True),
        ((b"base:",), True),
        ((b"other:x", ALLOCATION, ALLOCATION), True),
        ((b"base",), False),
        ((b"",), False),
        ((b"base:allocation2", b"base:alloc", b"qemu:dirty-bitmap:x"), False),
    ],
)
def test_list_contexts(queries: tuple[bytes, ...], is_listed: bool) -> None:
    handshake = structured()
    expected = context_reply(LIST_META) if is_listed else reply(LIST_META, ACK)
    assert handshake.feed(option(LIST_META, contexts(*queries)))[1] == expected
    assert not handshake.allocation_context


@pytest.mark.parametrize(
    ("queries", "is_set"),
    [
        ((ALLOCATION,), True),
        ((b"other:x", ALLOCATION, b"base:", ALLOCATION), True),
        ((), False),
        ((b"base:",), False),
        ((b"base:allocation\0",), False),
    ],
)
def test_set_contexts(queries: tuple[bytes, ...], is_set: bool) -> None:
    """What to set must be named in full; what is not known is left out."""
    handshake = structured()
    expected = context_reply(SET_META) if is_set else reply(SET_META, ACK)
    assert handshake.feed(option(SET_META, contexts(*queries)))[1] == expected
    handshake.feed(option(GO, info()))
    assert handshake.allocation_context == is_set


@pytest.mark.parametrize(
    ("later", "answer"),
    [
        (option(SET_META, contexts()), reply(SET_META, ACK)),
        (option(SET_META, contexts(b"other:x")), reply(SET_META, ACK)),
        (option(SET_META, contexts(ALLOCATION, name=b"other")), reply(SET_META, ERR_UNKNOWN)),
        (option(SET_META, contexts(ALLOCATION)[:-1]), reply(SET_META, ERR_INVALID)),
        (option(INFO, info(b"other")), reply(INFO, ERR_UNKNOWN)),
        (option(GO, info(b"other")), reply(GO, ERR_UNKNOWN)),
    ],
    ids=["nothing", "something else", "another export", "malformed", "info on another", "go to another"],
)
def test_a_context_that_was_set_is_gone(later: bytes, answer: bytes) -> None:
    """Whatever replaces it, even in vain, or turns to another export."""
    handshake = structured()
    handshake.feed(option(SET_META, contexts(ALLOCATION)))
    assert handshake.allocation_context
    assert handshake.feed(later)[1] == answer
    handshake.feed(option(GO, info()))
    assert handshake.finished
    assert not handshake.allocation_context


@pytest.mark.parametrize(
    "harmless",
    [
        option(INFO, info()),
        option(INFO, b"x"),
        option(LIST_META, contexts(ALLOCATION, name=b"other")),
        option(3),
        option(5),
        option(11),
        option(STRUCTURED),
    ],
    ids=["info", "bad info", "list for another", "list", "starttls", "extended headers", "structured again"],
)
def test_a_context_stays_set(harmless: bytes) -> None:
    handshake = structured()
    handshake.feed(option(SET_META, contexts(ALLOCATION)) + harmless + option(GO, info()))
    assert handshake.finished
    assert handshake.allocation_context


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_malformed_contexts(number: int) -> None:
    """Cut anywhere, or with a length or count that does not add up, a query is invalid and nothing is set."""
    good = contexts(b"other:x", ALLOCATION)
    bad = [good[:cut] for cut in range(len(good))] + [good + b"x"]
    for at in (0, 4, 8, 19):
        bad += [good[:at] + struct.pack(">I", value) + good[at + 4 :] for value in (0xFFFFFFFF, 0x7FFFFFFF, 50)]
    for data in bad:
        handshake = structured()
        assert handshake.feed(option(number, data))[1] == reply(number, ERR_INVALID)
        assert not handshake.allocation_context


@pytest.mark.parametrize("cut", range(30))
def test_bytes_in_any_pieces(cut: int) -> None:
    handshake = start()
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
        start().feed(stream)
    assert error.value.errno == errno.EPROTO


@pytest.mark.parametrize("seed", range(200))
def test_nonsense_never_gets_through(seed: int) -> None:
    """Random options end in replies, in waiting for more, or in EPROTO; never in another error."""
    choice = random.Random(seed)
    stream = FLAGS
    for _ in range(choice.randrange(6)):
        data = choice.randbytes(choice.randrange(40))
        stream += option(choice.choice([1, 2, 3, 6, 7, 8, 9, 10, choice.getrandbits(32)]), data)
    raw = bytearray(stream)
    for _ in range(choice.randrange(3)):
        raw[choice.randrange(len(raw))] = choice.randrange(256)
    handshake = start()
    try:
        used, _ = handshake.feed(raw)
    except SnapdError as error:
        used = 0
        if error.errno != errno.EPROTO:
            raise
    assert used <= len(raw)

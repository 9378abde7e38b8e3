"""The FUSE messages, byte by byte, and what a directory with one file of a fixed size says to everything else."""

import errno
import os
import stat
import struct

import pytest

from snapd.device.fuse import NOTIFY_RESEND, Opcode, Session

SIZE = 5 << 20
ROOT, IMAGE = 1, 2
UNIQUE = 0x8000_0000_0000_1234
"""The highest bit says that the kernel sends it again; it comes back as it is."""

ASYNC_READ, BIG_WRITES, ASYNC_DIO, WRITEBACK = 1 << 0, 1 << 5, 1 << 15, 1 << 16
PARALLEL_DIROPS, MAX_PAGES, INIT_EXT = 1 << 18, 1 << 22, 1 << 30
HAS_RESEND_HIGH = 1 << 7
OFFERED_BY_LINUX_6_9 = 0x73FF_FFFB


@pytest.fixture
def session() -> Session:
    return Session(SIZE, read_only=False)


def ask(session: Session, opcode: int, body: bytes = b"", node: int = ROOT) -> bytes:
    """The payload of an answer that says that it was done."""
    answer = session.answer(opcode, UNIQUE, node, body)
    assert answer is not None
    length, number, unique = struct.unpack_from("=IiQ", answer)
    assert (length, number, unique) == (len(answer), 0, UNIQUE)
    return answer[16:]


def refused(session: Session, opcode: int, body: bytes = b"", node: int = ROOT) -> int:
    """The errno of an answer that says that it was not."""
    answer = session.answer(opcode, UNIQUE, node, body)
    assert answer is not None
    length, number, unique = struct.unpack("=IiQ", answer)
    assert (length, unique) == (16, UNIQUE)
    return int(-number)


def init(minor: int, flags: int, high_flags: int = 0, major: int = 7) -> bytes:
    return struct.pack("=IIIII44x", major, minor, 128 << 10, flags, high_flags)


def attributes(node: int, size: int, mode: int, links: int) -> bytes:
    return struct.pack("=QQQ36xIIIIIII", node, size, size // 512, mode, links, 0, 0, 0, 4096, 0)


def read_in(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def test_init_of_a_kernel_that_sends_again(session: Session) -> None:
    """64 bytes: version, readahead, flags, 128 and 96 in the background, 1 MiB in 256 pages, and HAS_RESEND."""
    flags = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT
    expected = struct.pack("=IIII", 7, 40, 128 << 10, flags) + struct.pack("=HHIIHHI", 128, 96, 1 << 20, 1, 256, 0, 128)
    assert ask(session, Opcode.INIT, init(44, OFFERED_BY_LINUX_6_9, 0xFFFF_FFFF)) == expected + bytes(28)


def test_init_takes_only_what_is_offered(session: Session) -> None:
    answer = ask(session, Opcode.INIT, init(31, ASYNC_READ | MAX_PAGES | WRITEBACK, HAS_RESEND_HIGH))
    assert struct.unpack_from("=IIII", answer) == (7, 31, 128 << 10, ASYNC_READ | MAX_PAGES)
    # Without INIT_EXT nobody has said what the upper half means.
    assert struct.unpack_from("=I", answer, 32) == (0,)


def test_writeback_cache_is_never_taken(session: Session) -> None:
    """A write that the kernel only remembers would be called durable by nobody but us."""
    answer = ask(session, Opcode.INIT, init(45, 0xFFFF_FFFF, 0xFFFF_FFFF))
    (flags,) = struct.unpack_from("=I", answer, 12)
    assert not flags & WRITEBACK


def test_versions(session: Session) -> None:
    """An older kernel's minor is taken over, a newer major is told ours and asks again, an older one is refused."""
    assert struct.unpack_from("=II", ask(session, Opcode.INIT, init(28, 0)))[:2] == (7, 28)
    assert struct.unpack_from("=II", ask(session, Opcode.INIT, init(1, 0, major=8)))[:2] == (7, 40)
    assert refused(session, Opcode.INIT, init(40, 0, major=6)) == errno.EPROTO
    assert refused(session, Opcode.INIT, b"\0" * 8) == errno.EINVAL


def test_notification_to_send_again() -> None:
    """Length 16, code 7 in the place of the errno, unique 0."""
    assert struct.pack("=IiQ", 16, 7, 0) == NOTIFY_RESEND


def test_lookup(session: Session) -> None:
    entry = ask(session, Opcode.LOOKUP, b"image\0")
    assert struct.unpack_from("=QQ", entry) == (IMAGE, 0)
    entry_valid_s, attributes_valid_s = struct.unpack_from("=QQ", entry, 16)
    assert min(entry_valid_s, attributes_valid_s) > 1_000_000_000
    assert entry[40:] == attributes(IMAGE, SIZE, stat.S_IFREG | 0o600, 1)
    assert refused(session, Opcode.LOOKUP, b"image2\0") == errno.ENOENT
    assert refused(session, Opcode.LOOKUP, b"imag\0") == errno.ENOENT
    assert refused(session, Opcode.LOOKUP, b"image\0", IMAGE) == errno.ENOTDIR


def test_attributes(session: Session) -> None:
    """The file is nobody's but root's, and nothing about it depends on when it is asked."""
    assert ask(session, Opcode.GETATTR, bytes(16))[16:] == attributes(ROOT, 0, stat.S_IFDIR | 0o500, 2)
    assert ask(session, Opcode.GETATTR, bytes(16), IMAGE)[16:] == attributes(IMAGE, SIZE, stat.S_IFREG | 0o600, 1)
    read_only = Session(SIZE, read_only=True)
    assert ask(read_only, Opcode.GETATTR, bytes(16), IMAGE)[16:] == attributes(IMAGE, SIZE, stat.S_IFREG | 0o400, 1)
    assert refused(session, Opcode.GETATTR, bytes(16), 3) == errno.ENOENT


def test_open(session: Session) -> None:
    """No page cache behind the loop device, and writes side by side."""
    answer = struct.pack("=QII", 0, (1 << 0) | (1 << 6), 0)
    assert ask(session, Opcode.OPEN, struct.pack("=II", os.O_RDWR, 0), IMAGE) == answer
    assert refused(session, Opcode.OPEN, struct.pack("=II", os.O_RDONLY, 0), ROOT) == errno.EISDIR
    read_only = Session(SIZE, read_only=True)
    assert ask(read_only, Opcode.OPEN, struct.pack("=II", os.O_RDONLY, 0), IMAGE) == answer
    for flags in (os.O_RDWR, os.O_WRONLY):
        assert refused(read_only, Opcode.OPEN, struct.pack("=II", flags, 0), IMAGE) == errno.EROFS


def test_directory(session: Session) -> None:
    assert ask(session, Opcode.OPENDIR, struct.pack("=II", 0, 0)) == bytes(16)
    dot = struct.pack("=QQII", 1, 1, 1, 4) + b".".ljust(8, b"\0")
    dot_dot = struct.pack("=QQII", 1, 2, 2, 4) + b"..".ljust(8, b"\0")
    image = struct.pack("=QQII", 2, 3, 5, 8) + b"image".ljust(8, b"\0")
    assert ask(session, Opcode.READDIR, read_in(0, 4096)) == dot + dot_dot + image
    assert ask(session, Opcode.READDIR, read_in(0, 79)) == dot + dot_dot
    assert ask(session, Opcode.READDIR, read_in(2, 4096)) == image
    assert ask(session, Opcode.READDIR, read_in(3, 4096)) == b""


def test_file_system(session: Session) -> None:
    blocks, free, available, files, free_files, block_bytes = struct.unpack_from("=QQQQQI", ask(session, Opcode.STATFS))
    assert (blocks * block_bytes, free, available, files, free_files) == (SIZE, 0, 0, 2, 0)


@pytest.mark.parametrize("opcode", [Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT])
def test_what_gets_no_answer(session: Session, opcode: Opcode) -> None:
    assert session.answer(opcode, UNIQUE, IMAGE, bytes(16)) is None


@pytest.mark.parametrize("opcode", [Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.DESTROY])
def test_what_is_simply_done(session: Session, opcode: Opcode) -> None:
    assert ask(session, opcode, bytes(24), IMAGE) == b""


def test_sizes_are_fixed(session: Session) -> None:
    assert refused(session, Opcode.SETATTR, bytes(88), IMAGE) == errno.EPERM
    assert refused(Session(SIZE, read_only=True), Opcode.SETATTR, bytes(88), IMAGE) == errno.EROFS


NAMES_CHANGE = (6, 8, 9, 10, 11, 12, 13, 21, 24, 35, 45, 51)
NEVER_ASKED_AGAIN = (5, 22, 23, 25, 30, 31, 32, 33, 34, 37, 39, 40, 44, 46, 47, 48, 49, 50, 52, 4096)


@pytest.mark.parametrize("opcode", NAMES_CHANGE)
def test_names_do_not_change(session: Session, opcode: int) -> None:
    assert refused(session, opcode, bytes(64)) == errno.EROFS


@pytest.mark.parametrize("opcode", NEVER_ASKED_AGAIN)
def test_what_the_kernel_does_without(session: Session, opcode: int) -> None:
    assert refused(session, opcode, bytes(64), IMAGE) == errno.ENOSYS


@pytest.mark.parametrize("opcode", [Opcode.INIT, Opcode.OPEN, Opcode.READDIR])
def test_cut_off_request(session: Session, opcode: Opcode) -> None:
    """It cannot come from the kernel, and must not end the device."""
    assert refused(session, opcode, b"\0\0\0", IMAGE) == errno.EINVAL

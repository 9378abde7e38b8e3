"""Table lines, names, construction and removal (DMU-25 to DMU-38, DMU-141, DMU-161, DMU-162)."""

import errno
import threading

import pytest
from dmurig import EIO, OK, Call, Submitted, answer_header, raises, read_request, write_all

from snapd.block.bio import SECTOR_BYTES, BioOp
from snapd.block.clock import ManualClock
from snapd.block.errors import SnapdError
from snapd.dmuser.message import Flag
from snapd.dmuser.node import NodeFile
from snapd.dmuser.nodedirectory import NodeDirectory
from snapd.dmuser.tableline import TableLine

LINE = "0 2048 user 0 2048 disk"


def test_line_as_the_kernel_takes_it() -> None:
    """DMU-25, DMU-26, DMU-161: three arguments behind `user`; what is made is what every kernel takes."""
    line = TableLine.parse("8 2048 user 8 2048 disk-1.new")
    assert (line.start_sector, line.sectors, line.node) == (8, 2048, "disk-1.new")
    assert str(line) == "8 2048 user 8 2048 disk-1.new"
    assert str(TableLine.parse(str(TableLine(0, 7, "x")))) == "0 7 user 0 7 x"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0 2048 user",
        "0 2048 user 0 2048",
        "0 2048 user 0 2048 disk extra",
        "0 2048 linear 0 2048 disk",
        "x 2048 user 0 2048 disk",
        "0 0 user 0 0 disk",
        "0 -1 user 0 -1 disk",
    ],
)
def test_a_line_of_another_form(line: str) -> None:
    """DMU-25, DMU-37: EINVAL that names what is wrong."""
    with raises(errno.EINVAL):
        TableLine.parse(line)


@pytest.mark.parametrize("arguments", ["0 2047", "1 2048", "a b", "0 b", "0x0 2048"])
def test_first_two_arguments(arguments: str) -> None:
    """DMU-37, DMU-26: they repeat start and length of the row, unless `lenient=1`: then nobody reads them."""
    with raises(errno.EINVAL):
        TableLine.parse(f"0 2048 user {arguments} disk")
    assert TableLine.parse(f"0 2048 user {arguments} disk lenient=1").node == "disk"


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", "a" * 65, "ä", "a\tb", "disk\n", "/"])
def test_names_that_are_none(name: str) -> None:
    """DMU-36: letters, digits, `.`, `_` and `-`, at most 64, and not what leads out of a directory (DMU-161)."""
    with raises(errno.EINVAL):
        TableLine(0, 1, name)


def test_names() -> None:
    """DMU-36: all 64 characters of them."""
    assert TableLine.parse("0 1 user 0 1 " + "aZ09._-" * 9 + "x").node.endswith("x")


def test_options() -> None:
    """DMU-145, DMU-23, DMU-66: operations, profile, hints to drop and what UNSUPPORTED means are the constructor's."""
    line = TableLine.parse(LINE + " ops=read,zone_reset profile=v1 drop=hipri,rahead compat_unsupported=io")
    assert line.admission.offered == {BioOp.READ, BioOp.ZONE_RESET}
    assert line.unsupported_errno == EIO
    bio = Submitted(flags=int(Flag.HIPRI | Flag.SYNC)).bio
    line.admission.admit(bio)
    assert bio.flags == Flag.SYNC
    assert TableLine.parse(LINE).unsupported_errno == errno.EOPNOTSUPP


@pytest.mark.parametrize(
    "option",
    [
        "ops=",
        "ops=read,",
        "ops=scan",
        "ops=write_same",
        "ops=zone_append profile=v1",
        "ops=zone_open",
        "profile=v2",
        "drop=fua",
        "drop=preflush",
        "compat_unsupported=yes",
        "lenient=0",
        "lenient=1 lenient=1",
        "speed=1",
        "OPS=read",
    ],
)
def test_options_that_are_none(option: str) -> None:
    """DMU-145, DMU-17, DMU-23: EINVAL."""
    with raises(errno.EINVAL):
        TableLine.parse(f"{LINE} {option}")


def test_construction() -> None:
    """DMU-30, DMU-31, DMU-86: whole when its name appears, nobody attached yet, options in force."""
    nodes = NodeDirectory(ManualClock())
    node = nodes.create(LINE + " ops=read,flush")
    bio = Submitted()
    node.submit(bio.bio)
    with raises(errno.EOPNOTSUPP):
        node.submit(Submitted(BioOp.WRITE).bio)
    file = nodes.open("disk")
    write_all(file, answer_header(read_request(file)[0].seq) + bytes(SECTOR_BYTES))
    assert bio.result == OK


def test_name_in_use() -> None:
    """DMU-28, DMU-36, DMU-162: EEXIST, said as it is; that target is untouched, and its removal frees the name."""
    nodes = NodeDirectory(ManualClock())
    nodes.create(LINE)
    with raises(errno.EEXIST):
        nodes.create(LINE)
    nodes.open("disk").close()
    nodes.remove("disk")
    nodes.create(LINE)


@pytest.mark.parametrize(
    "line", ["0 1 user 0 2 disk", "0 1 user 0 1 disk ops=write_same", "0 1 user 0 1 disk drop=fua"]
)
def test_failed_construction_leaves_nothing(line: str) -> None:
    """DMU-38: no node, no thread."""
    nodes = NodeDirectory(ManualClock())
    threads = threading.active_count()
    with raises(errno.EINVAL):
        nodes.create(line)
    with raises(errno.ENOENT):
        nodes.open("disk")
    assert threading.active_count() == threads


def test_removal() -> None:
    """DMU-33, DMU-34, DMU-141: the name goes, sleeping readers end with ENOTBLK, open channels stay till they close."""
    clock = ManualClock()
    nodes = NodeDirectory(clock)
    node = nodes.create(LINE)
    read = Submitted()
    node.submit(read.bio)
    busy = nodes.open("disk")
    assert read_request(busy)[0].seq == 0
    sleeper = Call(nodes.open("disk").read, 40)
    nodes.remove("disk")
    assert sleeper.errno() == errno.ENOTBLK
    for gone in (nodes.open, nodes.remove):
        with raises(errno.ENOENT):
            gone("disk")
    write_all(busy, answer_header(0) + bytes(SECTOR_BYTES))
    assert read.result == OK


def test_open_against_removal_in_threads() -> None:
    """DMU-141: an open finds a whole node or says that there is none; nobody ever reads from a target that is gone."""
    for _ in range(50):
        nodes = NodeDirectory(ManualClock())
        node = nodes.create(LINE)
        node.submit(Submitted().bio)
        start = threading.Barrier(2)

        def open_one(nodes: NodeDirectory = nodes, start: threading.Barrier = start) -> NodeFile:
            start.wait()
            return nodes.open("disk")

        def remove(nodes: NodeDirectory = nodes, start: threading.Barrier = start) -> None:
            start.wait()
            nodes.remove("disk")

        opener, remover = Call(open_one), Call(remove)
        remover.result()
        try:
            file = opener.result()
        except AssertionError:
            assert opener.errno() in (errno.ENOENT, errno.ENXIO)
            continue
        with pytest.raises(SnapdError) as error:
            file.read(40)
        assert error.value.errno == errno.ENOTBLK

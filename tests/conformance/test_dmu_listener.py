"""The socket form of the control node: who may connect, groups, bounds (DMU-147, DMU-151, DMU-154, DMU-188)."""

import errno
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dmuforms import parse
from dmurig import EIO, OK, Rig, answer_header, raises

from snapd.block.bio import SECTOR_BYTES
from snapd.dmuser import listener as listener_module
from snapd.dmuser.channel import SocketChannel
from snapd.dmuser.groupaddress import group_of, new_address
from snapd.dmuser.listener import MAX_CHANNELS, ChannelListener


class Service:
    """A target behind a socket in a directory of its own, and the daemons that connect."""

    def __init__(self, directory: str) -> None:
        self.rig = Rig()
        self.path = f"{directory}/disk"
        socket_of_node = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        socket_of_node.bind(self.path)
        os.chmod(self.path, 0o600)
        socket_of_node.listen(MAX_CHANNELS)
        self.listener = ChannelListener(self.rig.target, socket_of_node)
        self.channels: list[SocketChannel] = []
        self.daemons: list[socket.socket] = []

    def connect(self, group: str = "", address: bytes = b"") -> socket.socket:
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.daemons.append(daemon)
        if group or address:
            daemon.bind(address or new_address(group))
        daemon.connect(self.path)
        return daemon

    def accept(self) -> SocketChannel:
        channel = self.listener.accept()
        assert channel is not None
        self.channels.append(channel)
        return channel

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for daemon in self.daemons:
            daemon.close()
        self.listener.close()


@pytest.fixture
def service() -> Iterator[Service]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        service = Service(directory)
        yield service
        service.close()


def test_each_connection_is_a_channel(service: Service) -> None:
    """DMU-154, DMU-151, DMU-45: several daemons share the queue; connecting is open, hanging up is close."""
    assert service.listener.accept() is None
    first, second = service.connect(), service.connect()
    one, two = service.accept(), service.accept()
    assert service.rig.target.channels == 2
    bios = [service.rig.submit(), service.rig.submit()]
    one.send()
    two.send()
    requests = parse(first.recv(4096))
    assert [request.seq for request, _ in requests] == [0, 1]
    first.sendall(answer_header(0) + bytes(SECTOR_BYTES))
    assert one.receive()
    first.close()
    assert not one.receive()
    one.close()
    assert [bio.result for bio in bios] == [OK, EIO]
    assert service.rig.target.state == "attached"
    second.close()


@pytest.mark.parametrize("user", [0, None, 12345])
def test_peers(service: Service, user: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DMU-188: our own user and root; anybody else is closed before a byte, and the target stays unattached."""
    real = os.geteuid()
    connected = service.connect()
    if user is not None:
        # The system tells who the peer is; only its word is replaced, and ours about who we are.
        monkeypatch.setattr(listener_module, "_CREDENTIALS", _Credentials(user))
        monkeypatch.setattr(os, "geteuid", lambda: real or 4321)
    if user == 12345:
        with raises(errno.EPERM):
            service.listener.accept()
        assert connected.recv(1) == b""
        assert service.rig.target.state == "never"
    else:
        service.accept()
        assert service.rig.target.state == "attached"


class _Credentials:
    size = struct.calcsize("=iII")

    def __init__(self, user: int) -> None:
        self._user = user

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        pid, _, group = struct.unpack("=iII", raw)
        return pid, self._user, group


def test_mode_of_the_socket(service: Service) -> None:
    """DMU-188, DMU-161: nobody else can even connect; and the listener does not loosen it."""
    assert Path(service.path).stat().st_mode & 0o777 == 0o600


def test_number_of_channels_is_bounded(service: Service) -> None:
    """DMU-154: the one too many is closed at once, and when one has gone the next is taken."""
    for _ in range(MAX_CHANNELS):
        service.connect()
        service.accept()
    extra = service.connect()
    with raises(errno.EMFILE):
        service.listener.accept()
    assert extra.recv(1) == b""
    service.channels.pop().close()
    service.connect()
    service.accept()


def test_destroyed_target(service: Service) -> None:
    """DMU-34, DMU-141, DMU-155: no new channel; who is connected sees a clean end and may still answer."""
    early = service.connect()
    channel = service.accept()
    bio = service.rig.submit()
    channel.send()
    late = service.connect()
    service.rig.target.destroy()
    channel.send()
    with raises(errno.ENXIO):
        service.listener.accept()
    assert late.recv(1) == b""
    assert len(early.recv(4096)) == 40
    assert early.recv(1) == b""
    early.sendall(answer_header(0) + bytes(SECTOR_BYTES))
    assert channel.receive()
    assert bio.result == OK


def test_unlinking_removes_the_node(service: Service) -> None:
    """DMU-151, DMU-34: without its name nobody can open it, and who has it open goes on."""
    service.connect()
    service.accept()
    os.unlink(service.path)
    with pytest.raises(FileNotFoundError):
        service.connect()
    assert service.rig.target.state == "attached"


def test_copies_of_a_descriptor_are_one_channel(service: Service) -> None:
    """DMU-132: it is closed with the last copy."""
    daemon = service.connect()
    channel = service.accept()
    copy = daemon.dup()
    daemon.close()
    bio = service.rig.submit()
    channel.send()
    assert len(copy.recv(4096)) == 40
    copy.sendall(answer_header(0) + bytes(SECTOR_BYTES))
    assert channel.receive()
    assert bio.result == OK
    copy.close()
    assert not channel.receive()


def test_connections_that_offer_a_group(service: Service) -> None:
    """DMU-147: by the address the daemon binds before it connects; a member answers what another has read."""
    reader, helper, stranger = service.connect("disk"), service.connect("disk"), service.connect()
    channels = [service.accept() for _ in range(3)]
    bio = service.rig.submit()
    channels[0].send()
    assert len(reader.recv(4096)) == 40
    helper.sendall(answer_header(0) + b"h" * SECTOR_BYTES)
    assert channels[1].receive()
    assert (bio.result, bytes(bio.memory)) == (OK, b"h" * SECTOR_BYTES)
    service.rig.submit()
    channels[0].send()
    reader.recv(4096)
    stranger.sendall(answer_header(1))
    with raises(errno.EINVAL):
        channels[2].receive()


@pytest.mark.parametrize(
    "address",
    [
        b"\0dm-user-group/",
        b"\0dm-user-group/disk",
        b"\0dm-user-group/a b/1",
        b"\0dm-user-group/" + b"x" * 33 + b"/1",
        b"\0dm-user-group/disk/1/2",
        b"\0somebody else",
        b"/run/dm-user-group/disk/1",
        "",
        "/run/disk",
    ],
)
def test_other_addresses_are_no_offer(address: bytes | str) -> None:
    """DMU-147: whoever is bound to anything else is a channel of its own."""
    assert group_of(address) == ""


def test_group_addresses() -> None:
    """DMU-147: each member has an address of its own, and all say the same group."""
    addresses = {new_address("disk-1.a") for _ in range(8)}
    assert len(addresses) == 8
    assert {group_of(address) for address in addresses} == {"disk-1.a"}


def test_a_stranger_bound_to_some_address(service: Service) -> None:
    """DMU-147: an address that is no offer harms nothing."""
    service.connect(address=f"\0harmless-{os.getpid()}".encode())
    service.accept()
    assert service.rig.target.channels == 1

"""Addresses for NBD over TCP: loopback only, since nothing on this wire says who asks, or hides what is read."""

import errno
import ipaddress
import re
import socket

from snapd.block.errors import SnapdError

_BACKLOG = 64
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:]+)\]|([^:\[\]]+)):([0-9]{1,5})")


def parse_tcp_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[HOST]:PORT`, a literal address or `localhost`; EINVAL, or EPERM for one that is not loopback."""
    match = _ADDRESS.fullmatch(text)
    host = (match[1] or match[2]) if match else ""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise SnapdError(
            errno.EINVAL, f"TCP address {text!r} is not HOST:PORT with a loopback address, such as 127.0.0.1:10809"
        ) from None
    assert match is not None
    port = int(match[3])
    if port > 65535:
        raise SnapdError(errno.EINVAL, f"TCP address {text!r}: there is no port {port}")
    if not address.is_loopback:
        raise SnapdError(
            errno.EPERM,
            f"TCP address {text!r} is not a loopback address: without TLS anybody on the network could read the device",
            reason="TCP_WITHOUT_TLS",
        )
    return str(address), port


def listen_tcp(text: str) -> socket.socket:
    """A listening socket; port 0 takes a free one. Errors as `parse_tcp_address`, EBUSY, or the system's."""
    host, port = parse_tcp_address(text)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # The former owner's connections may linger; its listening socket may not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SnapdError(errno.EBUSY, f"listen at {text}: somebody else does") from error
        raise SnapdError.from_os(error, f"listen at {text}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """`HOST:PORT` where it listens, in the form `parse_tcp_address` reads."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

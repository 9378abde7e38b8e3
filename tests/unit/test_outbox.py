"""What waits to be sent: every owner hears of its piece, whatever becomes of the peer."""

import socket

import pytest

from snapd.dmuser.outbox import Outbox


class Peer(socket.socket):
    """Takes so many calls whole, then is gone."""

    calls = 1

    def sendmsg(self, buffers, *_: object) -> int:  # type: ignore[no-untyped-def]
        if not self.calls:
            raise BrokenPipeError
        self.calls -= 1
        return sum(len(piece) for piece in buffers)

    def send(self, data, *_: object) -> int:  # type: ignore[no-untyped-def]
        return self.sendmsg([data])


def test_a_peer_that_goes_in_the_middle() -> None:
    """The pieces that it took before are reported, then the error is; the others are still there to be cleared."""
    outbox: Outbox[int] = Outbox()
    for number in range(300):
        outbox.put(b"some", number)
    with Peer() as peer:
        sent_bytes, first = outbox.send(peer)
        assert sent_bytes == 4 * len(first)
        with pytest.raises(BrokenPipeError):
            outbox.send(peer)
    rest = outbox.clear()
    assert [*first, *rest] == list(range(300))
    assert first
    assert rest

"""What waits to be sent on a non-blocking stream socket: pieces of memory in order, gathered into few calls.

Each piece may have an owner, which is reported once its last byte has left; nothing is copied, so the memory of a
piece must stay as it is until then.
"""

import socket
from collections import deque
from typing import Generic, TypeVar

from snapd.block.store import Buffer

_PIECES_PER_CALL = 256
"""Below the system's IOV_MAX (1024); more in one call gains nothing measurable."""

Owner = TypeVar("Owner")


class Outbox(Generic[Owner]):
    """A queue of pieces; true while it holds any."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[Buffer, Owner | None]] = deque()
        self._sent_of_first = 0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def put(self, piece: Buffer, owner: Owner | None) -> None:
        """Add a non-empty piece behind the others."""
        self._pieces.append((piece, owner))

    def clear(self) -> list[Owner]:
        """Drop everything; returns the owners of the pieces that had not left."""
        owners = [owner for _, owner in self._pieces if owner is not None]
        self._pieces.clear()
        self._sent_of_first = 0
        return owners

    def copy_out(self) -> list[Owner]:
        """Go on with copies of what has not left, so that its memory is free; returns the owners, who stay owners."""
        self._pieces = deque((bytes(piece), owner) for piece, owner in self._pieces)
        return [owner for _, owner in self._pieces if owner is not None]

    def send(self, connection: socket.socket) -> tuple[int, list[Owner]]:
        """Send as much as the socket takes; returns the bytes taken and the owners of the pieces that have left.

        OSError as from `sendmsg` when the peer is gone.
        """
        total = 0
        left: list[Owner] = []
        pieces = self._pieces
        while pieces:
            first = pieces[0][0]
            if self._sent_of_first:
                first = memoryview(first)[self._sent_of_first :]
            try:
                if len(pieces) == 1:
                    sent = connection.send(first)
                else:
                    count = min(len(pieces), _PIECES_PER_CALL)
                    sent = connection.sendmsg([first, *(pieces[i][0] for i in range(1, count))])
            except BlockingIOError:
                break
            except OSError:
                if left:
                    # Those have left: they must hear of it. The next call meets the same error.
                    break
                raise
            total += sent
            sent += self._sent_of_first
            while pieces and sent >= len(pieces[0][0]):
                piece, owner = pieces.popleft()
                sent -= len(piece)
                if owner is not None:
                    left.append(owner)
            self._sent_of_first = sent
        return total, left

"""The control nodes of one process by name: what constructs, finds and removes targets.

Invariant: a name leads to a whole target or to nothing (DMU-31, DMU-141), and a construction that fails leaves nothing
behind (DMU-38).
"""

import errno
import threading

from snapd.block.clock import Clock
from snapd.block.errors import SnapdError
from snapd.dmuser.node import Node, NodeFile
from snapd.dmuser.tableline import TableLine
from snapd.dmuser.target import Target


class NodeDirectory:
    """Named nodes, for any number of threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        self._lock = threading.Lock()

    def create(self, line: str) -> Node:
        """The constructor: a target as the table line says; EINVAL (`TableLine.parse`), EEXIST for a name in use."""
        row = TableLine.parse(line)
        target = Target(self._clock, admission=row.admission, unsupported_errno=row.unsupported_errno, deferred=True)
        with self._lock:
            if row.node in self._nodes:
                raise SnapdError(errno.EEXIST, f"control node {row.node} is in use (DMU-36)")
            node = self._nodes[row.node] = Node(target)
        return node

    def open(self, name: str, *, nonblocking: bool = False) -> NodeFile:
        """A channel to the target behind the name; ENOENT when there is none."""
        with self._lock:
            node = self._nodes.get(name)
        if node is None:
            raise SnapdError(errno.ENOENT, f"there is no control node {name}")
        return node.open(nonblocking=nonblocking)

    def remove(self, name: str) -> None:
        """The destructor: the name goes first, then the target is destroyed (DMU-33); ENOENT when there is none."""
        with self._lock:
            node = self._nodes.pop(name, None)
        if node is None:
            raise SnapdError(errno.ENOENT, f"there is no control node {name}")
        node.destroy()

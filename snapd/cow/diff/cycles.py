"""Which ops must be given up so that the others have an order (COW-79, COW-157).

Ops that read blocks which other ops overwrite form a graph: an edge leads from the op that reads to the op that must
come after it. An order exists unless the graph has cycles. Invariant: what is given up opens every cycle, and none of
it could be kept beside the rest. Where every op reads one block the cycles are plain, and each costs one op: the
cheapest. With ops that read two blocks the fewest cannot be found in useful time, so they are given up greedily (XOR
ops first, among them those that hold up most others, among these the cheapest), and then, last first, those are taken
back that close no cycle with what is left.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from snapd.cow.diff.blockrows import NONE, Flags, Ints

Weigh = Callable[[Ints], Ints]
"""Bytes that giving up each of these ops costs."""

# Of a longer cycle only the lowest ops are weighed: the rest could save less than weighing them takes.
_WEIGHED = 1024
_BATCH = 4096
# Steps of the search for ops to take back, in all and for every op of the graph; it is quadratic at worst.
_STEPS, _STEPS_AN_OP = 1 << 20, 64


def give_up(first: Ints, second: Ints, is_xor: Flags, weigh: Weigh) -> Ints:
    """The ops to give up, ascending: op i must come before ops `first[i]` and `second[i]`, each of them or NONE.

    No op comes before itself. Where there is one, it is `first`.
    """
    readers = np.bincount(first[first >= 0], minlength=len(first))
    readers += np.bincount(second[second >= 0], minlength=len(first))
    is_plain = (first >= 0) & (second < 0) & (readers == 1)
    on_cycle = np.zeros(len(first), dtype=np.bool_)
    given_up = list(_cheapest(_plain_cycles(first, is_plain, on_cycle), is_xor, weigh))
    if not on_cycle.all():
        given_up += _Tangle(first, second, ~on_cycle).give_up(is_xor, weigh)
    return np.sort(np.array(given_up, dtype=np.int64))


def _plain_cycles(first: Ints, is_plain: Flags, on_cycle: Flags) -> Iterator[Ints]:
    """Every cycle whose ops have one reader and read one block; its members are marked in `on_cycle`."""
    reads, plain, left = first.data, is_plain.data, bytearray(is_plain.tobytes())
    start = -1
    while (start := left.find(1, start + 1)) >= 0:
        path, op = array("q"), start
        while plain[op] and left[op]:
            left[op] = 0
            path.append(op)
            op = reads[op]
        if op == start:
            members = np.sort(np.frombuffer(path, dtype=np.int64))
            on_cycle[members] = True
            yield members


def _cheapest(cycles: Iterator[Ints], is_xor: Flags, weigh: Weigh) -> Iterator[int]:
    """One op of each cycle: an XOR op if it has one, the cheapest of them, of equal ones the lowest."""
    batch: list[Ints] = []
    held = 0
    for members in cycles:
        xors = members[is_xor[members]]
        batch.append((xors if len(xors) else members)[:_WEIGHED])
        held += len(batch[-1])
        if held >= _BATCH:
            yield from _cheapest_of(batch, weigh)
            batch, held = [], 0
    if batch:
        yield from _cheapest_of(batch, weigh)


def _cheapest_of(batch: Sequence[Ints], weigh: Weigh) -> Iterator[int]:
    costs = weigh(np.concatenate(batch))
    at = 0
    for members in batch:
        yield int(members[costs[at : at + len(members)].argmin()])
        at += len(members)


class _Tangle:
    """The part of the graph in which cycles may share ops."""

    def __init__(self, first: Ints, second: Ints, inside: Flags) -> None:
        self._first, self._second = first.data, second.data
        self._left = bytearray(inside.tobytes())
        # Readers of each op, one behind the other: those of op i are by_read[start[i]:start[i + 1]].
        reads = np.concatenate([first, second])
        by_read = np.argsort(reads, kind="stable")
        self._start = np.searchsorted(reads[by_read], np.arange(len(first) + 1)).data
        self._readers = (by_read % len(first)).data
        reads_left = ((first >= 0) & inside[first]).astype(np.int8) + ((second >= 0) & inside[second])
        readers_left = np.bincount(reads[(reads >= 0) & np.tile(inside, 2)], minlength=len(first))
        self._reads_left, self._readers_left = reads_left.data, readers_left.data

    def give_up(self, is_xor: Flags, weigh: Weigh) -> list[int]:
        """What must go; see the module."""
        reads_left = self._reads_left
        self._remove([op for op in range(len(reads_left)) if not reads_left[op] or not self._readers_left[op]])
        ops = np.flatnonzero(np.frombuffer(self._left, dtype=np.bool_))
        if not len(ops):
            return []
        ops = ops[np.argsort(weigh(ops), kind="stable")]
        given_up: list[int] = []
        # The number of ops held up only ever falls, so each pass finds all there is for it.
        for candidates, least in ((ops[is_xor[ops]], 2), (ops[is_xor[ops]], 1), (ops[~is_xor[ops]], 1)):
            for op in candidates.data:
                if self._left[op] and reads_left[op] >= least:
                    given_up.append(op)
                    self._remove([op])
        return self._take_back(given_up)

    def _remove(self, ops: list[int]) -> None:
        """Remove these ops, and then all that can be on no cycle any more: what reads nothing or nobody reads."""
        left, reads_left, readers_left = self._left, self._reads_left, self._readers_left
        while ops:
            op = ops.pop()
            if not left[op]:
                continue
            left[op] = 0
            for read in (self._first[op], self._second[op]):
                if read >= 0 and left[read]:
                    readers_left[read] -= 1
                    if not readers_left[read]:
                        ops.append(read)
            for reader in self._readers[self._start[op] : self._start[op + 1]]:
                if left[reader]:
                    reads_left[reader] -= 1
                    if not reads_left[reader]:
                        ops.append(reader)

    def _take_back(self, given_up: list[int]) -> list[int]:
        """What of this stays given up, when everything that closes no cycle is taken back."""
        gone, seen_for = bytearray(len(self._first)), array("q", [NONE]) * len(self._first)
        for op in given_up:
            gone[op] = 1
        steps = _STEPS + _STEPS_AN_OP * len(self._first)
        for op in reversed(given_up):
            stack, closes = [op], False
            while stack and not closes and steps > 0:
                reader = stack.pop()
                for read in (self._first[reader], self._second[reader]):
                    steps -= 1
                    closes = closes or read == op
                    if read >= 0 and not gone[read] and seen_for[read] != op:
                        seen_for[read] = op
                        stack.append(read)
            if not closes and steps > 0:
                gone[op] = 0
        return [op for op in given_up if gone[op]]

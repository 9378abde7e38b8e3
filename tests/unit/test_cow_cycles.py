"""What is given up so that the rest has an order: enough, nothing in vain, and the cheapest of plain cycles."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.cow.diff.blockrows import NONE, Ints
from snapd.cow.diff.cycles import give_up

Graph = list[tuple[int, ...]]


@st.composite
def graphs(draw: st.DrawFn, most_reads: int = 2) -> Graph:
    """For each op the other ops that it must come before: none, one or two."""
    size = draw(st.integers(1, 14))
    others = [[other for other in range(size) if other != op] for op in range(size)]
    return [
        tuple(draw(st.lists(st.sampled_from(others[op]), max_size=most_reads, unique=True))) if others[op] else ()
        for op in range(size)
    ]


def given_up(graph: Graph, xors: list[bool] | None = None, costs: list[int] | None = None) -> set[int]:
    """What `give_up` says of the graph."""
    first = np.array([reads[0] if reads else NONE for reads in graph], dtype=np.int64)
    second = np.array([reads[1] if len(reads) > 1 else NONE for reads in graph], dtype=np.int64)
    price = np.array(costs or [1] * len(graph), dtype=np.int64)
    chosen = give_up(first, second, np.array(xors or [False] * len(graph)), lambda ops: price[ops])
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    return set(chosen.tolist())


def on_cycles(graph: Graph, without: set[int]) -> bool:
    """Whether a cycle is left of the graph."""
    left = set(range(len(graph))) - without
    while True:
        free = {op for op in left if not any(op in graph[other] for other in left)}
        if not free:
            return bool(left)
        left -= free


@given(graphs(), st.data())
@settings(max_examples=400, deadline=None)
def test_all_cycles_are_opened_and_nothing_is_given_up_in_vain(graph: Graph, data: st.DataObject) -> None:
    """COW-79: without them there is no cycle; with any one of them back there is."""
    xors = data.draw(st.lists(st.booleans(), min_size=len(graph), max_size=len(graph)))
    costs = data.draw(st.lists(st.integers(1, 5), min_size=len(graph), max_size=len(graph)))
    chosen = given_up(graph, xors, costs)
    assert not on_cycles(graph, chosen)
    for op in chosen:
        assert on_cycles(graph, chosen - {op})


@given(graphs(most_reads=1), st.data())
@settings(max_examples=300, deadline=None)
def test_a_plain_cycle_costs_its_cheapest_op(graph: Graph, data: st.DataObject) -> None:
    """COW-157: one op a cycle, the one that costs least, of equal ones the lowest."""
    costs = data.draw(st.lists(st.integers(1, 3), min_size=len(graph), max_size=len(graph)))
    assert given_up(graph, costs=costs) == {min(cycle, key=lambda op: (costs[op], op)) for cycle in cycles(graph)}


def cycles(graph: Graph) -> set[frozenset[int]]:
    """The cycles of a graph whose ops read one other at most."""
    found = set[frozenset[int]]()
    for start in range(len(graph)):
        path, op = list[int](), start
        while op not in path and graph[op]:
            path.append(op)
            op = graph[op][0]
        if op in path:
            found.add(frozenset(path[path.index(op) :]))
    return found


def test_an_xor_op_goes_before_a_copy() -> None:
    """COW-79: in a cycle of both the XOR op is given up, whatever it costs."""
    assert given_up([(1,), (2,), (0,)], xors=[False, True, False], costs=[1, 9, 1]) == {1}


def test_the_op_that_holds_up_most_goes_first() -> None:
    """COW-79: one XOR op on two cycles rather than one op on each."""
    assert given_up([(1, 2), (0,), (0,)], xors=[True] * 3, costs=[9, 1, 1]) == {0}


def test_a_copy_that_was_given_up_first_comes_back_first() -> None:
    """Two copies that swap, and XOR ops on a cycle with each: the copies stay when the XOR ops must go anyhow."""
    graph: Graph = [(1, 2), (0,), (3, 0), (2,)]
    chosen = given_up(graph, xors=[True, False, True, False])
    assert chosen == {0, 2}


@pytest.mark.parametrize("size", [3000, 100_000])
def test_one_long_cycle_is_one_op(size: int) -> None:
    """However long: one op, and only the first thousand or so are weighed for it."""
    weighed: list[int] = []

    def weigh(ops: Ints) -> Ints:
        weighed.extend(ops.tolist())
        costs: Ints = (ops != 700).astype(np.int64)
        return costs

    first = (np.arange(size) + 1) % size
    none, copies = np.full(size, NONE), np.zeros(size, dtype=np.bool_)
    assert give_up(first, none, copies, weigh).tolist() == [700]
    assert len(weighed) < 2000


def test_files_that_change_places_by_odd_bytes_cost_one_of_them() -> None:
    """Two files of n blocks, each made of two blocks of the other: n ops are enough, and no more are given up."""
    n = 2000
    graph: Graph = [
        *((n + i, n + i + 1) if i + 1 < n else (n + i,) for i in range(n)),
        *((i, i + 1) if i + 1 < n else (i,) for i in range(n)),
    ]
    random = Random(3)
    assert len(given_up(graph, xors=[True] * 2 * n, costs=[random.randrange(10, 99) for _ in graph])) <= n

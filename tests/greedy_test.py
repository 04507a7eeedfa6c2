import pytest
import testing

from graphswap.cost_model import Link
from graphswap.plan import Recompute, Swap
from graphswap.strategies.greedy import Greedy

MIB = 1 << 20
CHAIN = testing.chain(8)  # 11 MiB at b8


def decisions(budget_mib, link, seconds=1.0):
    return Greedy().plan(CHAIN, testing.seconds_per_node(seconds, link), budget_mib * MIB).decisions


def test_copies_that_hide_behind_compute_are_free():
    (swap,) = decisions(10, Link(MIB, MIB, 0.0, overlaps=True))
    assert isinstance(swap, Swap)


def test_a_slow_link_makes_recompute_the_cheaper_way():
    (recompute,) = decisions(10, Link(MIB, MIB))
    assert isinstance(recompute, Recompute)
    assert len(recompute.nodes) == 1


def test_slow_nodes_make_swaps_the_cheaper_way():
    (swap,) = decisions(10, Link(MIB, MIB), seconds=3.0)
    assert isinstance(swap, Swap)


def test_both_are_mixed():
    kinds = {type(decision) for decision in decisions(7, Link(MIB, MIB))}
    assert kinds == {Swap, Recompute}


@pytest.mark.parametrize("budget_mib", [10, 9, 8, 7, 6])
def test_no_more_is_swapped_than_overflows(budget_mib):
    assert len(decisions(budget_mib, Link(MIB, MIB, 0.0, overlaps=True))) == 11 - budget_mib

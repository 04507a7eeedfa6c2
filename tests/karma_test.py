import pytest
import testing

from graphswap.cost_model import Link
from graphswap.plan import Recompute, Swap
from graphswap.strategies.karma import Karma

MIB = 1 << 20


def decisions(layers, budget_mib, link):
    return Karma().plan(testing.chain(layers), testing.seconds_per_node(1.0, link), budget_mib * MIB).decisions


def test_what_is_needed_last_is_swapped_first():
    found = decisions(8, 9, Link(MIB, MIB, 0.0, overlaps=True))  # of 11 MiB
    assert {decision.value for decision in found if isinstance(decision, Swap)} == {"f1", "f2"}


@pytest.mark.parametrize(("link", "kinds"), [(Link(MIB, MIB), {Swap, Recompute}), (Link(4 * MIB, 4 * MIB), {Swap})])
def test_what_would_stall_longer_than_recomputing_takes_is_recomputed(link, kinds):
    found = decisions(40, 35, link)  # of 43 MiB
    # Borders of segments are not recomputed.
    assert {type(decision) for decision in found} == kinds

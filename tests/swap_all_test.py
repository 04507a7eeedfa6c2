import testing

from graphswap.cost_model import Link
from graphswap.strategies.swap_all import SwapAll

MIB = 1 << 20


def test_everything_that_waits_is_swapped_whether_or_not_it_has_to_be():
    plan = SwapAll().plan(testing.chain(8), testing.seconds_per_node(1.0, Link()), 100 * MIB)
    assert plan.decisions == plan.swaps
    assert {swap.value for swap in plan.swaps} == {"f1", "f2", "f3", "f4", "f5", "f6"}

import testing

from graphswap.cost_model import Link
from graphswap.plan import Recompute
from graphswap.simulator import simulate
from graphswap.strategies import budgets
from graphswap.strategies.chen import Chen

MIB = 1 << 20
FAST = Link(1e12, 1e12, 0.0, overlaps=True)


def test_everything_between_the_borders_of_segments_is_recomputed():
    plan = Chen().plan(testing.chain(8), testing.seconds_per_node(1.0, FAST), 9 * MIB)
    # f3 stands at the border of two segments. The backward pass begins with what the last one has made.
    assert plan.decisions == (Recompute(("f1", "f2"), before="b2"),)


def test_memory_grows_with_the_square_root_of_the_depth():
    model = testing.seconds_per_node(1.0, FAST)
    peaks = {}
    for layers in (16, 64):
        graph = testing.chain(layers)
        plan = budgets.smallest(Chen(), graph, model)
        planned = simulate(graph, plan, model)
        peaks[layers] = planned.peak_bytes
        assert planned.recomputed_seconds <= layers
    assert peaks[64] < 2.5 * peaks[16]

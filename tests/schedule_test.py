import pytest
import tiny_graphs

from graphswap import ir, parser
from graphswap.plan import Plan
from graphswap.rewrites.schedule import schedule

DIAMOND = parser.parse(tiny_graphs.DIAMOND)


def test_nodes_stand_in_the_planned_order():
    order = ("w", "x", "top", "right", "left", "join")
    scheduled = schedule(DIAMOND, Plan(order=order))
    assert tuple(node.name for node in scheduled.nodes) == order
    assert scheduled.by_name == DIAMOND.by_name
    assert scheduled.replace(nodes=DIAMOND.nodes) == DIAMOND


def test_no_order_keeps_the_graph():
    assert schedule(DIAMOND, Plan()) is DIAMOND


def test_an_order_that_breaks_the_graph_is_found_by_verify():
    with pytest.raises(ir.GraphError, match="node 'top' reads '%x', which does not stand before it"):
        ir.verify(schedule(DIAMOND, Plan(order=("top", "x", "w", "left", "right", "join"))))

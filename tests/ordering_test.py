import itertools

import testing
import tiny_graphs
from hypothesis import given

from graphswap import ir, parser
from graphswap.plan import Plan, SideBySide
from graphswap.rewrites.ordering import floats, ordering


def ordered(text):
    return ir.verify(ordering(parser.parse(text), Plan()))


def test_a_chain_through_all_nodes():
    testing.assert_graph_text(
        ordered(tiny_graphs.DIAMOND),
        """
        graph diamond(%x, %w) -> (%join) {
          # Arguments are there from the start.
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,16])
          %top = MatMul(%x, %x) : (float32[8,8])
          # A node waits for the two before it, whether or not it reads them.
          %left = MatMul(%top, %x) after(%top) : (float32[8,8])
          %right = MatMul(%top, %w) after(%top, %left) : (float32[8,16])
          %join = MatMul(%left, %right) after(%left, %right) : (float32[8,16])
        }
        """,
    )


def test_two_nodes_side_by_side_wait_for_the_same():
    plan = Plan(decisions=(SideBySide("left", "right"),))
    graph = ir.verify(ordering(parser.parse(tiny_graphs.DIAMOND), plan))
    testing.assert_graph_text(
        graph,
        """
        graph diamond(%x, %w) -> (%join) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,16])
          %top = MatMul(%x, %x) : (float32[8,8])
          %left = MatMul(%top, %x) after(%top) : (float32[8,8])
          %right = MatMul(%top, %w) {"beside": "left"} after(%top) : (float32[8,16])
          %join = MatMul(%left, %right) after(%top, %left, %right) : (float32[8,16])
        }
        """,
    )


def test_what_stands_between_two_nodes_parts_them():
    graph = parser.parse("""
    graph g(%x) -> () {
      %x = Placeholder() : (int8[])
      %a = Op(%x) : (int8[])
      %a/recompute = Op(%x) like(%a) : (int8[])
      %b = Op(%x) : (int8[])
    }
    """)
    (*_, last) = ordering(graph, Plan(decisions=(SideBySide("a", "b"),))).nodes
    assert (last.attrs, last.control_inputs) == ((), ("a", "a/recompute"))


def test_copies_run_beside_the_chain():
    graph = ordered("""
    graph g() -> () {
      %a = Op() : (int8[])
      %out = SwapOut(%a) {"nbytes": 1, "tier": "host"} : (variant[])
      %b = Op() after(%out) : (int8[])
      %in = SwapIn(%out) {"nbytes": 1, "tier": "host"} after(%b) : (int8[])
      %c = Op() : ()
      %d = Op(%in) after(%c) : ()
    }
    """)
    controls = {node.name: node.control_inputs for node in graph.nodes}
    assert controls == {"a": (), "out": (), "b": ("out", "a"), "in": ("b",), "c": ("a", "b"), "d": ("c", "b")}


def test_synchronous_copies_are_part_of_the_chain():
    graph = ordered("""
    graph g() -> () {
      %a = Op() : (int8[])
      %out = SwapOut(%a) {"is_synchronous": true, "nbytes": 1, "tier": "host"} : (variant[])
      %b = Op() : (int8[])
      %in = SwapIn(%out) {"is_synchronous": true, "nbytes": 1, "tier": "host"} after(%b) : (int8[])
      %c = Op() : ()
    }
    """)
    controls = {node.name: node.control_inputs for node in graph.nodes}
    assert controls == {"a": (), "out": ("a",), "b": ("a", "out"), "in": ("b", "out"), "c": ("b", "in")}


@given(testing.random_graphs())
def test_the_order_is_the_only_one_left(graph):
    plan = Plan(order=tuple(graph.position))
    chain = [n for n in ordering(graph, plan).nodes if not floats(n) and n.op not in ir.RESIDENT_OPS]
    for before, after in itertools.pairwise(chain):
        assert before.name in after.control_inputs

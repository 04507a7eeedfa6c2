import pytest
import testing
import tiny_graphs

from graphswap import ir, parser
from graphswap.plan import Plan, Recompute
from graphswap.rewrites.recompute import recompute

CHAIN = parser.parse(tiny_graphs.CHAIN)


def repeated(graph, *decisions):
    return ir.verify(recompute(graph, Plan(decisions=decisions)))


def test_nodes_are_repeated_before_their_consumer():
    testing.assert_graph_text(
        repeated(CHAIN, Recompute(("f1", "f2"), before="b2")),
        """
        graph chain(%x, %w) -> (%b1) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) : (float32[8,8])
          %f2 = MatMul(%f1, %w) : (float32[8,8])
          %f3 = MatMul(%f2, %w) : (float32[8,8])
          %b3 = MatMul(%f3, %w) : (float32[8,8])
          # After b3, so that they neither run early nor are merged with the first ones.
          %f1/recompute = MatMul(%x, %w) like(%f1) after(%b3) : (float32[8,8])
          %f2/recompute = MatMul(%f1/recompute, %w) like(%f2) after(%f1/recompute) : (float32[8,8])
          %b2 = MatMul(%b3, %f2/recompute) : (float32[8,8])
          # All later consumers read the repeated values.
          %b1 = MatMul(%b2, %f1/recompute) : (float32[8,8])
        }
        """,
    )


def test_a_node_may_be_repeated_more_than_once():
    graph = repeated(CHAIN, Recompute(("f1",), before="b3"), Recompute(("f1",), before="b1"))
    assert [node.name for node in graph.nodes if node.like == "f1"] == ["f1/recompute", "f1/recompute_1"]
    assert graph.by_name["b1"].inputs == ("b2", "f1/recompute_1")


def test_decisions_for_one_consumer_follow_each_other():
    graph = repeated(CHAIN, Recompute(("f1",), before="b2"), Recompute(("f2",), before="b2"))
    assert graph.by_name["f2/recompute"].inputs == ("f1/recompute", "w")
    assert graph.by_name["f2/recompute"].control_inputs == ("f1/recompute",)


def test_all_outputs_device_and_attributes_are_repeated():
    graph = parser.parse("""
    graph g(%x) -> (%y) {
      %x = Placeholder() : (float32[8])
      %norm = Norm(%x) {"axis": 1} @"/device:GPU:0" after(%x) : (float32[8], float32[])
      %y = Op(%norm:1, %norm) : (float32[8])
    }
    """)
    testing.assert_graph_text(
        repeated(graph, Recompute(("norm",), before="y")),
        """
        graph g(%x) -> (%y) {
          %x = Placeholder() : (float32[8])
          %norm = Norm(%x) {"axis": 1} @"/device:GPU:0" after(%x) : (float32[8], float32[])
          %norm/recompute = Norm(%x) {"axis": 1} like(%norm) @"/device:GPU:0" after(%norm) : (float32[8], float32[])
          %y = Op(%norm/recompute:1, %norm/recompute) : (float32[8])
        }
        """,
    )


def test_the_results_stay():
    assert repeated(CHAIN, Recompute(("f1",), before="b1")).outputs == CHAIN.outputs


def test_names_are_fresh():
    graph = parser.parse("""
    graph g() -> () {
      %a = Op() : (int8[])
      %a/recompute = Op() : (int8[])
      %b = Op(%a) : ()
    }
    """)
    assert repeated(graph, Recompute(("a",), before="b")).by_name["b"].inputs == ("a/recompute_1",)


def test_nothing_to_repeat_keeps_the_graph():
    assert recompute(CHAIN, Plan(order=tuple(CHAIN.position))) is CHAIN


def test_a_stateful_node_is_never_repeated():
    graph = parser.parse(tiny_graphs.MLP_STEP)
    with pytest.raises(ir.GraphError) as error:
        repeated(graph, Recompute(("read1", "hidden"), before="grad_w1"))
    assert str(error.value) == "node 'read1' (ReadVariableOp) is stateful and must not run twice."

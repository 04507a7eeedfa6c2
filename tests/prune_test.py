import testing
import tiny_graphs

from graphswap import ir, parser
from graphswap.plan import Plan, Recompute, Swap
from graphswap.rewrites.prune import prune
from graphswap.rewrites.recompute import recompute
from graphswap.rewrites.swap import swap

CHAIN = parser.parse(tiny_graphs.CHAIN)


def pruned(graph, *decisions):
    plan = Plan(decisions=decisions).check(graph)
    return ir.verify(prune(ir.verify(swap(recompute(graph, plan), plan)), plan))


def names(graph):
    return [node.name for node in graph.nodes]


def test_a_first_run_that_nobody_reads_goes():
    testing.assert_graph_text(
        pruned(CHAIN, Recompute(("f3",), before="b3")),
        """
        graph chain(%x, %w) -> (%b1) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) : (float32[8,8])
          %f2 = MatMul(%f1, %w) : (float32[8,8])
          %f3/recompute = MatMul(%f2, %w) like(%f3) after(%f2) : (float32[8,8])
          %b3 = MatMul(%f3/recompute, %w) : (float32[8,8])
          %b2 = MatMul(%b3, %f2) : (float32[8,8])
          %b1 = MatMul(%b2, %f1) : (float32[8,8])
        }
        """,
    )


def test_what_is_still_read_stays():
    decision = Recompute(("f2",), before="b2")
    assert names(pruned(CHAIN, decision)) == names(recompute(CHAIN, Plan(decisions=(decision,))))


def test_what_only_an_unread_node_read_goes_too():
    graph = pruned(CHAIN, Recompute(("f1", "f2", "f3"), before="b3"))
    assert names(graph) == ["x", "w", "f1/recompute", "f2/recompute", "f3/recompute", "b3", "b2", "b1"]


def test_what_is_swapped_out_is_read():
    decisions = (Recompute(("f3",), before="b3"), Swap("f3", "f3", "b3", "b2", "b1"))
    assert "f3" in names(pruned(CHAIN, *decisions))


def test_the_next_node_waits_for_what_a_node_that_is_gone_waited_for():
    swap_f1 = Swap("f1", out_after="f2", freed_before="f3", in_after="b3", in_before="b1")
    graph = pruned(CHAIN, swap_f1, Recompute(("f3",), before="b3"))
    assert graph.by_name["f3/recompute"].control_inputs == ("f1/swap_out", "f2")


def test_results_and_what_others_wait_for_stay():
    for signature, wait in (("%b1, %f3", ""), ("%b1", "after(%f3) ")):
        text = tiny_graphs.CHAIN.replace("-> (%b1)", f"-> ({signature})").replace(
            "%b1 = MatMul(%b2, %f1) ", f"%b1 = MatMul(%b2, %f1) {wait}"
        )
        assert "f3" in names(pruned(parser.parse(text), Recompute(("f3",), before="b3")))


def test_without_repeated_nodes_the_graph_stays_the_same_object():
    assert prune(CHAIN, Plan()) is CHAIN

import testing
import tiny_graphs

from graphswap import ir, parser
from graphswap.plan import Plan, Recompute, Swap
from graphswap.rewrites.recompute import recompute
from graphswap.rewrites.swap import swap

CHAIN = parser.parse(tiny_graphs.CHAIN)
F1 = Swap("f1", out_after="f2", freed_before="f3", in_after="b3", in_before="b1")


def swapped(graph, *decisions):
    plan = Plan(decisions=decisions).check(graph)
    return ir.verify(swap(ir.verify(recompute(graph, plan)), plan))


def test_a_swap():
    testing.assert_graph_text(
        swapped(CHAIN, F1),
        """
        graph chain(%x, %w) -> (%b1) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) : (float32[8,8])
          %f2 = MatMul(%f1, %w) : (float32[8,8])
          %f1/swap_out = SwapOut(%f1) {"nbytes": 256, "tier": "host"} after(%f2) : (variant[])
          %f3 = MatMul(%f2, %w) after(%f1/swap_out) : (float32[8,8])
          %b3 = MatMul(%f3, %w) : (float32[8,8])
          %f1/swap_in = SwapIn(%f1/swap_out) {"nbytes": 256, "tier": "host"} after(%b3) : (float32[8,8])
          %b2 = MatMul(%b3, %f2) : (float32[8,8])
          %b1 = MatMul(%b2, %f1/swap_in) : (float32[8,8])
        }
        """,
    )


def test_a_second_swap_uses_the_far_copy():
    first = Swap("x", out_after="f1", freed_before="f2", in_after="f2", in_before="f3", tier="disk")
    second = Swap("x", out_after="f3", freed_before="b3", in_after="b3", in_before="b2", tier="disk")
    graph = swapped(CHAIN, second, first)
    assert [str(node) for node in graph.nodes if node.op in (ir.SWAP_OUT, ir.SWAP_IN)] == [
        '%x/swap_out = SwapOut(%x) {"nbytes": 256, "tier": "disk"} after(%f1) : (variant[])',
        '%x/swap_in = SwapIn(%x/swap_out) {"nbytes": 256, "tier": "disk"} after(%f2) : (float32[8,8])',
        '%x/swap_in_1 = SwapIn(%x/swap_out) {"nbytes": 256, "tier": "disk"} after(%b3) : (float32[8,8])',
    ]
    assert graph.by_name["f2"].control_inputs == ("x/swap_out",)
    assert graph.by_name["b3"].control_inputs == ()


def test_a_later_output_and_its_device():
    graph = parser.parse("""
    graph g() -> () {
      %a = Op() @"/device:GPU:0" : (int8[], int16[4])
      %b = Op() : ()
      %c = Op(%a, %a:1) after(%b) : ()
    }
    """)
    testing.assert_graph_text(
        swapped(graph, Swap("a:1", out_after="a", freed_before="c", in_after="a", in_before="c")),
        """
        graph g() -> () {
          %a = Op() @"/device:GPU:0" : (int8[], int16[4])
          %a_1/swap_out = SwapOut(%a:1) {"nbytes": 8, "tier": "host"} @"/device:GPU:0" : (variant[])
          %a_1/swap_in = SwapIn(%a_1/swap_out) {"nbytes": 8, "tier": "host"} @"/device:GPU:0" after(%a) : (int16[4])
          %b = Op() : ()
          %c = Op(%a, %a_1/swap_in) after(%b, %a_1/swap_out) : ()
        }
        """,
    )


def test_repeated_nodes_read_what_came_back():
    graph = swapped(CHAIN, F1, Recompute(("f2",), before="b1"))
    assert graph.by_name["f2/recompute"].inputs == ("f1/swap_in", "w")
    # Before that position they read the first copy, although it is on its way by then.
    graph = swapped(CHAIN, F1, Recompute(("f2",), before="b2"))
    assert graph.by_name["f2/recompute"].inputs == ("f1", "w")


def test_what_is_repeated_later_replaces_what_came_back():
    graph = swapped(CHAIN, F1, Recompute(("f1",), before="b1"))
    assert graph.by_name["b1"].inputs == ("b2", "f1/recompute")


def test_the_copy_that_goes_out_is_the_current_one():
    late = Swap("f1", out_after="b3", freed_before="b2", in_after="b2", in_before="b1")
    graph = swapped(CHAIN, late, Recompute(("f1",), before="f3"))
    assert graph.by_name["f1/swap_out"].inputs == ("f1/recompute",)


def test_the_fence_stands_at_the_user_s_node_not_at_what_is_repeated_before_it():
    graph = swapped(CHAIN, F1, Recompute(("f1",), before="f3"))
    names = [node.name for node in graph.nodes]
    assert names[3:7] == ["f2", "f1/swap_out", "f1/recompute", "f3"]
    assert graph.by_name["f1/recompute"].control_inputs == ("f2",)
    assert graph.by_name["f3"].control_inputs == ("f1/swap_out",)


def test_the_results_stay():
    graph = CHAIN.replace(outputs=("f1", "b1"))
    assert swapped(graph, F1).outputs == ("f1", "b1")


def test_nothing_to_swap_keeps_the_graph():
    assert swap(CHAIN, Plan(order=tuple(CHAIN.position))) is CHAIN

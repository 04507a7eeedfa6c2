"""What stands where control edges were: barriers and placements, and the same computation as before."""

import random

import pytest
import testing
import tiny_graphs
from hypothesis import given
from hypothesis import strategies as st

from graphswap import ir, parser, rewrites
from graphswap.plan import Plan, Recompute, Swap

CHAIN = parser.parse(tiny_graphs.CHAIN)
F1 = Swap("f1", out_after="f2", freed_before="f3", in_after="b3", in_before="b1")


def lowered(graph, *decisions, order=()):
    return rewrites.rewrite(graph, Plan(order, decisions).check(graph), rewrites.PJRT_PASSES)


def lines(graph, *names):
    return [str(graph.by_name[name]) for name in names]


def test_a_swap_is_pinned_at_both_ends():
    testing.assert_graph_text(
        lowered(CHAIN, F1),
        """
        graph chain(%x, %w) -> (%b1) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) : (float32[8,8])
          %f2 = MatMul(%f1, %w) : (float32[8,8])
          %f1/swap_out = Place(%f1) {"memory_kind": "pinned_host"} after(%f2) : (float32[8,8])
          # f3 waits until the copy is in the host's memory.
          %barrier = XlaOptimizationBarrier(%f2, %f1/swap_out) : (float32[8,8], float32[8,8])
          %f3 = MatMul(%barrier, %w) after(%f1/swap_out) : (float32[8,8])
          %b3 = MatMul(%f3, %w) : (float32[8,8])
          # The copy back waits for b3.
          %barrier_1 = XlaOptimizationBarrier(%barrier:1, %b3) : (float32[8,8], float32[8,8])
          %f1/swap_in = Place(%barrier_1) {"memory_kind": "device"} after(%b3) : (float32[8,8])
          %b2 = MatMul(%b3, %barrier) : (float32[8,8])
          %b1 = MatMul(%b2, %f1/swap_in) : (float32[8,8])
        }
        """,
    )


def test_repeated_nodes_wait_for_what_their_reader_waits_for():
    graph = lowered(CHAIN, Recompute(("f1", "f2"), before="b2"))
    assert lines(graph, "barrier", "f1/recompute", "f2/recompute", "b2") == [
        "%barrier = XlaOptimizationBarrier(%x, %w, %b3) : (float32[8,8], float32[8,8], float32[8,8])",
        "%f1/recompute = MatMul(%barrier, %barrier:1) like(%f1) after(%b3) : (float32[8,8])",
        "%f2/recompute = MatMul(%f1/recompute, %barrier:1) like(%f2) after(%f1/recompute) : (float32[8,8])",
        "%b2 = MatMul(%barrier:2, %f2/recompute) : (float32[8,8])",
    ]


def test_constants_pass_no_barrier():
    """XLA has to know a shape."""
    graph = parser.parse("""
    graph g(%x, %w) -> (%z) {
      %x = Placeholder() : (float32[8,8])
      %w = Placeholder() : (resource[])
      %shape = Const() : (int32[2])
      %read = ReadVariableOp!(%w) : (float32[64])
      %a = MatMul(%x, %x) : (float32[8,8])
      %b = Reshape(%read, %shape) : (float32[8,8])
      %y = MatMul(%a, %b) : (float32[8,8])
      %z = MatMul(%y, %b) : (float32[8,8])
    }
    """)
    graph = lowered(graph, Recompute(("b",), before="z"))
    assert lines(graph, "barrier", "b/recompute") == [
        "%barrier = XlaOptimizationBarrier(%read, %y) : (float32[64], float32[8,8])",
        "%b/recompute = Reshape(%barrier, %shape) like(%b) after(%y) : (float32[8,8])",
    ]


@pytest.mark.parametrize(
    ("update", "waited_for"),
    [
        ("AssignSubVariableOp!(%w2, %step2)", "update2/read"),
        ("AssignVariableOp!(%w2, %step2)", "step2"),
    ],
)
def test_a_product_waits_for_updates_that_the_plan_puts_before_it(update, waited_for):
    graph = parser.parse(tiny_graphs.MLP_STEP.replace("AssignSubVariableOp!(%w2, %step2)", update))
    first = ("step2", "update2")
    before = [name for name in graph.position if name not in first]
    before[before.index("grad_w1") : before.index("grad_w1")] = first
    graph = lowered(graph, order=tuple(before))
    waits = graph.by_name[ir.producer(graph.by_name["grad_w1"].inputs[1])]
    assert waits.op == ir.BARRIER
    assert waits.inputs == ("grad_hidden", waited_for)
    if waited_for == "update2/read":
        assert lines(graph, waited_for) == [
            "%update2/read = ReadVariableOp!(%w2) like(%read2) after(%update2) : (float32[16,8])"
        ]


def test_weights_and_what_is_made_of_them_alone_pass_no_barrier_where_activations_do():
    """In XLA a weight in a barrier is a copy of it."""
    graph = lowered(parser.parse(tiny_graphs.MLP_STEP), order=tuple(parser.parse(tiny_graphs.MLP_STEP).position))
    assert lines(graph, "barrier", "grad_relu") == [
        "%barrier = XlaOptimizationBarrier(%error, %grad_w2) : (float32[8,8], float32[16,8])",
        "%grad_relu = MatMul(%barrier, %read2) : (float32[8,16])",
    ]


def test_an_empty_plan_returns_the_same_object():
    assert lowered(CHAIN) is CHAIN


# --- the law ------------------------------------------------------------------------------------------------------


def computed(graph):
    """What each node computes of what, copies and barriers looked through."""
    source: dict[str, str] = {}
    for node in graph.nodes:
        inputs = tuple(source[reference] for reference in node.inputs)
        passes_on = node.op in (ir.BARRIER, ir.PLACE, ir.SWAP_OUT, ir.SWAP_IN)
        source.update(zip(node.refs(), inputs if passes_on else node.refs(), strict=True))
        if not passes_on and not node.name.endswith("/read"):
            yield node.name, node.op, inputs
    yield "results", "", tuple(source[reference] for reference in graph.outputs)


@given(testing.random_graphs(6), st.randoms(use_true_random=False))
def test_barriers_change_no_value(graph, rng: random.Random):
    names = tuple(graph.position)
    makers = [testing.random_swap, testing.random_recompute]
    plan = Plan(names, tuple(rng.choice(makers)(rng, graph, names) for _ in range(rng.randint(0, 5)))).check(graph)
    before = rewrites.rewrite(graph, plan, rewrites.PJRT_PASSES[:-1])
    after = rewrites.rewrite(graph, plan, rewrites.PJRT_PASSES)
    assert list(computed(after)) == list(computed(before))
    for node in after.nodes:
        assert node.op not in (ir.SWAP_OUT, ir.SWAP_IN)
        if node.op == ir.PLACE and dict(node.attrs)["memory_kind"] == "device":
            assert after.by_name[ir.producer(node.inputs[0])].op == ir.BARRIER
        if node.op == ir.BARRIER:
            assert node.outputs == tuple(after.value(reference) for reference in node.inputs)

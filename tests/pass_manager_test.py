import pytest
import tiny_graphs

from graphswap import ir, parser, rewrites
from graphswap.plan import Plan, Recompute, Swap
from graphswap.rewrites.pass_manager import run_passes

CHAIN = parser.parse(tiny_graphs.CHAIN)
PLAN = Plan(order=tuple(CHAIN.position))


def renames(graph, plan):
    return graph.replace(name=f"{graph.name}_{len(plan.order)}")


def loses_a_node(graph, plan):
    return graph.replace(nodes=graph.nodes[1:])


def test_passes_run_one_after_the_other():
    assert run_passes(CHAIN, PLAN, (renames, renames)).name == "chain_8_8"


def test_an_empty_plan_returns_the_same_object():
    assert rewrites.rewrite(CHAIN, Plan(strategy="s", memory_budget=1)) is CHAIN
    assert rewrites.rewrite(CHAIN, Plan()) is CHAIN


def test_a_broken_graph_is_blamed_on_the_pass():
    with pytest.raises(ir.GraphError) as error:
        run_passes(CHAIN, PLAN, (renames, loses_a_node, renames))
    assert str(error.value).startswith(
        "after pass 'loses_a_node': graph chain_8: node 'f1' reads '%x', which does not stand before it.\n"
    )


def test_a_pass_that_refuses_is_named_too():
    mlp = parser.parse(tiny_graphs.MLP_STEP)
    with pytest.raises(ir.GraphError) as error:
        rewrites.rewrite(mlp, Plan(decisions=(Recompute(("read2",), before="grad_relu"),)))
    assert str(error.value) == (
        "after pass 'recompute': node 'read2' (ReadVariableOp) is stateful and must not run twice."
    )


def test_an_order_that_breaks_the_graph_is_blamed_on_schedule():
    with pytest.raises(ir.GraphError, match="^after pass 'schedule': "):
        rewrites.rewrite(CHAIN, Plan(order=tuple(reversed(list(CHAIN.position)))))


def test_all_passes_together():
    order = ("w", "x", "f1", "f2", "f3", "b3", "b2", "b1")
    swap = Swap("f1", out_after="f2", freed_before="f3", in_after="b3", in_before="b1")
    rewritten = rewrites.rewrite(CHAIN, Plan(order=order, decisions=(swap, Recompute(("f2",), before="b2"))))
    assert str(rewritten) == "\n".join(
        [
            "graph chain(%x, %w) -> (%b1) {",
            "  %w = Placeholder() : (float32[8,8])",
            "  %x = Placeholder() : (float32[8,8])",
            "  %f1 = MatMul(%x, %w) : (float32[8,8])",
            "  %f2 = MatMul(%f1, %w) after(%f1) : (float32[8,8])",
            '  %f1/swap_out = SwapOut(%f1) {"nbytes": 256, "tier": "host"} after(%f2) : (variant[])',
            "  %f3 = MatMul(%f2, %w) after(%f1/swap_out, %f1, %f2) : (float32[8,8])",
            "  %b3 = MatMul(%f3, %w) after(%f2, %f3) : (float32[8,8])",
            '  %f1/swap_in = SwapIn(%f1/swap_out) {"nbytes": 256, "tier": "host"} after(%b3) : (float32[8,8])',
            "  %f2/recompute = MatMul(%f1, %w) like(%f2) after(%b3, %f3) : (float32[8,8])",
            "  %b2 = MatMul(%b3, %f2/recompute) after(%b3, %f2/recompute) : (float32[8,8])",
            "  %b1 = MatMul(%b2, %f1/swap_in) after(%f2/recompute, %b2) : (float32[8,8])",
            "}",
        ]
    )

"""What XLA fuses, and plans for the step that is left."""

import pytest
import testing
from hypothesis import given

from graphswap import fusion, ir, liveness, parser, rewrites
from graphswap.cost_model import CostModel
from graphswap.plan import Plan, Recompute, Swap
from graphswap.strategies import budgets
from graphswap.strategies.chen import Chen
from graphswap.strategies.swap_all import SwapAll


def names(graph):
    return [node.name for node in graph.nodes]


def fused(body, results="%out"):
    return fusion.fused(
        parser.parse(f"graph step(%x) -> ({results}) {{\n%x = Placeholder() : (float32[8,8])\n{body}}}")
    )


def test_what_only_fused_kernels_read_is_in_memory_nowhere():
    view = fused(
        """%a = MatMul(%x, %x) : (float32[8,8])
        %scaled = Mul(%a, %x) : (float32[8,8])
        %flat = Reshape(%scaled) : (float32[64])
        %total = Sum(%flat) : (float32[])
        %out = AddV2(%scaled, %total) : (float32[8,8])
        """
    )
    assert names(view) == ["x", "a", "total", "out"]
    # Each input once; the sum reads what the scaled value is made of.
    assert [node.inputs for node in view.nodes[2:]] == [("a", "x"), ("a", "x", "total")]


@pytest.mark.parametrize(
    "reader",
    [
        "%out = MatMul(%v, %x) : (float32[8,8])",
        "%b = Reshape(%v) : (float32[8,8])\n%out = MatMul(%b, %x) : (float32[8,8])",
        "%b = NoOp() after(%v) : ()\n%out = Neg(%v) : (float32[8,8])",
        "%b = Neg(%v) : (float32[8,8])\n%out = Add(%v, %b) : (float32[8,8])\n%more = Neg(%v) : (float32[8,8])",
    ],
)
def test_what_a_product_reads_or_what_is_waited_for_stays(reader):
    is_result = "%more" in reader
    view = fused(f"%v = Square(%x) : (float32[8,8])\n{reader}\n", "%v, %out" if is_result else "%out")
    assert "v" in names(view)


def test_what_is_costly_is_computed_once():
    body = "%v = {}(%x) : (float32[8,8])\n%b = Neg(%v) : (float32[8,8])\n%c = Mul(%v, %v) : (float32[8,8])\n"
    body += "%out = MatMul(%b, %c) : (float32[8,8])\n"
    assert "v" in names(fused(body.format("Erfc")))
    assert "v" not in names(fused(body.format("Square")))


STEP = parser.parse(
    """graph step(%x) -> (%d) {
      %x = Placeholder() : (float32[8,8])
      %a = MatMul(%x, %x) : (float32[8,8])
      %early = Square(%a) : (float32[8,8])
      %b = Sum(%early) : (float32[])
      %c = Op(%b) : (float32[])
      %late = Neg(%early) : (float32[8,8])
      %d = Sum(%late, %c) : (float32[])
    }"""
)


def test_a_fused_node_is_repeated_where_what_it_is_made_of_has_come_back():
    assert names(fusion.fused(STEP)) == ["x", "a", "b", "c", "d"]
    plan = fusion.expanded(Plan(decisions=(Recompute(("a",), "d", "large"),), fingerprint="other"), STEP)
    # `late` runs for the first time then, right before what reads it.
    assert plan.order == ("x", "a", "early", "b", "c", "late", "d")
    assert plan.decisions == (Recompute(("a", "early"), "late", "large"),)
    assert plan.check(STEP).fingerprint == STEP.fingerprint


def test_a_fused_node_is_repeated_with_what_it_is_computed_inside():
    graph = parser.parse(
        """graph step(%x) -> (%d) {
          %x = Placeholder() : (float32[8,8])
          %a = MatMul(%x, %x) : (float32[8,8])
          %scaled = Square(%a) : (float32[8,8])
          %e = Exp(%scaled) : (float32[8,8])
          %b = MatMul(%e, %e) : (float32[8,8])
          %d = MatMul(%b, %e) : (float32[8,8])
        }"""
    )
    assert names(fusion.fused(graph)) == ["x", "a", "e", "b", "d"]
    plan = fusion.expanded(Plan(decisions=(Recompute(("e",), "d"),)), graph)
    # Else its first value would be kept for that, beside `a`, which is.
    assert plan.check(graph).decisions == (Recompute(("scaled", "e"), "d"),)


def test_a_kernel_writes_over_any_input_of_its_size():
    view = fused(
        """%a = MatMul(%x, %x) : (float32[8,8])
        %row = Sum(%x) : (float32[8])
        %b = Neg(%row) : (float32[8])
        %c = Square(%a) : (float32[8,8])
        %d = Add(%b, %c) : (float32[8,8])
        %out = MatMul(%d, %d) : (float32[8,8])
        """
    )
    kernel = view.by_name["d"]
    assert kernel.inputs == ("row", "a")
    assert liveness.overwritten_by(view, kernel, 0) == [1]
    assert liveness.overwritten_by(view, view.by_name["out"], 0) == []


def test_a_copy_is_back_before_the_first_node_that_is_made_of_it():
    plan = fusion.expanded(Plan(decisions=(Swap("a", "b", "c", "b", "d"),)), STEP)
    assert set(plan.check(STEP).decisions) == {Swap("a", "b", "c", "b", "late"), Recompute(("early",), "late")}


def test_without_decisions_nothing_changes():
    assert fusion.expanded(Plan(), STEP).is_empty


@given(testing.random_graphs(12, batch=4096))
def test_the_step_does_what_the_plan_for_its_fused_form_means(graph):
    view, costs = fusion.fused(graph), CostModel()
    for strategy in (Chen(), SwapAll()):
        plan = budgets.smallest(strategy, view, costs).one_by_one()
        expanded = fusion.expanded(plan, graph)
        expanded.check(graph)
        rewritten = rewrites.rewrite(graph, expanded, UNPRUNED)
        assert _made_of(rewritten, view) == _made_of(rewrites.rewrite(view, plan, UNPRUNED), view)


UNPRUNED = rewrites.PASSES[:3]


def _made_of(graph, view):
    """What every node that is not fused reads; in the place of a fused one, what that is made of."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        read = [found.get(ir.producer(reference), {reference}) for reference in node.inputs]
        is_fused = not node.op.startswith("Swap") and (node.like or node.name) not in view.by_name
        if is_fused:
            found[node.name] = set().union(*read)
    return {
        node.name: set().union(*(found.get(ir.producer(reference), {reference}) for reference in node.inputs))
        for node in graph.nodes
        if node.name not in found
    }

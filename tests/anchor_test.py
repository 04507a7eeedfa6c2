"""The anchors that keep XLA from running nodes early, on small graphs."""

import testing
import tiny_graphs

from graphswap import ir, liveness, parser, rewrites
from graphswap.plan import Plan, Recompute
from graphswap.rewrites.anchor import anchor
from graphswap.rewrites.recompute import recompute

CHAIN = parser.parse(tiny_graphs.CHAIN)


def anchored(graph, *decisions):
    plan = Plan(decisions=decisions)
    return ir.verify(anchor(recompute(graph, plan), plan))


def anchors(graph):
    return {node.name: node.inputs for node in graph.nodes if node.op == ir.ANCHOR}


def test_the_first_of_repeated_nodes_waits_for_the_gradient():
    testing.assert_graph_text(
        anchored(CHAIN, Recompute(("f1", "f2"), before="b2")),
        """
        graph chain(%x, %w) -> (%b1) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) : (float32[8,8])
          %f2 = MatMul(%f1, %w) : (float32[8,8])
          %f3 = MatMul(%f2, %w) : (float32[8,8])
          %b3 = MatMul(%f3, %w) : (float32[8,8])
          # One operand will do, as the anchor of a product's operand is a copy.
          %f1/recompute/anchor = Anchor(%x, %b3) : (float32[8,8])
          %f1/recompute = MatMul(%f1/recompute/anchor, %w) like(%f1) after(%b3) : (float32[8,8])
          # The next one reads what waits.
          %f2/recompute = MatMul(%f1/recompute, %w) like(%f2) after(%f1/recompute) : (float32[8,8])
          %b2 = MatMul(%b3, %f2/recompute) : (float32[8,8])
          %b1 = MatMul(%b2, %f1/recompute) : (float32[8,8])
        }
        """,
    )


def test_what_xla_knows_when_it_compiles_holds_nothing_back():
    graph = parser.parse("""
    graph g(%x) -> (%b) {
      %x = Placeholder() : (float32[64])
      %f = Exp(%x) : (float32[64])
      %late = Sin(%f) : (float32[64])
      %c = Const() : (float32[64])
      %ones = OnesLike(%late) : (float32[64])
      %seed = Mul(%ones, %c) : (float32[64])
      %b = Mul(%seed, %f) : (float32[64])
    }
    """)
    # The seed is the newest value that b reads, and a constant: the newest one before it is waited for.
    assert anchors(anchored(graph, Recompute(("f",), before="b"))) == {"f/recompute/anchor": ("x", "late")}


def test_a_convolution_reads_its_older_operand_when_the_newer_is_there():
    graph = parser.parse("""
    graph g(%x, %handle) -> (%dw) {
      %x = Placeholder() : (float32[4,8,8,16])
      %handle = Placeholder() : (resource[])
      %w = ReadVariableOp!(%handle) : (float32[3,3,16,16])
      %h = Relu(%x) : (float32[4,8,8,16])
      %y = Conv2D(%h, %w) : (float32[4,8,8,16])
      %dy = ReluGrad(%y, %y) : (float32[4,8,8,16])
      %sizes = Const() : (int32[4])
      %dw = Conv2DBackpropFilter(%h, %sizes, %dy) : (float32[3,3,16,16])
    }
    """)
    assert anchors(anchored(graph)) == {"y/anchor": ("w", "h"), "dw/anchor": ("h", "dy")}


UPDATED = """
graph g(%x, %handle, %slot) -> (%loss) after(%update) {
  %x = Placeholder() : (float32[32,32])
  %handle = Placeholder() : (resource[])
  %slot = Placeholder() : (resource[])
  %w = ReadVariableOp!(%handle) : (float32[32,32])
  %y = MatMul(%x, %w) : (float32[32,32])
  %loss = Mean(%y) : (float32[])
  %dw = MatMul(%x, %y) : (float32[32,32])
  %m = ReadVariableOp!(%slot) : (float32[32,32])
  %step = AddV2(%m, %dw) : (float32[32,32])
  %keep = AssignVariableOp!(%slot, %step) : ()
  %update = AssignSubVariableOp!(%handle, %step) : ()
  %dx = MatMul(%y, %w) : (float32[32,32])
  %other = Tanh(%dx) : (float32[32,32])
  %more = MatMul(%other, %x) : (float32[32,32])
}
"""


def test_a_gradient_is_used_when_the_other_readers_of_the_variable_have_run():
    graph = anchored(parser.parse(UPDATED))
    assert anchors(graph) == {"step/anchor": ("dw", "dx")}
    assert graph.by_name["step"].inputs == ("m", "step/anchor")
    # The updates stand behind what they wait for.
    order = [node.name for node in graph.nodes]
    assert order.index("dx") < order.index("step/anchor") < order.index("update")


def test_an_update_that_a_repeated_node_is_ordered_behind_stays_one():
    graph = anchored(parser.parse(UPDATED), Recompute(("y",), before="dx"))
    repeated = graph.by_name["y/recompute"]
    assert repeated.like == "y" and not repeated.control_inputs
    assert graph.by_name["step"].inputs == ("m", "step/anchor")
    order = [node.name for node in graph.nodes]
    assert order.index("y/recompute") < order.index("dx") < order.index("step/anchor") < order.index("update")


def test_a_gradient_that_needs_all_readers_waits_for_nothing():
    dx, dw = "  %dx = MatMul(%y, %w) : (float32[32,32])\n", "  %dw = MatMul(%x, %y) : (float32[32,32])\n"
    text = UPDATED.replace(dx, "").replace(dw, dx + dw.replace("%y", "%dx"))
    assert anchors(anchored(parser.parse(text))) == {}


def test_under_mixed_precision_gradients_wait_before_they_are_cast():
    text = UPDATED.replace("%dw = MatMul(%x, %y) : (float32[32,32])", "%half = MatMul(%x, %y) : (float16[32,32])")
    cast = "  %dw = Cast(%half) : (float32[32,32])\n"
    text = text.replace("  %m = Read", cast + "  %m = Read")
    assert anchors(anchored(parser.parse(text))) == {"dw/anchor": ("half", "dx")}


def test_a_limited_norm_does_not_lead_to_other_gradients():
    norm = """
  %z = MatMul(%other, %y) : (float32[32,32])
  %squares = Square(%z) : (float32[32,32])
  %norm = Sum(%squares) : (float32[])
  %scaled = Mul(%dw, %norm) : (float32[32,32])
"""
    dx = "  %dx = MatMul(%y, %w) : (float32[32,32])\n  %other = Tanh(%dx) : (float32[32,32])"
    text = UPDATED.replace(dx + "\n", "").replace(
        "  %step = AddV2(%m, %dw)", dx + norm + "  %step = AddV2(%m, %scaled)"
    )
    assert anchors(anchored(parser.parse(text))) == {"scaled/anchor": ("dw", "dx")}


def test_a_node_repeated_later_than_what_it_reads_waits_for_its_own_reader():
    repeats = Recompute(("f1",), before="b3"), Recompute(("f2",), before="b1")
    assert anchors(anchored(CHAIN, *repeats)) == {
        "f1/recompute/anchor": ("x", "f3"),
        "f2/recompute/anchor": ("f1/recompute", "b2"),
    }


def test_shapes_do_not_wait_as_xla_has_to_know_them():
    graph = parser.parse("""
    graph g(%x, %n) -> (%b) {
      %x = Placeholder() : (float32[8,8])
      %n = Placeholder() : (int32[2])
      %f = Reshape(%x, %n) : (float32[8,8])
      %late = Sin(%f) : (float32[8,8])
      %b = Mul(%late, %f) : (float32[8,8])
    }
    """)
    assert anchors(anchored(graph, Recompute(("f",), before="b"))) == {"f/recompute/anchor": ("x", "late")}


POOLED = parser.parse("""
graph g(%x) -> (%b) {
  %x = Placeholder() : (float32[4,8,8,16])
  %h = Exp(%x) : (float32[4,8,8,16])
  %p = MaxPool(%h) : (float32[4,4,4,16])
  %dp = Sin(%p) : (float32[4,4,4,16])
  %dh = MaxPoolGrad(%h, %p, %dp) : (float32[4,8,8,16])
  %b = Mul(%dh, %h) : (float32[4,8,8,16])
}
""")


def test_a_gradient_of_pooling_runs_in_a_branch():
    graph = rewrites.rewrite_for_jit(POOLED, Plan(decisions=(Recompute(("h",), before="dh"),)))
    assert graph.by_name["dh"].inputs == ("h/recompute", "p", "dp")
    assert [node.name for node in graph.nodes if dict(node.attrs).get("is_enclosed")] == ["dh"]
    assert graph.by_name["b"].inputs == ("dh", "h/recompute")
    assert anchors(graph) == {"h/recompute/anchor": ("x", "dp")}


def test_a_first_run_that_nobody_reads_goes_with_its_anchor():
    graph = parser.parse("""
    graph g(%x, %handle) -> (%b) {
      %x = Placeholder() : (float32[4,8,8,16])
      %handle = Placeholder() : (resource[])
      %w = ReadVariableOp!(%handle) : (float32[3,3,16,16])
      %h = Relu(%x) : (float32[4,8,8,16])
      %y = Conv2D(%h, %w) : (float32[4,8,8,16])
      %late = Sin(%h) : (float32[4,8,8,16])
      %b = Mul(%late, %y) : (float32[4,8,8,16])
    }
    """)
    assert "y" in anchored(graph, Recompute(("y",), before="b")).by_name
    rewritten = rewrites.rewrite_for_jit(graph, Plan(decisions=(Recompute(("y",), before="b"),)))
    assert "y" not in rewritten.by_name and "y/anchor" not in rewritten.by_name
    assert rewritten.by_name["b"].inputs == ("late", "y/recompute")


def test_an_anchor_shares_the_buffer_of_its_value():
    graph = anchored(parser.parse(UPDATED))
    assert liveness.roots(graph)["step/anchor"] == "dw"

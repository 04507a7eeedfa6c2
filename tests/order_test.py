import pytest
import testing
import tiny_graphs
from hypothesis import given

from graphswap import ir, parser
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.simulator import simulate
from graphswap.strategies import order

ORDERS = (order.traced, order.breadth_first, order.depth_first)
MLP = parser.parse(tiny_graphs.MLP_STEP)


@pytest.mark.parametrize("make", ORDERS)
@given(graph=testing.random_graphs())
def test_orders_are_topological_and_the_same_every_time(make, graph):
    found = make(graph)
    assert sorted(found) == sorted(graph.position)
    ir.verify(graph.replace(nodes=tuple(graph.by_name[name] for name in found)))
    assert make(graph) == found


def test_traced_keeps_the_order():
    assert order.traced(MLP) == tuple(MLP.position)


def test_updates_run_as_soon_as_nobody_reads_the_old_value():
    # Gradients that only feed an update come first; update2 waits for grad_relu, which reads w2.
    names = ["grad_w2", "step2", "grad_relu", "update2", "grad_hidden", "grad_w1", "step1", "update1"]
    assert [name for name in order.depth_first(MLP) if name in names] == names


BRANCHES = parser.parse("""
graph branches(%x) -> (%join) {
  %x = Placeholder() : (float32[64])
  %a1 = Op(%x) : (float32[64])
  %b1 = Op(%x) : (float32[64])
  %a2 = Op(%x, %a1) : (float32[64])
  %b2 = Op(%x, %b1) : (float32[64])
  %a3 = Op(%x, %a1, %a2) : (float32[64])
  %b3 = Op(%x, %b1, %b2) : (float32[64])
  %join = Op(%a3, %b3) : (float32[64])
}
""")


def test_depth_first_runs_branches_one_by_one():
    found = order.depth_first(BRANCHES)
    assert found in (
        ("x", "a1", "a2", "a3", "b1", "b2", "b3", "join"),
        ("x", "b1", "b2", "b3", "a1", "a2", "a3", "join"),
    )
    planned, traced = (simulate(BRANCHES, Plan(order=names), CostModel()).peak_bytes for names in (found, ()))
    assert planned == 5 * 256 < traced == 6 * 256


def test_breadth_first_takes_what_frees_memory_before_what_needs_more():
    graph = parser.parse("""
    graph g(%x) -> () {
      %x = Placeholder() : (float32[64])
      %a = Op(%x) : (float32[6400])
      %b = Op(%x) : (float32[6400])
      %c = Op(%a) : (float32[64])
      %d = Op(%b) : (float32[64])
    }
    """)
    assert order.breadth_first(graph) == ("x", "a", "c", "b", "d")


def test_what_is_made_of_variables_alone_waits_for_its_reader():
    graph = parser.parse("""
    graph g(%x, %m) -> (%c) {
      %x = Placeholder() : (float32[64])
      %m = Placeholder() : (resource[])
      %read = ReadVariableOp!(%m) : (float32[64])
      %two = Const() : (float32[])
      %scaled = Mul(%read, %two) : (float32[64])
      %halved = Mul(%scaled, %two) : (float32[64])
      %noise = RandomUniform!() : (float32[64])
      %a = Op(%x) : (float32[64])
      %b = Op(%a) : (float32[64])
      %step = Op(%b, %halved) : (float32[64])
      %update = AssignVariableOp!(%m, %step) : ()
      %c = Op(%b, %noise) : (float32[64])
    }
    """)
    found = order.depth_first(graph)
    at = found.index("step")
    assert found[at - 2 : at + 2] == ("scaled", "halved", "step", "update")
    assert simulate(graph, Plan(order=found), CostModel()).peak_bytes < simulate(graph, Plan(), CostModel()).peak_bytes


def test_a_node_that_makes_no_bytes_runs_at_once():
    graph = parser.parse("""
    graph g(%x, %w) -> (%c) {
      %x = Placeholder() : (float32[64])
      %a = Op(%x) : (float32[64])
      %b = Op(%a) : (float32[64])
      %c = Op(%a, %b) : (float32[64])
      %w = Placeholder() : (resource[])
      %read = ReadVariableOp(%w) : (float32[64])
      %shape = Shape(%a) : (int32[1])
      %check = Assert(%a) : ()
    }
    """)
    assert order.depth_first(graph) == ("x", "w", "read", "a", "shape", "check", "b", "c")


def test_a_buffer_that_an_alias_or_a_result_keeps_is_not_freed():
    graph = parser.parse("""
    graph g(%x) -> (%kept) {
      %x = Placeholder() : (float32[64])
      %kept = Op(%x) : (float32[6400])
      %seen = Op(%x) : (float32[6400])
      %view = Reshape(%seen) : (float32[6400])
      %gone = Op(%x) : (float32[6400])
      %use_kept = Op(%kept) : (float32[64])
      %use_seen = Op(%seen) : (float32[64])
      %use_gone = Op(%gone) : (float32[64])
      %use_view = Op(%view) : (float32[64])
    }
    """)
    found = order.breadth_first(graph)
    assert found.index("use_gone") == found.index("gone") + 1
    assert found.index("use_kept") > found.index("seen")


def test_what_the_backward_pass_makes_of_the_forward_pass_alone_is_made_late():
    graph = parser.parse("""
    graph g(%x) -> (%d) {
      %x = Placeholder() : (float32[64])
      %a = Op(%x) : (float32[64])
      %early = Op(%a) : (float32[6400])
      %b = Op!(%a) : (float32[640])
      %c = Op!(%b, %early) : (float32[64])
      %d = Op!(%c, %a) : (float32[64])
    }
    """)
    for make in (order.breadth_first, order.depth_first):
        assert make(graph) == ("x", "a", "b", "early", "c", "d")


def test_what_frees_as_much_as_it_makes_stays():
    graph = parser.parse("""
    graph g(%x) -> (%d) {
      %x = Placeholder() : (float32[64])
      %large = Op!(%x) : (float32[6400])
      %small = Op(%large) : (float32[64])
      %b = Op!(%x) : (float32[640])
      %d = Op(%b, %small) : (float32[64])
    }
    """)
    found = order.depth_first(graph)
    assert found.index("small") == found.index("large") + 1


def test_of_what_only_feeds_updates_that_comes_first_that_feeds_fewest():
    """As the gradient of a layer's weights beside what goes on to the only layer before."""
    graph = parser.parse("""
    graph step(%g, %y, %x, %w1, %m1, %w2) -> () after(%slot1, %update1, %update2) {
      %g = Placeholder() : (float32[64,64])
      %y = Placeholder() : (float32[64,64])
      %x = Placeholder() : (float32[64,64])
      %w1 = Placeholder() {"held_bytes": [16384]} : (resource[])
      %m1 = Placeholder() {"held_bytes": [16384]} : (resource[])
      %w2 = Placeholder() {"held_bytes": [16384]} : (resource[])
      %grad = Op!(%g, %y, %x) : (float32[64,64])
      %grad_y = Op(%grad) : (float32[64,64])
      %grad_w2 = MatMul(%y, %grad) : (float32[64,64])
      %grad_w1 = MatMul(%x, %grad_y) : (float32[64,64])
      %slot1 = AssignAddVariableOp!(%m1, %grad_w1) : ()
      %update1 = AssignSubVariableOp!(%w1, %grad_w1) : ()
      %update2 = AssignSubVariableOp!(%w2, %grad_w2) : ()
    }
    """)
    names = ["grad_w2", "update2", "grad_y", "grad_w1"]
    assert [name for name in order.depth_first(graph) if name in names] == names


def test_what_alone_keeps_its_input_does_not_wait():
    """Of two slices one is read last; once the other has run, it frees more than it makes."""
    graph = parser.parse("""
    graph slices(%x) -> (%out) {
      %x = Placeholder() : (float32[64])
      %joined = Op!(%x) : (float32[128])
      %last = Slice(%joined) : (float32[64])
      %first = Slice(%joined) : (float32[64])
      %a = Op(%first) : (float32[64])
      %b = Op(%a) : (float32[64])
      %out = Op(%b, %last) : (float32[64])
    }
    """)
    found = order.depth_first(graph)
    assert found == ("x", "joined", "first", "last", "a", "b", "out")


def test_a_reader_of_the_old_value_that_needs_the_new_one_comes_after_the_update():
    graph = parser.parse("""
    graph g(%v, %x) -> (%difference) {
      %v = Placeholder() : (resource[])
      %x = Placeholder() : (float32[64])
      %old = ReadVariableOp(%v) : (float32[64])
      %update = AssignVariableOp!(%v, %x) : ()
      %new = ReadVariableOp(%v) after(%update) : (float32[64])
      %difference = Sub(%old, %new) : (float32[64])
    }
    """)
    for make in ORDERS:
        ir.verify(graph.replace(nodes=tuple(graph.by_name[name] for name in make(graph))))


def test_a_reader_of_an_alias_of_the_old_value_comes_before_the_update():
    graph = parser.parse("""
    graph g(%v, %x) -> (%out) after(%update) {
      %v = Placeholder() : (resource[])
      %x = Placeholder() : (float32[64])
      %old = ReadVariableOp(%v) : (float32[64])
      %flat = Reshape(%old) : (float32[64])
      %gradient = Relu(%x) : (float32[64])
      %update = AssignSubVariableOp!(%v, %gradient) after(%old) : ()
      %out = Mul(%x, %flat) : (float32[64])
    }
    """)
    for make in (order.breadth_first, order.depth_first):
        found = make(graph)
        assert found.index("out") < found.index("update")


def test_of_the_terms_of_a_sum_that_with_most_on_the_way_comes_first():
    """As in the gradient of BatchNormalization: one term takes two buffers for a while, the others are one each."""
    graph = parser.parse("""
    graph terms(%g, %x) -> (%out) {
      %g = Op() : (float32[6400])
      %x = Op() : (float32[6400])
      %scaled = Mul(%g, %g) : (float32[6400])
      %mean = Sum(%g) : (float32[])
      %spread = Tile(%mean) : (float32[6400])
      %variance = Sum(%x) : (float32[])
      %tiled = Tile(%variance) : (float32[6400])
      %centred = Sub(%x, %variance) : (float32[6400])
      %term = Mul(%tiled, %centred) : (float32[6400])
      %sum = AddN(%scaled, %spread, %term) : (float32[6400])
      %out = Op!(%sum, %g) : (float32[6400])
    }
    """)
    found = order.depth_first(graph)
    assert found.index("term") < min(found.index("scaled"), found.index("spread"))
    assert _peak(graph, found) < _peak(graph, order.traced(graph))


def _peak(graph, names):
    ordered = graph.replace(nodes=tuple(graph.by_name[name] for name in names))
    return simulate(ordered, Plan(), CostModel()).peak_bytes

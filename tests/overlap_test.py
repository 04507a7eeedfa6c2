import testing

from graphswap import ir, parser, rewrites
from graphswap.cost_model import CostModel
from graphswap.plan import Plan, Prefetch, Recompute, Swap, WriteBack
from graphswap.rewrites.overlap import overlap
from graphswap.rewrites.prune import prune
from graphswap.rewrites.recompute import recompute
from graphswap.rewrites.swap import swap
from graphswap.simulator import simulate

STEP = parser.parse("""
graph step(%x, %w, %store, %spare) -> (%loss) after(%new/store) {
  %store = Placeholder() {"store_of": "w", "tier": "host"} : (resource[])
  %spare = Placeholder() : (resource[])
  %x = Placeholder() : (float32[8,8])
  %w = Placeholder() : (resource[])
  %a = Relu(%x) : (float32[8,8])
  %b = Relu(%a) : (float32[8,8])
  %fetch = Fetch(%store) {"tier": "host", "variable": "w"} : (float32[8,8])
  %y = MatMul(%b, %fetch) : (float32[8,8])
  %loss = L2Loss(%y) : (float32[])
  %grad = MatMul(%b, %y) : (float32[8,8])
  %back = MatMul(%grad, %fetch) : (float32[8,8])
  %new = Sub(%fetch, %grad) : (float32[8,8])
  %new/store = Store!(%new, %store, %spare) {"tier": "host", "variable": "w"} after(%fetch, %y, %back) : ()
  %last = MatMul(%back, %a) : (float32[8,8])
  %end = NoOp!(%last) : ()
}
""")


def lines(*decisions):
    """The nodes from %a on."""
    plan = Plan(decisions=decisions).check(STEP)
    graph = STEP
    for rewrite in (recompute, swap, overlap, prune):
        graph = ir.verify(rewrite(graph, plan))
    start = graph.position["a"]
    return [str(node) for node in graph.nodes[start:]]


PLAIN = [str(node) for node in STEP.nodes[STEP.position["a"] :]]
AHEAD = '%fetch = Fetch(%store) {"overlaps": "a", "tier": "host", "variable": "w"} after(%a) : (float32[8,8])'


def test_a_plan_without_such_copies_returns_the_same_object():
    assert overlap(STEP, Plan(decisions=(Swap("a", "b", "y", "y", "last"),))) is STEP


def test_a_fetch_starts_ahead():
    expected = [line for line in PLAIN if not line.startswith("%fetch")]
    expected.insert(1, AHEAD)
    assert lines(Prefetch("fetch", "a", "fetch")) == expected


def test_a_repeated_fetch_starts_ahead_and_is_all_that_its_reader_waits_for():
    found = lines(Recompute(("fetch",), "back"), Prefetch("fetch", "y", "back"))
    again = (
        '%fetch/recompute = Fetch(%store) {"overlaps": "y", "tier": "host", "variable": "w"} like(%fetch) '
        "after(%y) : (float32[8,8])"
    )
    expected = [line.replace("%grad, %fetch", "%grad, %fetch/recompute") for line in PLAIN]
    expected = [line.replace("Sub(%fetch,", "Sub(%fetch/recompute,") for line in expected]
    expected.insert(4, again)
    assert found == expected


def test_a_store_keeps_only_the_named_node_waiting():
    """It starts where it stands, after the node before it, so not before what fetches the old value once more."""
    old, new = (
        f"%new/store = Store!(%new, %store, %spare) {attrs} after(%fetch, %y, %back{previous}) : ()"
        for attrs, previous in (
            ('{"tier": "host", "variable": "w"}', ""),
            ('{"overlaps": "new", "tier": "host", "variable": "w"}', ", %new"),
        )
    )
    expected = [new if line == old else line for line in PLAIN]
    assert lines(WriteBack("new/store")) == expected
    expected[-1] = "%end = NoOp!(%last) after(%new/store) : ()"
    assert lines(WriteBack("new/store", "end")) == expected


def test_a_store_waits_for_a_repeated_fetch_before_it():
    text = str(STEP).replace(
        "  %new/store =", "  %c = MatMul(%back, %y) : (float32[8,8])\n  %d = Relu(%c) : (float32[8,8])\n  %new/store ="
    )
    graph = parser.parse(text)
    again, late = Recompute(("fetch", "y"), "c"), Prefetch("fetch", "new", "c")
    for decisions in ((again,), (again, late)):
        plan = Plan(decisions=(*decisions, WriteBack("new/store"))).check(graph)
        rewritten = rewrites.rewrite(graph, plan)
        before = {"new/store"}
        for node in reversed(rewritten.nodes):
            if node.name in before:
                before.update((*map(ir.producer, node.inputs), *node.control_inputs))
        assert {node.name for node in rewritten.nodes if node.op == ir.FETCH} == {"fetch", "fetch/recompute"} <= before


def test_a_wait_of_the_user_s_own_is_kept():
    graph = parser.parse(
        str(STEP).replace('"variable": "w"} : (float32[8,8])', '"variable": "w"} after(%a) : (float32[8,8])', 1)
    )
    plan = Plan(decisions=(Recompute(("a",), "b"), Prefetch("fetch", "a", "fetch"))).check(graph)
    model = CostModel()
    assert simulate(rewrites.rewrite(graph, plan), Plan(), model) == simulate(graph, plan, model)


def test_what_the_fetch_would_have_waited_for_the_next_node_does():
    """The swapped value is gone before the fetch, which no longer stands there."""
    found = lines(Swap("a", "b", "fetch", "back", "last"), Prefetch("fetch", "a", "fetch"))
    assert found[:5] == [
        PLAIN[0],
        AHEAD,
        PLAIN[1],
        '%a/swap_out = SwapOut(%a) {"nbytes": 256, "tier": "host"} after(%b) : (variant[])',
        "%y = MatMul(%b, %fetch) after(%a/swap_out) : (float32[8,8])",
    ]


def test_a_copy_that_would_have_started_after_the_fetch_starts_after_the_node_before_it():
    found = lines(Swap("a", "b", "y", "new/store", "last"), WriteBack("new/store"), Prefetch("fetch", "x", "fetch"))
    (back,) = (line for line in found if "SwapIn" in line)
    assert back.startswith("%a/swap_in = SwapIn(%a/swap_out)")
    assert "after(%new)" in back


def test_copies_after_the_same_node_stand_in_the_order_of_the_plan():
    first, second = Prefetch("fetch", "a", "fetch"), Prefetch("fetch", "a", "back")
    repeat = Recompute(("fetch",), "back")
    for plan in ((first, second, repeat), (repeat, second, first)):
        names = [line.partition(" ")[0] for line in lines(*plan)]
        prefetches = [decision for decision in plan if isinstance(decision, Prefetch)]
        expected = ["%fetch" if one is first else "%fetch/recompute" for one in prefetches]
        assert names[1:3] == expected


def test_the_printed_graph_is_read_back():
    plan = Plan(decisions=(Prefetch("fetch", "a", "fetch"), WriteBack("new/store", "last")))
    graph = ir.verify(overlap(STEP, plan.check(STEP)))
    testing.assert_graph_text(graph, str(graph))
    assert parser.parse(str(graph)) == graph

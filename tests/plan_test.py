import json

import pytest
import tiny_graphs

from graphswap import parser
from graphswap.plan import Declined, Plan, PlanError, Prefetch, Recompute, SideBySide, Swap, WriteBack

CHAIN = parser.parse(tiny_graphs.CHAIN)
DIAMOND = parser.parse(tiny_graphs.DIAMOND)
MLP = parser.parse(tiny_graphs.MLP_STEP)
SWAP = Swap("f1", out_after="f2", freed_before="f3", in_after="b3", in_before="b1", reason="largest gap")
RECOMPUTE = Recompute(("f1", "f2"), before="b2")
PLAN = Plan(
    order=tuple(CHAIN.position),
    decisions=(SWAP, RECOMPUTE),
    declined=(Declined("f3", "used at once"),),
    strategy="by hand",
    memory_budget=1280,
    fingerprint=CHAIN.fingerprint,
)


def test_only_a_plan_that_does_nothing_is_empty():
    assert Plan(declined=PLAN.declined, strategy="s", memory_budget=1).is_empty
    assert not Plan(decisions=(SWAP,)).is_empty
    assert not Plan(order=PLAN.order).is_empty


def test_decisions_by_kind():
    assert PLAN.swaps == (SWAP,)
    assert PLAN.recomputes == (RECOMPUTE,)


@pytest.mark.parametrize("plan", [Plan(), PLAN], ids=["empty", "full"])
def test_from_json_reads_back_what_to_json_writes(plan):
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        json.dumps({**json.loads(PLAN.to_json()), "colour": "red"}),
        json.dumps({**json.loads(PLAN.to_json()), "decisions": [{"kind": "Teleport"}]}),
        json.dumps({**json.loads(PLAN.to_json()), "decisions": [{"kind": "Swap", "value": "a"}]}),
    ],
)
def test_from_json_refuses_everything_else(text):
    with pytest.raises(PlanError, match="^expected a plan as written by Plan.to_json, received something else: "):
        Plan.from_json(text)


def test_pairs():
    plan = Plan(decisions=(SideBySide("left", "right", reason="small"),))
    assert plan.check(DIAMOND).pairs == plan.decisions
    assert Plan.from_json(plan.to_json()) == plan
    assert str(plan).splitlines()[1] == "  together   left, right  (small)"


@pytest.mark.parametrize(
    ("pairs", "graph", "message"),
    [
        ([("left", "up")], DIAMOND, "there is no node 'up'."),
        ([("top", "right")], DIAMOND, "expected 'right' right after 'top' in execution order."),
        ([("f1", "f2")], CHAIN, "'f2' needs 'f1'."),
        ([("x", "w")], DIAMOND, "'x' (Placeholder) is stateful, or in memory all the time."),
        ([("left", "right"), ("left", "right")], DIAMOND, "a node is in two pairs."),
    ],
)
def test_check_refuses_pairs_that_do_not_fit(pairs, graph, message):
    plan = Plan(decisions=tuple(SideBySide(*pair) for pair in pairs))
    with pytest.raises(PlanError) as error:
        plan.check(graph)
    assert str(error.value) == f"{plan.decisions[-1]} does not fit graph '{graph.name}': {message}"


def test_text():
    assert str(PLAN).splitlines() == [
        "plan by hand, budget 0.0MiB",
        "  swap       f1  out after f2, in before b1, host  (largest gap)",
        "  recompute  f1, f2  before b2",
        "  keep       f3  used at once",
    ]
    assert str(Plan()) == "plan -, budget none"


@pytest.mark.parametrize("plan", [Plan(), PLAN, Plan(decisions=(Swap("f1", "f1", "b3", "b3", "b1", "disk"),))])
def test_check_returns_a_plan_that_fits(plan):
    assert plan.check(CHAIN) is plan


def test_check_goes_by_the_order_of_the_plan():
    late = Swap("x", out_after="left", freed_before="right", in_after="right", in_before="top")
    graph = parser.parse("""
    graph g(%x) -> () {
      %x = Placeholder() : (int8[])
      %top = Op(%x) : (int8[])
      %left = Op(%x) : (int8[])
      %right = Op() : (int8[])
    }
    """)
    with pytest.raises(PlanError):
        Plan(decisions=(late,)).check(graph)
    Plan(order=("x", "left", "right", "top"), decisions=(late,)).check(graph)


def swap(**changes):
    fields = {"value": "f1", "out_after": "f2", "freed_before": "f3", "in_after": "b3", "in_before": "b1"}
    return Plan(decisions=(Swap(**{**fields, **changes}),))


IN_ORDER = "expected producer <= out_after < freed_before, in_after < in_before in execution order."


@pytest.mark.parametrize(
    ("plan", "graph", "message"),
    [
        (swap(value="f9"), CHAIN, "there is no node 'f9'."),
        (swap(value="f1:1"), CHAIN, "there is no value 'f1:1'."),
        (
            Plan(decisions=(Swap("w1", "read1", "hidden", "relu", "loss"),)),
            MLP,
            "'w1' (resource[]) holds no bytes that could move.",
        ),
        (swap(freed_before="f9"), CHAIN, "there is no node 'f9'."),
        (swap(tier="moon"), CHAIN, "expected a tier out of ('host', 'disk'), received 'moon'."),
        (swap(value="f3"), CHAIN, IN_ORDER),
        (swap(freed_before="f2"), CHAIN, IN_ORDER),
        (swap(freed_before="b1", in_before="b2"), CHAIN, IN_ORDER),
        (swap(in_after="f1"), CHAIN, IN_ORDER),
        (swap(in_after="b1"), CHAIN, IN_ORDER),
        (Plan(decisions=(Recompute(("f9",), "b1"),)), CHAIN, "there is no node 'f9'."),
        (Plan(decisions=(Recompute(("f1",), "b9"),)), CHAIN, "there is no node 'b9'."),
        (Plan(decisions=(Recompute(("b1",), "b2"),)), CHAIN, "'b1' runs only after 'b2'."),
        (Plan(decisions=(Recompute(("f2", "f1"), "b1"),)), CHAIN, "expected the nodes in execution order, each once."),
        (Plan(decisions=(Recompute(("f1", "f1"), "b1"),)), CHAIN, "expected the nodes in execution order, each once."),
        (
            Plan(decisions=(Recompute(("read1",), "grad_w1"),)),
            MLP,
            "'read1' (ReadVariableOp) is stateful and must not run twice.",
        ),
        (Plan(decisions=(Recompute(("x",), "f1"),)), CHAIN, "'x' (Placeholder) is in memory all the time."),
    ],
)
def test_check_says_what_does_not_fit(plan, graph, message):
    with pytest.raises(PlanError) as error:
        plan.check(graph)
    assert str(error.value) == f"{plan.decisions[0]} does not fit graph '{graph.name}': {message}"


FAR = parser.parse("""
graph far(%x) -> (%y) after(%store) {
  %w = Placeholder() {"store_of": "v", "tier": "host"} : (resource[])
  %spare = Placeholder() : (resource[])
  %x = Placeholder() : (float32[8])
  %a = Relu(%x) : (float32[8])
  %fetch = Fetch(%w) {"tier": "host", "variable": "v"} after(%a) : (float32[8])
  %b = Relu(%a) : (float32[8])
  %y = Add(%b, %fetch) : (float32[8])
  %store = Store!(%y, %w, %spare) {"tier": "host", "variable": "v"} after(%fetch) : ()
  %end = NoOp() : ()
}
""")
LATE = "expected what the copy needs <= after < before in execution order."


def test_copies_of_variables_beside_compute():
    ahead = Prefetch("fetch", "a", "fetch"), Prefetch("fetch", "b", "y", reason="hidden")
    plan = Plan(decisions=(Recompute(("fetch",), "y"), *ahead, WriteBack("store", "end"))).check(FAR)
    assert (plan.prefetches, plan.write_backs) == (ahead, plan.decisions[-1:])
    assert Plan.from_json(plan.to_json()) == plan
    assert str(plan).splitlines()[2:] == [
        "  fetch      fetch  after a",
        "  fetch      fetch  after b, before y  (hidden)",
        "  store      store  beside compute  gone before end",
    ]
    assert str(Plan(decisions=(WriteBack("store"),))).splitlines()[1] == "  store      store  beside compute"


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Prefetch("b", "a", "b"), "'b' (Relu) is no Fetch."),
        (Prefetch("fetch", "a", "y"), "the plan does not repeat 'fetch' once before 'y'."),
        (Prefetch("fetch", "x", "fetch"), LATE),
        (Prefetch("fetch", "b", "fetch"), LATE),
        (Prefetch("fetch", "z", "fetch"), "there is no node 'z'."),
        (WriteBack("fetch"), "'fetch' (Fetch) is no Store."),
        (WriteBack("store", "y"), "expected node < freed_before in execution order."),
        (WriteBack("store", "z"), "there is no node 'z'."),
    ],
)
def test_check_refuses_copies_of_variables_that_do_not_fit(decision, message):
    with pytest.raises(PlanError) as error:
        Plan(decisions=(decision,)).check(FAR)
    assert str(error.value) == f"{decision} does not fit graph 'far': {message}"


def test_check_refuses_two_decisions_about_one_copy_and_a_fetch_of_what_was_stored():
    for decision in (Prefetch("fetch", "a", "fetch"), WriteBack("store")):
        with pytest.raises(PlanError, match="another decision is about the same copy"):
            Plan(decisions=(decision, decision)).check(FAR)
    graph = parser.parse(
        str(FAR).replace("  %end =", '  %more = Fetch(%w) {"tier": "ps"} after(%store) : (float32[8])\n  %end =')
    )
    with pytest.raises(PlanError, match="'more' waits for a Store"):
        Plan(decisions=(Prefetch("more", "store", "more"),)).check(graph)


def test_a_copy_beside_compute_is_in_no_pair():
    plan = Plan(decisions=(SideBySide("fetch", "b"), Prefetch("fetch", "a", "fetch")))
    with pytest.raises(PlanError, match="one of the two is a copy that runs beside compute anyway"):
        plan.check(FAR)


def test_check_refuses_the_plan_of_another_graph():
    with pytest.raises(PlanError, match=CHAIN.fingerprint):
        PLAN.check(MLP)

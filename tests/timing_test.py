"""On a chain in which every node takes a second, and a MiB two to the host and one back."""

import model_data_test
import pytest
import testing

from graphswap import parser, rewrites
from graphswap.cost_model import CostModel, Link, Profile
from graphswap.plan import Place, Plan, Prefetch, Recompute, Swap, WriteBack
from graphswap.simulator import simulate
from graphswap.strategies import gaps, timing

MIB = 1 << 20
LINK = Link(MIB / 2, MIB, 0.0, overlaps=True)
CHAIN = testing.chain(6)
MODEL = testing.seconds_per_node(1.0, LINK)


def timed(names, budget_mib):
    problem = gaps.problem(CHAIN, MODEL)
    of_root = {problem.storages[gap.storage].root: index for index, gap in enumerate(problem.gaps)}
    decisions = problem.decide({of_root[name]: way for name, way in names.items()})
    return problem, *timing.timed(problem, decisions, budget_mib * MIB)


def long_gaps():
    problem = gaps.problem(CHAIN, MODEL)
    return [problem.storages[gap.storage].root for gap in problem.gaps if gap.end - gap.start > 5]


def test_with_room_nothing_waits():
    plain = simulate(CHAIN, Plan(order=gaps.problem(CHAIN, MODEL).order), MODEL)
    _, decisions, outline = timed({long_gaps()[0]: "swap"}, budget_mib=100)
    assert outline.seconds == plain.seconds
    (swap,) = decisions
    assert isinstance(swap, Swap)


def test_without_room_the_next_node_waits_for_the_copy():
    name = long_gaps()[0]
    problem, decisions, slow = timed({name: "swap"}, budget_mib=1)
    (swap,) = decisions
    place = problem.graph.position
    assert isinstance(swap, Swap)
    (gap,) = _gaps(problem, {name: "swap"})
    assert place[swap.freed_before] == problem.gaps[gap].start + 1
    assert slow.seconds > timed({name: "swap"}, budget_mib=100)[2].seconds


@pytest.mark.parametrize("budget_mib", range(6, 20))
def test_copies_in_flight_keep_the_budget(budget_mib):
    names = dict.fromkeys(long_gaps(), "swap")
    problem, decisions, outline = timed(names, budget_mib)
    tight = problem.outline(problem.decide(dict.fromkeys(_gaps(problem, names), "swap")))
    assert outline.peak_bytes <= max(budget_mib * MIB, tight.peak_bytes)
    assert outline.seconds <= tight.seconds
    problem.plan(decisions, "", budget_mib * MIB).check(problem.graph.replace(nodes=CHAIN.nodes))


def test_room_is_left_for_what_is_repeated_before_a_node():
    first, second = long_gaps()[:2]
    problem, decisions, outline = timed({first: "swap", second: "recompute"}, budget_mib=6)
    assert any(isinstance(decision, Recompute) for decision in decisions)
    tight = problem.outline(problem.decide(_gaps(problem, {first: "swap", second: "recompute"})))
    assert outline.peak_bytes <= max(6 * MIB, tight.peak_bytes)


def _gaps(problem, names):
    return {
        index: names[problem.storages[gap.storage].root]
        for index, gap in enumerate(problem.gaps)
        if problem.storages[gap.storage].root in names
    }


def test_a_copy_that_is_due_later_lets_others_go_first():
    """Of two values the one made first is due last: its copy must not keep the link from the other."""
    text = """
    graph g(%x) -> (%z) {
      %x = Placeholder() : (float32[512,512])
      %late = MatMul(%x, %x) : (float32[2048,512])
      %soon = MatMul(%x, %x) : (float32[1024,512])
      %a = MatMul(%soon, %soon) : (float32[512,512])
      %b = MatMul(%a, %a) : (float32[512,512])
      %c = MatMul(%b, %b) : (float32[512,512])
      %d = MatMul(%c, %c) : (float32[512,512])
      %e = MatMul(%d, %d) : (float32[3072,512])
      %f = MatMul(%e, %late) : (float32[512,512])
      %g = MatMul(%f, %f) : (float32[512,512])
      %h = MatMul(%g, %g) : (float32[512,512])
      %i = MatMul(%h, %h) : (float32[512,512])
      %j = MatMul(%i, %i) : (float32[512,512])
      %k = MatMul(%j, %j) : (float32[512,512])
      %l = MatMul(%k, %k) : (float32[512,512])
      %y = MatMul(%l, %soon) : (float32[512,512])
      %z = MatMul(%y, %late) : (float32[512,512])
    }
    """
    graph = parser.parse(text)
    problem = gaps.Gaps(graph, tuple(graph.position), MODEL)
    evicted = {problem.long_gap[problem.storage_of[name]]: "swap" for name in ("late", "soon")}
    swaps, _ = timing.timed(problem, problem.decide(evicted), 12 * MIB)
    starts = [(swap.value, swap.out_after) for swap in swaps if isinstance(swap, Swap)]
    assert starts == [("soon", "soon"), ("late", "soon")]


# A gibibyte a second takes a thousandth of a node's second for a MiB, a MiB a second as long as a node.
STEP = model_data_test.step(256)
FAR = rewrites.place(STEP, Plan(decisions=tuple(Place(name, "host") for name in model_data_test.ALL)))


def far(speed, budget_mib=100.0, overlaps=True):
    """The step with all variables in host memory, nodes of a second each: with its copies timed, and without."""
    model = testing.seconds_per_node(1.0, Link(speed * MIB, speed * MIB, 0.0, overlaps=overlaps))
    problem = gaps.problem(FAR, model)
    decisions, outline = timing.timed(problem, (), budget_mib * MIB)
    found = simulate(problem.graph, Plan(decisions=decisions).check(problem.graph), model)
    assert (found.seconds, found.peak_bytes) == (pytest.approx(outline.seconds), outline.peak_bytes)
    return problem, decisions, outline, problem.outline(())


def test_variables_come_and_go_beside_compute():
    """A quarter of a MiB takes a quarter of a second, and every node a second: all but the last store is hidden."""
    problem, decisions, outline, late = far(speed=1)
    copies = [node for node in FAR.nodes if node.op in ("Fetch", "Store")]
    assert late.seconds == len(problem.order) - 0.75 * len(copies)
    assert outline.seconds == len(problem.order) - len(copies) + 0.25
    prefetches = [decision for decision in decisions if isinstance(decision, Prefetch)]
    assert {decision.node for decision in prefetches} == {node.name for node in copies if node.op == "Fetch"}
    assert sum(isinstance(decision, WriteBack) for decision in decisions) == len(copies) - len(prefetches)


def test_without_room_no_more_memory_is_taken_than_by_copies_in_turn():
    _, _, outline, late = far(speed=1, budget_mib=0)
    assert outline.peak_bytes == late.peak_bytes


def test_nothing_waits_for_a_store_that_there_is_room_for():
    """The last node takes as long as ten copies, beside which the last store ends."""
    problem = far(speed=1)[0]
    last = problem.order[-1]
    model = CostModel(problem.cost_model.device, Profile("", {last: 10.0}, {}))
    problem = gaps.Gaps(problem.graph, problem.order, model)
    decisions, outline = timing.timed(problem, (), 100 * MIB)
    assert any(isinstance(decision, WriteBack) and not decision.freed_before for decision in decisions)
    assert outline.seconds == pytest.approx(float(problem.clock[-1]) + (0.25 if last.endswith("store") else 0.0))


def test_what_is_small_is_stored_beside_compute_too():
    text = """
    graph g(%x) -> () after(%first) {
      %w = Placeholder() {"store_of": "v", "tier": "host"} : (resource[])
      %spare = Placeholder() : (resource[])
      %x = Placeholder() : (float32[8])
      %a = Relu(%x) : (float32[8])
      %first = Store!(%a, %w, %spare) {"tier": "host", "variable": "v"} : ()
      %b = Relu(%a) : (float32[8])
      %c = Relu(%b) : (float32[8])
    }
    """
    graph = parser.parse(text)
    problem = gaps.Gaps(graph, tuple(graph.position), testing.seconds_per_node(1.0, Link(1e9, 1e9, 2.0, overlaps=True)))
    decisions, outline = timing.timed(problem, (), MIB)
    assert decisions == (WriteBack("first"),)
    assert timing.estimated(problem, (), problem.outline(()), MIB) == pytest.approx(6.0)
    assert (problem.outline(()).seconds, outline.seconds) == (pytest.approx(8.0), pytest.approx(6.0))


def test_on_a_slow_link_the_step_takes_as_long_as_the_link():
    """Weights are fetched first; then slots are, beside which new values leave."""
    problem, _, outline, late = far(speed=1 / 64)
    least = 16.0 * (model_data_test.LAYERS + 2 * model_data_test.LAYERS)
    assert least <= outline.seconds <= least + len(problem.order) < late.seconds


def test_over_a_link_in_the_way_nothing_is_moved():
    problem, decisions, outline, late = far(speed=1, overlaps=False)
    assert not decisions
    assert outline.seconds == late.seconds == float(problem.clock[-1])

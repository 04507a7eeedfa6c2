"""The laws: what holds for every graph and every plan."""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import testing
from hypothesis import given
from hypothesis import strategies as st

from graphswap import elementwise, ir, liveness, parser, rewrites
from graphswap.allocator import Allocator
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Place, Plan, SideBySide
from graphswap.simulator import NoRoom, simulate
from graphswap.strategies import STRATEGIES, budgets, gaps
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.variables import values

LARGE = 4096
"""A batch that makes activations worth a strategy's while."""

LINKS = {"host": Link(1e9, 2e9, 1e-6, overlaps=True), "disk": Link(1e8, 1e8, 1e-5)}
# Of no memory to speak of, so that the budget limits the allocator.
NETWORK = Link(1e9, 1e9, 1e-6, overlaps=True)
BESIDE_COMPUTE = CostModel(DeviceSpec(memory_bytes=1, links=LINKS, network=NETWORK))
IN_THE_WAY = CostModel(DeviceSpec(memory_bytes=1, links=LINKS, network=NETWORK), resident_bytes=1000, far_tier="disk")
COST_MODELS = st.sampled_from([BESIDE_COMPUTE, IN_THE_WAY])
RANDOMS = st.randoms(use_true_random=False)


# --- random graphs and plans ------------------------------------------------------------------------------------------


def with_places(rng: random.Random, graph: ir.Graph) -> ir.Graph:
    """The graph, some of its variables in a far tier."""
    chosen = [variable for variable in values(graph) if rng.random() < 0.7]
    places = (Place(v, rng.choice(["host", "disk"]), computes_there=rng.random() < 0.7) for v in chosen)
    return rewrites.place(graph, Plan(decisions=tuple(places)))


def with_exchanges(rng: random.Random, graph: ir.Graph) -> ir.Graph:
    """The step of one of several replicas, which exchange gradients block by block."""
    graph = testing.replicated(graph, rng.randint(2, 4))
    return rewrites.exchange(graph, testing.random_exchanges(rng, graph))


def graphs(max_layers: int, batch: int = 8) -> st.SearchStrategy[ir.Graph]:
    """Random steps, their variables on the device or not, of one replica or of several."""
    plain = testing.random_graphs(max_layers, batch)
    changed = [st.builds(change, RANDOMS, plain) for change in (with_places, with_exchanges)]
    return st.one_of(plain, *changed)


def random_order(rng: random.Random, graph: ir.Graph) -> tuple[str, ...]:
    waiting = {node.name: {*map(ir.producer, node.inputs), *node.control_inputs} for node in graph.nodes}
    order = []
    while waiting:
        ready = [name for name, before in waiting.items() if waiting.keys().isdisjoint(before)]
        order.append(rng.choice(ready))
        del waiting[order[-1]]
    return tuple(order)


def random_plan(rng: random.Random, graph: ir.Graph) -> Plan:
    """Any valid plan, however useless."""
    order = rng.choice([(), random_order(rng, graph)])
    names = order or tuple(graph.position)
    decisions = [
        rng.choice([testing.random_swap, testing.random_recompute])(rng, graph, names) for _ in range(rng.randint(1, 6))
    ]
    plan = Plan(order=order, decisions=(*decisions, *random_pairs(rng, graph, names)))
    ahead = testing.random_prefetches(rng, graph, names, plan)
    back = testing.random_write_backs(rng, graph, names)
    paired = {name for pair in plan.pairs for name in (pair.first, pair.second)}
    beside = [decision for decision in (*ahead, *back) if decision.node not in paired]
    return plan.replace(decisions=(*plan.decisions, *beside)).check(graph)


def random_pairs(rng: random.Random, graph: ir.Graph, names: tuple[str, ...]) -> list[SideBySide]:
    pairs: list[SideBySide] = []
    for first, second in itertools.pairwise(graph.by_name[name] for name in names):
        is_free = not any(node.stateful or node.op in ir.RESIDENT_OPS for node in (first, second))
        needs = (*map(ir.producer, second.inputs), *second.control_inputs)
        is_new = not pairs or pairs[-1].second != first.name
        if is_free and is_new and first.name not in needs and rng.random() < 0.5:
            pairs.append(SideBySide(first.name, second.name))
    return pairs


def evicting_plan(rng: random.Random, graph: ir.Graph, cost_model: CostModel) -> Plan:
    """What the strategies' common ground makes of random evictions."""
    problem = gaps.Gaps(graph, random_order(rng, graph), cost_model)
    evicted = {}
    anchors = {storage for storage in range(len(problem.storages)) if rng.random() < 0.2}
    for gap in range(len(problem.gaps)):
        action = rng.choice(["", "swap", gaps.SWAP_AGAIN, "recompute", gaps.AGAIN])
        if action in gaps.SWAPS or problem.recompute_seconds(gap, {}, anchors) < float("inf"):
            evicted[gap] = action
    evicted = {gap: action for gap, action in evicted.items() if action}
    late = {gap: problem.gaps[gap] for gap in evicted if rng.random() < 0.2}
    since = {gap: rng.randrange(item.start, item.end) for gap, item in late.items()}
    decisions = problem.decide(evicted, anchors, rng.randrange(60), since)
    return problem.plan(decisions, "random", 0).check(graph)


# --- what a graph computes --------------------------------------------------------------------------------------


_SUMS = {"AssignAddVariableOp": "AddV2", "AssignSubVariableOp": "Sub"}


class Outcome(NamedTuple):
    results: list[int]
    variables: dict[str, int]
    log: list[tuple[str, list[int]]]  # the stateful nodes that ran, and on what


def evaluate(graph: ir.Graph) -> Outcome:
    """Runs the graph on hashes in place of tensors: equal hashes, equal tensors."""
    values: dict[str, Any] = {}
    variables: dict[str, int] = {}
    log = []
    roots = liveness.roots(graph)
    for node in graph.nodes:
        inputs = [values[reference] for reference in node.inputs]
        outputs = [hash((node.like or node.name, index, *inputs)) for index in range(len(node.outputs))]
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            outputs = inputs
        elif node.op == "ConcatV2":
            outputs = [tuple(inputs[:-1])]
        elif node.op in (ir.ALL_REDUCE, ir.EXCHANGE):
            parts = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0],)
            outputs = [tuple(hash(("sum", part)) for part in parts), *outputs[1:]]
        elif node.op == ir.AWAIT:
            outputs = [inputs[0][0] if len(inputs[0]) == 1 else inputs[0]]
        elif node.op == "SplitV":
            outputs = [*inputs[0]]
        elif node.op == "ReadVariableOp":
            outputs = [variables.get(roots[node.inputs[0]], inputs[0])]
        elif node.op in liveness.ASSIGNS:
            variables[roots[node.inputs[0]]] = inputs[1]
        elif node.op in liveness.UPDATES:
            old = variables.get(roots[node.inputs[0]], inputs[0])
            variables[roots[node.inputs[0]]] = hash((_SUMS[node.op], old, inputs[1]))
        elif elementwise.computes(graph, node):
            outputs = [hash((node.op, *inputs))]
        elif node.op in (ir.FETCH, ir.VIEW):
            variable = node.inputs[0].removesuffix("/store")
            outputs = [variables.get(variable, hash((variable, 0)))]
        elif node.op == ir.STORE:
            variables[node.inputs[1].removesuffix("/store")] = inputs[0]
        elif node.op == ir.UPDATE:
            attrs: Any = dict(node.attrs)
            far = [handle.removesuffix("/store") for handle in ir.far_handles(node)]
            made = [*inputs[: attrs["values"]], *(variables.get(variable, hash((variable, 0))) for variable in far)]
            program = elementwise.Program.parse(attrs["program"])
            for op, sources in program.instructions:
                made.append(hash((op, *(made[source] for source in sources))))
            results = [made[register] for register in program.results]
            new = results[len(outputs) :]
            outputs = results[: len(outputs)]
            variables.update(zip((far[number] for number in attrs["stored"]), new, strict=True))
        values.update(zip(node.refs(), outputs, strict=True))
        if node.stateful:
            log.append((node.name, inputs))
    return Outcome([values[reference] for reference in graph.outputs], variables, log)


# --- rewriting --------------------------------------------------------------------------------------------------


def check_rewrite(graph: ir.Graph, plan: Plan, cost_model: CostModel) -> None:
    """Checks that the rewritten graph costs what the plan says, and computes what the graph computes."""
    rewritten = ir.verify(rewrites.rewrite(graph, plan))
    planned = simulate(graph, plan, cost_model)
    assert simulate(rewritten, Plan(), cost_model) == planned
    for limit in (None, planned.peak_bytes * 5 // 4, planned.peak_bytes):
        assert placed(rewritten, Plan(), cost_model, limit) == placed(graph, plan, cost_model, limit)
    outcome = evaluate(rewritten)
    assert outcome == evaluate(graph.replace(nodes=tuple(graph.by_name[name] for name in plan.order or graph.position)))
    assert (outcome.results, outcome.variables) == evaluate(graph)[:2]
    assert len({name for name, _ in outcome.log}) == len(outcome.log) == sum(node.stateful for node in graph.nodes)


def placed(graph: ir.Graph, plan: Plan, cost_model: CostModel, limit_bytes: int | None):
    try:
        return [
            simulate(graph, plan, cost_model, allocator=Allocator(limit_bytes), second_first=second_first)
            for second_first in ((), graph.by_name)
        ]
    except NoRoom as error:
        return error.after, error.nbytes, error.layout


@given(testing.random_graphs(5), RANDOMS)
def test_placing_changes_no_value(graph, rng):
    placed_graph = ir.verify(with_places(rng, graph))
    assert parser.parse(str(placed_graph)) == placed_graph
    assert evaluate(placed_graph)[:2] == evaluate(graph)[:2]
    other_order = random_order(rng, placed_graph)
    reordered = placed_graph.replace(nodes=tuple(placed_graph.by_name[name] for name in other_order))
    assert evaluate(reordered)[:2] == evaluate(graph)[:2]


@given(testing.random_graphs(5), RANDOMS)
def test_exchanging_in_blocks_changes_no_value(graph, rng):
    graph = testing.replicated(graph, 3)
    exchanged = ir.verify(rewrites.exchange(graph, testing.random_exchanges(rng, graph)))
    assert parser.parse(str(exchanged)) == exchanged
    other_order = random_order(rng, exchanged)
    reordered = exchanged.replace(nodes=tuple(exchanged.by_name[name] for name in other_order))
    for one in (exchanged, reordered):
        assert evaluate(one)[:2] == evaluate(graph)[:2]


@given(graphs(5), RANDOMS, COST_MODELS)
def test_rewriting_does_what_the_plan_says(graph, rng, cost_model):
    check_rewrite(graph, random_plan(rng, graph), cost_model)


@given(graphs(16, batch=LARGE), RANDOMS, COST_MODELS)
def test_rewriting_does_what_evictions_say(graph, rng, cost_model):
    check_rewrite(graph, evicting_plan(rng, graph, cost_model), cost_model)


@given(graphs(16, batch=LARGE), RANDOMS, COST_MODELS)
def test_no_evictions_get_below_the_memory_bound(graph, rng, cost_model):
    plan = evicting_plan(rng, graph, cost_model)
    least = budgets.least_peak(gaps.Gaps(graph, plan.order, cost_model))
    assert least.nbytes <= simulate(graph, plan, cost_model).peak_bytes


@given(testing.random_graphs())
def test_an_empty_plan_returns_the_same_object(graph):
    assert rewrites.rewrite(graph, Plan(strategy="auto", memory_budget=1)) is graph


# --- strategies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
@given(graph=graphs(16, batch=LARGE), cost_model=COST_MODELS, fraction=st.floats(0.3, 1.2))
def test_a_plan_keeps_the_budget_or_an_error_says_that_none_does(name, graph, cost_model, fraction):
    budget = int(simulate(graph, Plan(), cost_model).peak_bytes * fraction)
    try:
        plan = testing.brief(STRATEGIES[name]).plan(graph, cost_model, budget)
    except InfeasibleBudgetError as error:
        assert error.memory_budget == budget
        assert error.node in graph.by_name
        return
    assert plan.check(graph).memory_budget == budget
    assert Plan.from_json(plan.to_json()) == plan
    timeline = simulate(graph, plan, cost_model, allocator=Allocator(budget))
    assert timeline.peak_bytes <= timeline.allocated_peak_bytes <= budget
    check_rewrite(graph, plan, cost_model)


@pytest.mark.parametrize("seed", range(14))
def test_more_budget_never_means_a_slower_plan(seed):
    rng = random.Random(seed)
    graph = testing.random_graph(rng, rng.randint(1, 8), LARGE)
    peak = simulate(graph, Plan(), BESIDE_COMPUTE).peak_bytes
    # Without an allocator: what it loses to holes hangs on the plan, and more room may mean worse ones.
    model = CostModel(DeviceSpec(links=LINKS))
    seconds = []
    for percent in range(50, 125, 5):
        try:
            plan = STRATEGIES["auto"].plan(graph, model, peak * percent // 100)
        except InfeasibleBudgetError:
            seconds.append(float("inf"))
        else:
            seconds.append(simulate(graph, plan, model).seconds)
    assert seconds == sorted(seconds, reverse=True)

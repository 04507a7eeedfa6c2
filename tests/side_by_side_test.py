import dataclasses

import pytest
import testing
from hypothesis import given
from hypothesis import strategies as st

from graphswap import allocator, ir, parser, rewrites
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.plan import Plan, Recompute, SideBySide, Swap
from graphswap.simulator import NoRoom, simulate
from graphswap.strategies import STRATEGIES, side_by_side
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
SLOW = CostModel(DeviceSpec(memory_bytes=1, launch_seconds=1.0), Profile("", {}, {}))
LAYER = parser.parse("""
graph layer(%x, %w, %gradient) -> (%grad_w, %grad_x) {
  %x = Placeholder() : (float32[512,512])
  %w = Placeholder() : (float32[512,512])
  %gradient = Placeholder() : (float32[512,512])
  %grad_w = MatMul(%x, %gradient) : (float32[512,512])
  %scaled = Relu(%w) : (float32[512,512])
  %grad_x = MatMul(%gradient, %scaled) : (float32[512,512])
  %transposed = Op(%x) : (float32[512,512])
  %other = MatMul(%gradient, %transposed) : (float32[512,512])
  %last = MatMul(%other, %w) : (float32[512,512])
}
""")


def test_a_product_gets_the_next_independent_one():
    paired = side_by_side.pair(LAYER, Plan(), SLOW, 100 * MIB).check(LAYER)
    assert paired.pairs == (SideBySide("grad_w", "grad_x"),)  # last needs other


def test_the_second_moves_up_to_the_first_with_what_it_needs():
    paired = side_by_side.pair(LAYER, Plan(), SLOW, 100 * MIB)
    assert paired.order == ("x", "w", "gradient", "scaled", "grad_w", "grad_x", "transposed", "other", "last")


def test_what_needs_a_heavy_node_between_is_no_partner():
    order = ("x", "w", "gradient", "transposed", "scaled", "other", "last", "grad_w", "grad_x")
    paired = side_by_side.pair(LAYER, Plan(order=order), SLOW, 100 * MIB).check(LAYER)
    assert paired.pairs == (SideBySide("other", "grad_w"), SideBySide("last", "grad_x"))


ORDER = ("x", "w", "gradient", "scaled", "transposed", "grad_w", "grad_x", "other", "last")
PAIR = SideBySide("grad_w", "grad_x")


def test_short_nodes_run_alone():
    quick = CostModel(DeviceSpec(launch_seconds=1e-4), Profile("", {}, {}))
    assert side_by_side.pair(LAYER, Plan(), quick, 100 * MIB) == Plan()


@pytest.mark.parametrize("budget_mib", [6, 7, 8, 9])
def test_only_what_fits_is_paired(budget_mib):
    plan = Plan(order=ORDER)
    paired = side_by_side.pair(LAYER, plan, SLOW, budget_mib * MIB)
    peaks = [
        simulate(LAYER, paired, SLOW, allocator=allocator.Allocator(None), second_first=turn).allocated_peak_bytes
        for turn in ((), LAYER.by_name)
    ]
    alone = simulate(LAYER, plan, SLOW).peak_bytes
    assert (max(peaks) <= budget_mib * MIB) or (paired == plan and alone > budget_mib * MIB)
    assert (PAIR in paired.pairs) == (budget_mib >= 7)


@pytest.mark.parametrize(
    ("decision", "moved"),
    [
        (Swap("x", "grad_w", "other", "other", "last"), Swap("x", "grad_x", "other", "other", "last")),
        (Swap("x", "grad_w", "grad_x", "other", "last"), Swap("x", "grad_x", "other", "other", "last")),
        (Swap("w", "scaled", "transposed", "grad_w", "last"), Swap("w", "scaled", "transposed", "transposed", "last")),
        (
            Swap("w", "scaled", "transposed", "grad_w", "grad_x"),
            Swap("w", "scaled", "transposed", "transposed", "grad_w"),
        ),
        (Recompute(("scaled",), before="grad_x"), Recompute(("scaled",), before="grad_w")),
    ],
)
def test_what_stands_between_two_moves_out(decision, moved):
    plan = Plan(order=ORDER, decisions=(decision,)).check(LAYER)
    paired = side_by_side.pair(LAYER, plan, SLOW, 100 * MIB).check(LAYER)
    assert paired.decisions[0] == moved
    assert PAIR in paired.pairs
    rewritten = rewrites.rewrite(LAYER, paired)
    assert simulate(rewritten, Plan(), SLOW) == simulate(LAYER, paired, SLOW)


def test_what_can_t_move_out_keeps_two_apart():
    swap = Swap("x", out_after="grad_w", freed_before="grad_x", in_after="grad_w", in_before="grad_x")
    plan = Plan(order=ORDER, decisions=(swap,)).check(LAYER)
    assert PAIR not in side_by_side.pair(LAYER, plan, SLOW, 100 * MIB).check(LAYER).pairs


def test_a_decision_that_relied_on_a_pair_that_is_gone_is_a_fault():
    swap = Swap("x", out_after="grad_x", freed_before="grad_x", in_after="other", in_before="last")
    assert side_by_side._fault(LAYER, Plan(order=ORDER, decisions=(PAIR,)), SLOW, 100 * MIB) is None
    assert side_by_side._fault(LAYER, Plan(order=ORDER, decisions=(PAIR, swap)), SLOW, 100 * MIB) == ""


def test_the_last_node_may_be_the_second_of_a_pair():
    graph = parser.parse("""
    graph g(%x, %w) -> (%first, %second) {
      %x = Placeholder() : (float32[512,512])
      %w = Placeholder() : (float32[512,512])
      %v = Relu(%x) : (float32[512,512])
      %first = MatMul(%x, %v) : (float32[512,512])
      %t = Relu(%w) : (float32[512,512])
      %u = Relu(%t) : (float32[512,512])
      %second = MatMul(%u, %v) : (float32[512,512])
    }
    """)
    swap = Swap("v", out_after="first", freed_before="t", in_after="t", in_before="second")
    plan = Plan(decisions=(swap,)).check(graph)
    assert side_by_side.pair(graph, plan, SLOW, 100 * MIB).check(graph).pairs == ()


def test_a_constant_between_two_is_in_nobody_s_way():
    graph = parser.parse("""
    graph g(%x) -> (%first, %second) {
      %x = Placeholder() : (float32[512,512])
      %first = MatMul(%x, %x) : (float32[512,512])
      %sizes = Const() : (int32[2])
      %other = Reshape(%x, %sizes) : (float32[512,512])
      %second = MatMul(%other, %x) : (float32[512,512])
    }
    """)
    paired = side_by_side.pair(graph, Plan(), SLOW, 100 * MIB).check(graph)
    assert paired.pairs == (SideBySide("first", "second"),)
    rewrites.rewrite(graph, paired)


@given(graph=testing.random_graphs(12, batch=4096), fraction=st.floats(0.4, 1.1))
def test_paired_plans_keep_the_budget(graph: ir.Graph, fraction: float):
    link = Link(1e9, 1e9, 0.0)
    device = DeviceSpec(memory_bytes=1, launch_seconds=1e-3, links={"host": link, "disk": link}, runs_pairs=True)
    cost_model = CostModel(device)
    alone = dataclasses.replace(cost_model, device=dataclasses.replace(device, runs_pairs=False))
    budget = int(simulate(graph, Plan(), cost_model).peak_bytes * fraction)
    try:
        plan = STRATEGIES["auto"].plan(graph, cost_model, budget)
    except InfeasibleBudgetError:
        with pytest.raises(InfeasibleBudgetError):
            STRATEGIES["auto"].plan(graph, alone, budget)
        return
    plan.check(graph)
    for turn in ((), graph.by_name):
        try:
            room = allocator.Allocator(budget)
            assert simulate(graph, plan, cost_model, allocator=room, second_first=turn).allocated_peak_bytes <= budget
        except NoRoom as error:
            pytest.fail(f"{error} {plan.pairs}")

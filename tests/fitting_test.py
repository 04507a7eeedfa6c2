import functools
import math

import pytest
import testing

from graphswap import parser
from graphswap.cost_model import Link
from graphswap.plan import Recompute, Swap
from graphswap.simulator import NoRoom
from graphswap.strategies import fitting, gaps, order
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
AT_ONCE = Link(math.inf, math.inf, 0.0)
MODEL = testing.seconds_per_node(1.0, AT_ONCE)
CHAIN = gaps.problem(testing.chain(4), MODEL)  # 7 MiB; f1 and f2 may go
F1, F2 = (CHAIN.long_gap[CHAIN.storage_of[value]] for value in ("f1", "f2"))


def evict(evicted, target, problem=CHAIN):
    del target
    return fitting.evictions(problem, evicted)


def attempt(**actions):
    return functools.partial(evict, {CHAIN.long_gap[CHAIN.storage_of[value]]: how for value, how in actions.items()})


def test_the_fastest_attempt_that_fits_is_taken():
    attempts = [attempt(f1="recompute", f2="recompute"), attempt(), attempt(f2="recompute"), attempt(f1="recompute")]
    plan = fitting.fit(CHAIN, attempts, 6 * MIB, "s")
    assert plan.decisions == (Recompute(("f2",), before="b2"),)
    assert (plan.strategy, plan.memory_budget, plan.order) == ("s", 6 * MIB, CHAIN.order)
    assert fitting.fit(CHAIN, attempts, 7 * MIB, "s").decisions == ()


def test_no_attempt_fits():
    with pytest.raises(InfeasibleBudgetError) as error:
        fitting.fit(CHAIN, [attempt(f1="swap"), attempt(), attempt(f1="swap", f2="swap")], 4 * MIB, "s")
    assert (error.value.memory_budget, error.value.smallest_bytes, error.value.node) == (4 * MIB, 5 * MIB, "b4")


def test_no_attempt_is_started_when_the_time_is_up_and_a_plan_is_found():
    attempts = [attempt(f1="recompute", f2="recompute"), attempt(f2="recompute")]
    plan = fitting.fit(CHAIN, attempts, 6 * MIB, "s", planning_seconds=0.0)
    assert plan.decisions == (Recompute(("f1", "f2"), before="b2"),)
    # But one plan is looked for however long it takes.
    assert fitting.fit(CHAIN, [attempt(), *attempts], 6 * MIB, "s", planning_seconds=0.0) == plan
    with pytest.raises(InfeasibleBudgetError):  # unless somebody has one
        fitting.fit(CHAIN, attempts, 6 * MIB, "s", planning_seconds=0.0, gives_up=True)


# When c is made, free chunks of one MiB lie on both sides of b, and c takes two.
HOLES = parser.parse("""
graph holes() -> () {
  %a = Op() : (float32[512,512])
  %b = Op(%a) : (float32[512,512])
  %use_a = Op(%a) : ()
  %c = Op() : (float32[512,1024])
  %use_c = Op(%c) : ()
  %use_b = Op(%b) : ()
}
""")


def holes(link=AT_ONCE):
    model = testing.seconds_per_node(1.0, link, memory_bytes=1)  # so that the budget limits the allocator
    return gaps.Gaps(HOLES, order.traced(HOLES), model)


@pytest.mark.parametrize(
    ("link", "actions", "decisions"),
    [
        (AT_ONCE, fitting.BOTH, (Swap("b", "b", "use_a", "use_c", "use_b", is_synchronous=True),)),
        (Link(1.0, 1.0), fitting.BOTH, (Recompute(("a", "b"), before="use_b"),)),
        (Link(1.0, 1.0), ("swap",), (Swap("b", "b", "use_a", "use_c", "use_b", is_synchronous=True),)),
        (AT_ONCE, ("recompute",), (Recompute(("a", "b"), before="use_b"),)),
    ],
)
def test_a_window_is_cleared_where_a_request_finds_no_chunk(link, actions, decisions):
    problem = holes(link)
    nothing = functools.partial(evict, {}, problem=problem)
    assert nothing(0).outline.peak_bytes == 3 * MIB
    with pytest.raises(NoRoom):
        problem.place((), 3 * MIB)
    plan = fitting.fit(problem, [nothing], 3 * MIB, "s", actions)
    assert plan.decisions == decisions
    assert problem.place(plan.decisions, 3 * MIB).allocated_peak_bytes == 3 * MIB
    assert fitting.fit(problem, [nothing], 4 * MIB, "s", actions).decisions == ()


@pytest.mark.parametrize(
    ("layout", "nbytes", "cleared"),
    [
        ([(0, 4, "f1"), (4, 6, "f2"), (10, 2, None)], 8, ["f2"]),  # f1 may stay
        ([(0, 4, "f1"), (4, 6, "f2"), (10, 2, None)], 12, ["f1", "f2"]),
        ([(0, 4, "f1"), (4, 6, "x"), (10, 2, None)], 8, []),  # arguments stay
        ([(0, 4, "f1"), (4, 6, ""), (10, 2, None)], 8, []),  # so does what the graph does not show
        ([(0, 4, "f1"), (4, 6, "b4"), (10, 2, None)], 8, []),  # and what is in use
        ([(0, 6, None), (90, 4, "f1"), (94, 2, None)], 8, []),  # regions lie apart
    ],
)
def test_the_cheapest_window_is_cleared(layout, nbytes, cleared):
    state = fitting.evictions(CHAIN, {})
    error = NoRoom(CHAIN.order[CHAIN.graph.position["b4"] - 1], nbytes, layout)
    window = fitting._window(CHAIN, state, error, ("recompute",))
    assert [CHAIN.storages[CHAIN.gaps[gap].storage].root for gap in window] == cleared


def test_the_target_is_lowered_where_no_window_can_be_cleared():
    problem = holes()
    targets = []

    def nothing(target):
        targets.append(target)
        return fitting.evictions(problem, {})

    with pytest.raises(InfeasibleBudgetError) as error:
        fitting.fit(problem, [nothing], 3 * MIB, "s", actions=())
    assert targets == [3 * MIB, 3 * MIB * 0.98]
    assert str(error.value) == (
        "memory_budget=3.0MiB has room for the smallest reachable peak, 3.0MiB, set by node 'c', but not for what the "
        "device's allocator loses beside it. No plan of its class (docs/limits.md) has a peak below 2.0MiB. "
        "Raise memory_budget or reduce the batch size."
    )


def test_an_attempt_that_does_not_go_by_the_target_is_placed_once(monkeypatch):
    problem = holes()
    budgets = []
    place = problem.place
    monkeypatch.setattr(problem, "place", lambda decisions, budget: budgets.append(budget) or place(decisions, budget))
    with pytest.raises(InfeasibleBudgetError):
        fitting.fit(problem, [functools.partial(evict, {}, problem=problem)], 7 * MIB // 2, "s", actions=())
    assert budgets == [7 * MIB // 2]


def test_offer_names_the_cheapest_way():
    problem = gaps.problem(testing.chain(4), testing.seconds_per_node(1.0, Link(MIB, MIB, 0.25)))
    gap = problem.long_gap[problem.storage_of["f2"]]
    f1, f2 = (problem.storage_of[value] for value in ("f1", "f2"))
    offer = functools.partial(fitting.offer, problem, gap)
    assert offer({}, (), fitting.BOTH) == (1.0, gap, "recompute")
    assert offer({}, (), ("swap",)) == (2.5, gap, "swap")
    # Anchors are not recomputed, and what recomputing reads may have to be recomputed too.
    assert offer({}, {f2}, fitting.BOTH) == (2.5, gap, "swap")
    assert offer({problem.long_gap[f1]: "recompute"}, (), fitting.BOTH) == (2.0, gap, "recompute")
    assert offer({}, (), ())[::2] == (math.inf, "")

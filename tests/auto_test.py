import pytest
import testing

from graphswap.cost_model import Link
from graphswap.simulator import simulate
from graphswap.strategies import STRATEGIES
from graphswap.strategies.auto import Auto
from graphswap.strategies.base import InfeasibleBudgetError

MIB = 1 << 20
CHAIN = testing.chain(8)
MODEL = testing.seconds_per_node(1.0, Link(MIB, MIB))
OTHERS = {name: strategy for name, strategy in STRATEGIES.items() if name != "auto"}


def outcome(strategy, budget):
    try:
        return simulate(CHAIN, strategy.plan(CHAIN, MODEL, budget), MODEL).seconds
    except InfeasibleBudgetError as error:
        return error


@pytest.mark.parametrize("budget_mib", range(5, 12))
def test_the_fastest_plan_is_taken(budget_mib):
    outcomes = [outcome(strategy, budget_mib * MIB) for strategy in OTHERS.values()]
    assert outcome(Auto(), budget_mib * MIB) == min(seconds for seconds in outcomes if isinstance(seconds, float))


def test_the_error_names_the_smallest_peak_of_all():
    errors = [outcome(strategy, 4 * MIB) for strategy in (Auto(), *OTHERS.values())]
    smallest, *others = (error.smallest_bytes for error in errors if isinstance(error, InfeasibleBudgetError))
    assert smallest == min(others) < max(others)


def test_a_plan_is_found_however_short_the_time():
    plan = Auto(planning_seconds=0.0).plan(CHAIN, MODEL, 5 * MIB)
    assert simulate(CHAIN, plan, MODEL).peak_bytes <= 5 * MIB

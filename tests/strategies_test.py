"""What all strategies have in common; tests/laws_test.py holds them to the budget on random graphs."""

import pytest
import testing

from graphswap.cost_model import Link
from graphswap.simulator import simulate
from graphswap.strategies import STRATEGIES
from graphswap.strategies.base import InfeasibleBudgetError, Placing, Strategy

MIB = 1 << 20
CHAIN = testing.chain(8)  # 11 MiB
OF_ACTIVATIONS = [name for name, strategy in STRATEGIES.items() if not isinstance(strategy, Placing)]
MODEL = testing.seconds_per_node(1.0, Link(MIB, MIB, 0.25))


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_a_strategy(name):
    strategy = STRATEGIES[name]
    assert isinstance(strategy, Strategy)
    plan = strategy.plan(CHAIN, MODEL, 9 * MIB)
    assert plan.decisions
    assert plan.strategy in ({name} if name != "auto" else STRATEGIES)
    assert plan.memory_budget == 9 * MIB
    assert plan.fingerprint == CHAIN.fingerprint
    assert simulate(CHAIN, plan, MODEL).peak_bytes <= 9 * MIB
    assert strategy.plan(CHAIN, MODEL, 9 * MIB) == plan


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - OF_ACTIVATIONS))
def test_a_strategy_for_model_data_checkpoints_activations_only_where_they_have_no_room(name):
    assert isinstance(STRATEGIES[name], Placing)
    assert STRATEGIES[name].plan(CHAIN, MODEL, 11 * MIB).decisions == ()
    plan = STRATEGIES[name].plan(CHAIN, MODEL, 9 * MIB)
    assert plan.recomputes and not plan.swaps
    assert simulate(CHAIN, plan, MODEL).peak_bytes <= 9 * MIB


@pytest.mark.parametrize("name", ["auto", "greedy", "karma"])
def test_a_step_that_fits_is_left_alone(name):
    assert STRATEGIES[name].plan(CHAIN, MODEL, 11 * MIB).decisions == ()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_that_is_too_small(name):
    with pytest.raises(InfeasibleBudgetError) as error:
        STRATEGIES[name].plan(CHAIN, MODEL, 4 * MIB)
    assert error.value.memory_budget == 4 * MIB < error.value.smallest_bytes
    # That peak is reached by the strategy, and by the node that is named.
    STRATEGIES[name].plan(CHAIN, MODEL, error.value.smallest_bytes)


def test_the_error_says_what_to_do():
    with pytest.raises(InfeasibleBudgetError) as error:
        STRATEGIES["swap_all"].plan(CHAIN, MODEL, 4 * MIB - 1)
    assert isinstance(error.value, ValueError)
    assert str(error.value) == (
        "memory_budget=4.0MiB is below the smallest reachable peak, 5.0MiB, set by node 'b8'. "
        "No plan of its class (docs/limits.md) has a peak below 5.0MiB. "
        "Raise memory_budget to at least 5.0MiB or reduce the batch size."
    )

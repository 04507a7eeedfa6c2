"""When a plan is made anew, when it stays, and what the report says about it."""

import dataclasses

import pytest

from graphswap.replanning import MOST_ROUNDS, Observation, Round, Verdict, is_better, judge, reserve

MIB = 1 << 20
SEEN = Observation(1.0, (9.0, 1.0, 1.0, 1.0), 100 * MIB, 98 * MIB, 97 * MIB)


def seen(**changes):
    return dataclasses.replace(SEEN, **changes)


# --- go on or stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted", [0.901, 1.0, 1.099])
def test_a_plan_that_is_within_ten_percent_stays(predicted):
    assert judge(seen(predicted_seconds=predicted), 0) is Verdict.KEEP


@pytest.mark.parametrize("predicted", [0.0, 0.1, 0.899, 1.101, 10.0])
def test_a_plan_that_is_off_by_more_is_made_anew(predicted):
    assert judge(seen(predicted_seconds=predicted), 0) is Verdict.REPLAN


def test_the_first_step_does_not_count_and_three_more_are_waited_for():
    steps = (9.0, 5.0, 5.0, 5.0)
    for count in range(4):
        assert judge(seen(step_seconds=steps[:count]), 0) is Verdict.WAIT
    assert judge(seen(step_seconds=steps), 0) is Verdict.REPLAN
    assert judge(seen(predicted_seconds=5.0, step_seconds=steps), 0) is Verdict.KEEP


def test_a_single_slow_step_is_no_reason():
    assert judge(seen(step_seconds=(9.0, 1.0, 8.0, 1.0)), 0) is Verdict.KEEP


def test_the_steps_of_a_plan_that_stayed_long_are_the_last_ones():
    assert seen(step_seconds=(9.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.1)).seconds == 1.0


@pytest.mark.parametrize("rounds", range(MOST_ROUNDS + 3))
def test_there_are_three_rounds_at_most(rounds):
    wrong = seen(predicted_seconds=9.0, peak_bytes=200 * MIB)
    assert (judge(wrong, rounds) is Verdict.REPLAN) == (rounds < 3)


# --- memory -----------------------------------------------------------------------------------------------------


def test_a_peak_above_the_budget_is_not_waited_with():
    assert judge(seen(step_seconds=(9.0,), peak_bytes=100 * MIB + 1), 0) is Verdict.REPLAN
    assert judge(seen(step_seconds=(9.0,), peak_bytes=100 * MIB), 0) is Verdict.WAIT


@pytest.mark.parametrize("changes", [{"peak_bytes": None}, {"memory_budget": 0, "peak_bytes": 200 * MIB}])
def test_a_peak_that_nobody_counted_or_bounded_is_no_reason(changes):
    assert judge(seen(**changes), 0) is Verdict.KEEP


def test_what_steps_took_beyond_their_prediction_is_reserved():
    above = seen(peak_bytes=103 * MIB)
    assert above.excess_bytes == 5 * MIB
    assert reserve(above, 100 * MIB) == 5 * MIB
    assert reserve(above, 99 * MIB) == 4 * MIB  # one of them was left free already
    assert reserve(above, 90 * MIB) == 0


def test_nothing_is_reserved_for_steps_that_kept_to_their_prediction():
    assert reserve(SEEN, 100 * MIB) == 0
    assert reserve(seen(peak_bytes=None), 100 * MIB) == 0
    assert reserve(seen(memory_budget=0, peak_bytes=200 * MIB), 0) == 0


# --- the old plan or the new one ----------------------------------------------------------------------------------


def test_a_new_plan_must_be_worth_a_trace():
    assert is_better(SEEN, 1.0, 0.94)
    assert not is_better(SEEN, 1.0, 0.96)
    assert not is_better(SEEN, 1.0, 1.0)
    assert not is_better(SEEN, 1.0, 2.0)


def test_a_plan_that_broke_the_budget_goes_even_if_the_new_one_is_slower():
    assert is_better(seen(peak_bytes=101 * MIB), 1.0, 2.0)


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_round_tells_what_was_predicted_measured_and_changed():
    assert str(Round(SEEN)) == "1.000 s predicted, 1.000 s measured: as predicted"
    above = seen(predicted_seconds=2.0, peak_bytes=100 * MIB)
    assert str(Round(above, 1.25, 0.75, "the new plan is taken")) == (
        "2.000 s predicted, 1.000 s measured, peak 2.0MiB above prediction; by costs measured within the step 1.250 s, "
        "with a new plan 0.750 s: the new plan is taken"
    )

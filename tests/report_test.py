"""What the report says before, during and after training."""

import numpy as np
import pytest

from graphswap import bound, parser, rewrites
from graphswap.cost_model import CostModel
from graphswap.plan import Declined, Place, Plan, Recompute, Swap
from graphswap.plan_file import PlanFile
from graphswap.replanning import Observation, Round
from graphswap.report import Report, StepReport, report

MIB = 1 << 20


def step_report(**changes):
    swap = Swap("conv", out_after="relu", freed_before="pool", in_after="loss", in_before="relu_grad")
    decisions = (swap, Recompute(("norm", "relu"), before="norm_grad"))
    declined = (Declined("bias", "too small"),)
    plan = Plan(decisions=decisions, declined=declined, strategy="karma", memory_budget=97 * MIB)
    facts = {
        "name": "train_step",
        "nodes": 12,
        "memory_budget": 100 * MIB,
        "plan": plan,
        "status": "rewritten",
        "plain_peak_bytes": 200 * MIB,
        "predicted_peak_bytes": 96 * MIB,
        "plain_seconds": 0.5,
        "predicted_seconds": 0.75,
        "swapped_bytes": 50 * MIB,
        "recomputed_seconds": 0.125,
        "breakdown": {"import": 0.25, "plan": 1.5},
    }
    return StepReport(**{**facts, **changes})


def test_a_bound_and_how_far_the_plan_lies_above_it():
    builder = bound.Builder()
    builder.row([(builder.column(cost=0.5), 100.0 * MIB)], lower=122.0 * MIB, share=1.0)
    certificate = bound.certificate(builder.program(constant=0.5), np.array([0.005 / MIB]))
    step = step_report(plan=Plan(strategy="joint", memory_budget=97 * MIB, certificate=certificate))
    (line,) = [line for line in str(step).splitlines() if line.startswith("  bound")]
    assert line == (
        "  bound   no plan of its class (docs/limits.md) takes less than 0.625 s in this budget; "
        "predicted is 20.0 % above"
    )


def test_a_bound_of_nothing_is_no_hundred_percent():
    certificate = bound.certificate(bound.Builder().program(constant=0.0), np.zeros(0))
    step = step_report(plan=Plan(memory_budget=MIB, certificate=certificate))
    (line,) = [line for line in str(step).splitlines() if line.startswith("  bound")]
    assert line.endswith("takes less than 0.000 s in this budget")


STEP = parser.parse(
    """
    graph step(%x, %w, %m) -> (%z) after(%assign_m) {
      %x = Placeholder() : (float32[8,512])
      %w = Placeholder() {"held_bytes": [1048576]} : (resource[])
      %m = Placeholder() {"held_bytes": [1048576]} : (resource[])
      %read_w = ReadVariableOp!(%w) : (float32[512,512])
      %y = MatMul(%x, %read_w) : (float32[8,512])
      %z = MatMul(%y, %read_w) : (float32[8,512])
      %grad = MatMul(%x, %z) : (float32[512,512])
      %assign_m = AssignAddVariableOp!(%m, %grad) : ()
    }
    """
)


@pytest.mark.parametrize(
    ("tiers", "away", "far"),
    [
        (
            ("host", "disk"),
            "2 variables (1.0MiB on host, 1.0MiB on disk): 3.0MiB fetched and 1.0MiB stored per step",
            "host memory: 1.0MiB planned{}; disk: 5.0MiB planned{}, old values and new ones",
        ),
        (
            ("host", "host"),
            "2 variables (2.0MiB on host): 3.0MiB fetched and 1.0MiB stored per step",
            "host memory: 3.0MiB planned{}; disk: 3.0MiB planned{}, old values and new ones",
        ),
    ],
)
def test_what_is_in_which_tier_and_what_it_takes(tiers, away, far):
    """A variable that is updated counts twice; a fetch that is repeated moves twice; a state takes 3 MiB on disk."""
    places = tuple(map(Place, "wm", tiers))
    graph = rewrites.place(STEP, Plan(decisions=places))
    plan = Plan(decisions=(*places, Recompute(("w/fetch",), before="z")))
    step = step_report(plan=plan, file=PlanFile(plan, graph, CostModel()), state_bytes=3 * MIB)
    assert f"  away    {away}" in str(step).splitlines()
    assert f"  far     {far.format('', '')}" in str(step).splitlines()
    step.measured_seconds.append(1.0)
    step.measured_host_bytes, step.measured_disk_bytes = 7 * MIB, 9 * MIB
    assert f"  far     {far.format(', 7.0MiB measured', ', 9.0MiB measured')}" in str(step).splitlines()


def test_what_is_updated_where_it_is_does_not_travel():
    """Its gradient does. It counts twice, too."""
    graph = rewrites.place(STEP, Plan(decisions=(Place("m", computes_there=True),)))
    plan = Plan(decisions=(Place("m", computes_there=True),))
    step = step_report(plan=plan, file=PlanFile(plan, graph, CostModel()))
    away = "1 variables (1.0MiB on host; 1 updated there): 0B fetched and 1.0MiB stored per step"
    assert f"  away    {away}" in str(step).splitlines()
    assert "  far     host memory: 2.0MiB planned, old values and new ones" in str(step).splitlines()


def test_a_step_with_all_variables_on_the_device_says_nothing_of_far_tiers():
    step = step_report(file=PlanFile(Plan(), STEP, CostModel()))
    assert step.moved_bytes == (0, 0)
    assert not any(line.split()[0] in ("away", "far") for line in str(step).splitlines())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"budget_word": "auto"}, ", what the device has"),
        ({"budget_word": "min"}, ", the smallest that a plan was found for"),
        (
            {"budget_word": "free", "free_bound_bytes": 90 * MIB},
            ", the smallest found that takes no longer (by 0.1% at most); none below 90.0MiB does",
        ),
    ],
)
def test_which_budget_was_chosen(changes, text):
    step = step_report(memory_bound_bytes=60 * MIB, **changes)
    assert f"  budget  100.0MiB{text}" in str(step).splitlines()
    assert "  least   no plan of its class (docs/limits.md) has a peak below 60.0MiB" in str(step).splitlines()


def test_a_planned_step_before_it_runs():
    assert str(step_report()).splitlines() == [
        "train_step (12 nodes): rewritten",
        "  budget  100.0MiB",
        "  peak    plain 200.0MiB predicted, planned 96.0MiB predicted, measured not counted by this device",
        "  step    plain 0.500 s predicted, planned 0.750 s predicted, measured not run yet",
        "  plan    karma: 1 swaps (50.0MiB out), 2 nodes repeated (0.125 s)",
        "  took    import 0.2 s, plan 1.5 s",
    ]


def test_a_planned_step_after_it_has_run():
    text = str(step_report(measured_seconds=[9.0, 0.75, 0.5, 1.0], measured_peak_bytes=95 * MIB, notes=["tightened"]))
    assert "measured 95.0MiB" in text
    assert "measured 0.750 s (median of 3)" in text  # the first run also sets kernels up
    assert text.endswith("note    tightened")


def test_a_peak_of_before_the_step_is_not_called_its_own():
    text = str(step_report(measured_peak_bytes=120 * MIB, earlier_peak_bytes=120 * MIB))
    assert "measured at most 120.0MiB, which were in use before it ran" in text
    for own in (119, 121):  # the lower one after the count was reset
        text = str(step_report(measured_peak_bytes=own * MIB, earlier_peak_bytes=120 * MIB))
        assert f"measured {own}.0MiB" in text


def test_every_round_is_reported():
    seen = Observation(2.0, (9.0, 1.0, 1.0, 1.0))
    step = step_report(rounds=[Round(seen, 1.0, 0.75, "the new plan is taken"), Round(seen)])
    assert [line for line in str(step).splitlines() if line.startswith("  round")] == [
        f"  round 1 {step.rounds[0]}",
        "  round 2 2.000 s predicted, 1.000 s measured: as predicted",
    ]


def test_corrected_predictions_keep_their_ratio_to_the_bound():
    builder = bound.Builder()
    builder.row([(builder.column(cost=0.5), 100.0 * MIB)], lower=122.0 * MIB, share=1.0)
    certificate = bound.certificate(builder.program(constant=0.5), np.array([0.005 / MIB]))
    step = step_report(plan=Plan(strategy="joint", memory_budget=97 * MIB, certificate=certificate))
    step.correct(2.0)
    assert (step.plain_seconds, step.predicted_seconds, step.recomputed_seconds) == (1.0, 1.5, 0.25)
    assert "takes less than 1.250 s in this budget; predicted is 20.0 % above" in str(step)
    step.correct(1.0)
    assert step.predicted_seconds == 0.75


def test_a_step_that_has_run_once_shows_that_run():
    assert "measured 9.000 s (median of 1)" in str(step_report(measured_seconds=[9.0]))


def test_a_step_that_needs_nothing():
    text = str(step_report(plan=Plan(), status="needs nothing", swapped_bytes=0, recomputed_seconds=0.0, breakdown={}))
    assert text.startswith("train_step (12 nodes): needs nothing\n")
    assert "none: 0 swaps (0B out), 0 nodes repeated" in text
    assert "took" not in text


def test_explain_lists_every_decision_and_what_was_declined():
    text = Report([step_report()]).explain()
    swap, recompute = "swap       conv  out after relu", "recompute  norm, relu  before norm_grad"
    for part in (swap, recompute, "keep       bias  too small"):
        assert part in text


def test_the_step_of_a_report_is_the_one_that_ran_most():
    once, often = step_report(name="partial", measured_seconds=[1.0]), step_report(measured_seconds=[1.0, 1.0])
    whole = Report([often, once])
    assert whole.step is often
    assert str(whole).splitlines()[0].startswith("train_step")
    assert "partial" in str(whole)


def test_a_report_before_any_step():
    assert str(Report()) == "graphswap: no step has been traced yet."
    with pytest.raises(ValueError, match="Run one training step"):
        _ = Report().step


def test_report_refuses_what_was_made_without_graphswap():
    with pytest.raises(ValueError, match=r"received 3\. Compile it with"):
        report(3)

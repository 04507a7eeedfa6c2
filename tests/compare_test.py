import json
import math

import pytest

from graphswap.tools import benchmark, compare, trial
from graphswap.tools.compare import Case
from graphswap.tools.trial import Result, Trial

MIB = 1 << 20
NO_PLAN = "graphswap.strategies.base.InfeasibleBudgetError: memory_budget=32.0MiB is below the smallest reachable peak"
PLAIN = Result("", [2.5, 1.5], [9.0, 1.0], 64 * MIB, "abc")


def planned(seconds, strategy="karma", bound=None, variables="abc", predicted_seconds=1.25):
    report = {
        "strategy": strategy,
        "bound_seconds": bound,
        "swaps": 2,
        "repeated_nodes": 3,
        "predicted_peak_bytes": 30 * MIB,
        "predicted_seconds": predicted_seconds,
    }
    return Result("", [2.5, 1.5], [12.0, seconds], 32 * MIB, variables, report, 30 * MIB)


@pytest.fixture
def case():
    """The vDNN baseline found no plan, Chen's is slow."""
    runs = {
        "swap_all": [Result(NO_PLAN)],
        "chen": [planned(2.0, "chen"), planned(2.2, "chen")],
        "karma": [planned(1.5), planned(1.7)],
        "joint": [planned(1.2, "joint", 1.0), planned(1.2, "joint", 1.0)],
        "auto": [planned(1.1, "joint"), planned(1.1, "greedy")],
    }
    return Case("gpt", "50%", 32 * MIB, PLAIN, [PLAIN, PLAIN], runs)


@pytest.fixture
def turns(monkeypatch):
    """Which trial is started ("start") and gets a turn ("step"), and when, instead of running any."""
    taken = []

    class Process:
        def __init__(self, what, say, environment):
            self.what, self.say = what, say
            taken.append(("start", what))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            taken.append(("end", self.what))

        def step(self):
            self.say("step 1/1")
            taken.append(("step", self.what))

        def result(self):
            if not self.what.graphswap:
                return PLAIN
            return Result(NO_PLAN) if self.what.strategy == "swap_all" else planned(1.5, self.what.strategy)

    monkeypatch.setattr(trial, "Process", Process)
    return taken


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def rows(table):
    header, _, *lines = cells(table)
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_trials_take_turns_step_by_step(turns):
    two, three = Trial("gpt", 1, steps=2), Trial("vit", 1, steps=3)
    results = trial.in_turns({"two": two, "three": three}, lambda name, line: None, {})
    begin = [("start", two), ("step", two), ("start", three), ("step", three)]
    assert turns[:4] == begin
    assert turns[4:-2] == [("step", two), ("step", three)] * 2
    assert [what for what, _ in turns[-2:]] == ["end", "end"]
    assert results == {"two": PLAIN, "three": PLAIN}


def test_a_strategy_without_a_plan_is_not_asked_again(turns):
    (half, small) = compare.measure("gpt", ["50%", "20MiB"], 2, 3, 7.0, lambda line: None)
    plain = Trial("gpt", trial.AMPLE_BYTES, steps=3)
    without = Trial("gpt", trial.AMPLE_BYTES, steps=3, memory_optimizer=False)
    expected = [plain, without]
    for strategies in (["swap_all", "chen", "karma", "joint", "auto"], ["chen", "karma", "joint", "auto"]):
        for nbytes in (32, 20):
            trials = (Trial("gpt", nbytes * MIB, f"{nbytes}MiB", 3, True, strategy, 7.0) for strategy in strategies)
            expected += [plain, *trials]
    assert [started for what, started in turns if what == "start"] == expected
    assert (half.budget, half.memory_bytes, small.budget, small.memory_bytes) == ("50%", 32 * MIB, "20MiB", 20 * MIB)
    assert half.planned["swap_all"] == [Result(NO_PLAN)]
    assert half.planned["joint"] == [planned(1.5, "joint")] * 2
    assert half.plain == small.plain == [PLAIN] * 2


def test_plain_must_train_in_plenty_of_memory(monkeypatch):
    failed = Result("KeyError: 'gptt'")
    monkeypatch.setattr(trial, "in_turns", lambda trials, *_: dict.fromkeys(trials, failed))
    with pytest.raises(RuntimeError, match="expected gptt to train in plenty of memory, received KeyError"):
        compare.measure("gptt", ["50%"], 1, 1, 1.0, lambda line: None)


def test_ratios_are_to_the_fastest_baseline_that_fits(case):
    assert case.best_baseline() == "karma"
    assert case.ratio("joint") == pytest.approx((1.2 / 1.5 + 1.2 / 1.7) / 2)
    assert math.isinf(case.ratio("swap_all"))
    (row,) = rows(compare.ratio_table([case]))
    assert row == {
        "model": "gpt",
        "budget": "50%, 32.0MiB",
        "best baseline": "karma, 1.600 s",
        "joint / best": "0.75x",
        "auto / best": "0.69x",
    }


def test_a_planner_that_fits_where_no_baseline_does(case):
    case.planned |= {"chen": [Result(NO_PLAN)], "karma": [Result("OOM when allocating\nmore")], "auto": [Result("x")]}
    (row,) = rows(compare.ratio_table([case]))
    assert row["best baseline"] == "none fits"
    assert row["joint / best"] == "fits"
    assert row["auto / best"] == "1 of 1 runs failed: x"
    assert compare.summary([case]).splitlines() == [
        "joint: furthest from the prediction: step time -4.0%, peak +0.0%; 2 of 2 runs within the budget",
        "auto: no run went well",
    ]


def test_details(case):
    case.planned["joint"][1] = planned(1.2, "joint", 1.0, variables="abd")
    swap_all, _, karma, joint, auto = rows(compare.detail_table([case]))
    assert swap_all["plan"] == "does not fit"
    assert swap_all["measured step"] == "-"
    assert joint == {
        "model": "gpt",
        "budget": "50%, 32.0MiB",
        "strategy": "joint",
        "plan": "joint",
        "swaps": "2",
        "nodes repeated": "3",
        "predicted peak": "30.0MiB",
        "measured peak": "30.0MiB (+0.0%)",
        "bound": "1.000 s",
        "predicted step": "1.250 s",
        "measured step": "1.200 s (-4.0%)",
        "of plain": "1.20x",
        "bits": "1 of 2 runs equal",
    }
    assert (karma["bound"], karma["bits"]) == ("-", "equal")
    assert auto["plan"] == "joint, greedy"


def test_a_run_that_fails_is_told(case):
    case.planned["chen"][1] = Result("ResourceExhaustedError: Graph execution error:\nOOM when allocating")
    chen = rows(compare.detail_table([case]))[1]
    assert chen["plan"] == "1 of 2 runs failed: ResourceExhaustedError: Graph execution error:"
    assert math.isinf(case.step_seconds("chen"))


def test_summary_names_the_worst(case):
    other = Case("vit", "35%", 31 * MIB, PLAIN, [PLAIN] * 2, {**case.planned, "joint": [planned(2.0, "joint")] * 2})
    assert compare.summary([case, other]).splitlines()[0] == (
        "joint: step time 1.00x that of the best baseline in the median, 1.25x at most; "
        "furthest from the prediction: step time +60.0%, peak +0.0%; 2 of 4 runs within the budget"
    )


def test_the_comparison_prints_tables_only_and_writes_every_number(turns, tmp_path, capsys):
    out = tmp_path / "out.json"
    compare.main(["compare", "--models=gpt", "--rounds=1", "--steps=2", f"--out={out}"])
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert "tensorflow" in lines[0]
    assert "| gpt   | 50%, 32.0MiB | chen, 1.500 s | 1.00x        | 1.00x       |" in lines
    assert "step 1/1" not in printed.out
    written = json.loads(out.read_text())
    assert written["machine"] == benchmark.machine()
    assert written["command"][-1] == f"--out={out}"
    assert [case["budget"] for case in written["cases"]] == ["50%", "35%"]
    assert Result(**written["cases"][0]["planned"]["joint"][0]) == planned(1.5, "joint")


def test_progress_is_for_terminals(turns, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    compare.main(["compare", "--models=gpt", "--budgets=50%", "--rounds=1"])
    printed = capsys.readouterr()
    assert "gpt in 32MiB, round 1, joint: step 1/1" in printed.err
    assert "gpt in 32MiB, round 1, swap_all: graphswap.strategies.base.InfeasibleBudgetError" in printed.err
    assert "step 1/1" not in printed.out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=vgg", "--models: expected names out of resnet50, gpt, unet, vit, received 'vgg'."),
        ("--budgets=40", "expected a size"),
        ("--rounds=0", "0 is not a positive integer"),
        ("--planning_seconds=0", "planning_seconds: expected a number of seconds above 0"),
        ("--out=nowhere/out.json", "--out: expected a file in a folder that exists, received 'nowhere/out.json'."),
        ("more", "expected flags, received more."),
    ],
)
def test_the_comparison_refuses(argument, message, turns):
    with pytest.raises(SystemExit, match=message):
        compare.main(["compare", argument])
    assert turns == []

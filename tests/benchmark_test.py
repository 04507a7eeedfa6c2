import json
import pathlib

import pytest

from graphswap.tools import benchmark, trial
from graphswap.tools.trial import Result, Trial

ROOT = pathlib.Path(__file__).parent.parent
MIB = 1 << 20
OUT_OF_MEMORY = """\
I0000 00:00:1 cudart_stub.cc:31] Could not find cuda drivers
Traceback (most recent call last):
  File "trial.py", line 9, in train
tensorflow.python.framework.errors_impl.ResourceExhaustedError: Graph execution error:

Detected at node conv/BiasAdd defined at (most recent call last):
  File "trial.py", line 9, in train

OOM when allocating tensor with shape[32,24,24,64] and type float on CPU:0
\t [[{{node conv/BiasAdd}}]]
Hint: If you want to see a list of allocated tensors when OOM happens, look elsewhere.
 [Op:__inference_one_step_on_data_9455]
"""
TELLING = """\
tensorflow.python.framework.errors_impl.ResourceExhaustedError: Graph execution error:
OOM when allocating tensor with shape[32,24,24,64] and type float on CPU:0
  [[{{node conv/BiasAdd}}]]"""
REPORT = {
    "nodes": 100,
    "plans": 1,
    "strategy": "greedy",
    "swaps": 2,
    "repeated_nodes": 3,
    "predicted_peak_bytes": 29 * MIB,
    "breakdown": {"import": 0.1, "measure": 1, "plan": 2},
}
PLAIN = Result("", [2.5, 1.5], [9.0, 1.0, 1.2, 1.1], 60 * MIB, "abc")
PLANNED = Result("", [2.5, 1.5], [12.0, 1.6, 1.5, 1.7], 30 * MIB, "abc", REPORT)


@pytest.fixture
def case():
    return benchmark.Case("mlp", 32 * MIB, [PLAIN], PLAIN, Result(TELLING), [PLANNED])


@pytest.fixture
def trials(monkeypatch):
    """What would be run, instead of running it: a process runs out of memory if it is plain and small."""
    started = []

    def run(what, say, environment):
        started.append(what)
        if what.graphswap:
            return PLANNED
        return PLAIN if what.memory_bytes == trial.AMPLE_BYTES else Result(TELLING)

    monkeypatch.setattr(trial, "run", run)
    return started


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture
def checkout_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_trial_is_a_process_that_reports_its_steps(checkout_is_importable):
    said = []
    plain = trial.run(Trial("mlp", trial.AMPLE_BYTES, steps=3), said.append)
    assert plain.error == ""
    assert (len(plain.losses), len(plain.seconds), len(plain.steady_seconds)) == (3, 3, 2)
    assert [line.split(":")[0] for line in said] == [
        "tracing the step",
        "step 1/3",
        "step 2/3",
        "step 3/3",
        f"peak {plain.peak_bytes / MIB:.1f}MiB",
    ]
    planned = trial.run(Trial("mlp", 40 * MIB, "40MiB", steps=3), said.append)
    assert planned.equals(plain)
    assert planned.steady_peak_bytes <= planned.peak_bytes <= 40 * MIB
    assert planned.report["status"]
    certified = trial.run(Trial("mlp", 40 * MIB, "40MiB", steps=1, strategy="joint"), said.append)
    assert certified.error == ""
    assert certified.report["bound_seconds"] > 0


def test_a_trial_waits_for_its_turn(checkout_is_importable):
    said = []
    with trial.Process(Trial("mlp", trial.AMPLE_BYTES, steps=3), said.append) as process:
        assert said == []
        for count in (1, 2):
            assert process.step()
            assert [line.startswith("step ") for line in said].count(True) == count
        result = process.result()
        assert len(result.losses) == 3
        assert not process.step()
    with trial.Process(Trial("mlpp", trial.AMPLE_BYTES), said.append) as process:
        assert not process.step()
        assert process.result().error.endswith("KeyError: 'mlpp'")


def test_a_trial_without_room_ends_in_the_error_of_tensorflow(checkout_is_importable):
    result = trial.run(Trial("mlp", 30 * MIB, steps=1), lambda line: None)
    assert "ResourceExhaustedError" in result.error
    assert "OOM when allocating" in result.error


def test_telling_lines():
    assert trial.telling_lines(OUT_OF_MEMORY) == TELLING
    assert trial.telling_lines("Traceback\n  File 'x'\n\nValueError: no") == "Traceback\nFile 'x'\nValueError: no"
    assert trial.telling_lines("") == ""


def test_a_result_equals_only_the_same_bits():
    assert PLANNED.equals(PLAIN)
    assert not PLANNED.equals(Result("", [2.5, 1.5000001], [1.0], 1, "abc"))
    assert not PLANNED.equals(Result("", [2.5, 1.5], [1.0], 1, "abd"))


@pytest.mark.parametrize(("budget", "nbytes"), [("300MiB", 300 * MIB), ("40%", 40 * MIB), ("33.3%", 33 * MIB)])
def test_budget_bytes(budget, nbytes):
    assert benchmark.budget_bytes(budget, 100 * MIB) == nbytes


def test_a_budget_is_bytes_or_a_share():
    with pytest.raises(ValueError, match="expected a size"):
        benchmark.budget_bytes("40", 1)


def test_plain_and_graphswap_take_turns(trials):
    (first, second) = benchmark.measure("mlp", ["50%", "20MiB"], runs=2, steps=3, say=lambda line: None)
    plain = Trial("mlp", trial.AMPLE_BYTES, steps=3)
    reference = Trial("mlp", trial.AMPLE_BYTES, steps=3, memory_optimizer=False)
    within = [Trial("mlp", nbytes * MIB, steps=1) for nbytes in (30, 20)]
    planned = [Trial("mlp", nbytes * MIB, f"{nbytes}MiB", steps=3) for nbytes in (30, 20)]
    assert trials == [plain, reference, *within, *planned, plain, *planned]
    assert (first.memory_bytes, second.memory_bytes) == (30 * MIB, 20 * MIB)
    assert (first.plain, first.plain_within, first.graphswap) == ([PLAIN] * 2, Result(TELLING), [PLANNED] * 2)
    assert first.reference == second.reference == PLAIN


def test_plain_must_train_in_plenty_of_memory(monkeypatch):
    monkeypatch.setattr(trial, "run", lambda *_: Result("KeyError: 'mlpp'"))
    with pytest.raises(RuntimeError, match="expected mlpp to train in plenty of memory, received KeyError"):
        benchmark.measure("mlpp", ["50%"], 1, 1, lambda line: None)


def test_memory_table(case):
    header, _, row = cells(benchmark.memory_table([case]))
    assert dict(zip(header, row, strict=True)) == {
        "model": "mlp",
        "budget": "32.0MiB",
        "plain peak": "60.0MiB",
        "plain in the budget": "ResourceExhaustedError",
        "predicted peak": "29.0MiB",
        "measured peak": "30.0MiB",
        "plain step": "1.10 s",
        "graphswap step": "1.60 s",
        "ratio": "1.45x",
        "losses and variables": "equal to plain",
    }


def test_memory_table_hides_nothing(case):
    other = Result("", [2.5, 1.4], [1.0], 31 * MIB, "abd", REPORT)
    case.graphswap.append(other)
    row = cells(benchmark.memory_table([case]))[2]
    assert row[5] == "30.0MiB to 31.0MiB"
    assert row[-1] == "1 of 2 runs equal plain"
    case.graphswap.append(Result("graphswap.strategies.base.InfeasibleBudgetError: memory_budget=..."))
    row = cells(benchmark.memory_table([case]))[2]
    assert row[4:] == ["-"] * 5 + ["1 of 3 runs failed: InfeasibleBudgetError"]


def test_memory_table_tells_when_plain_keras_does_not_repeat_its_bits(case):
    case.plain.append(Result("", [2.5, 1.4], [1.0], 60 * MIB, "abd"))
    case.graphswap.append(Result("", [2.5, 1.3], [1.0], 30 * MIB, "abe", REPORT))
    row = cells(benchmark.memory_table([case]))[2]
    assert row[-1] == "1 of 2 runs equal plain without memory optimiser"


def test_planning_table(case):
    header, _, row = cells(benchmark.planning_table([case]))
    assert dict(zip(header, row, strict=True)) == {
        "model": "mlp",
        "budget": "32.0MiB",
        "nodes": "100",
        "plans": "1",
        "strategy": "greedy",
        "swaps": "2",
        "nodes repeated": "3",
        "import": "0.1 s",
        "measure": "1.0 s",
        "plan": "2.0 s",
        "rewrite": "0.0 s",
        "first step": "12.0 s",
        "plain first step": "9.0 s",
    }


def test_the_benchmark_prints_tables_and_writes_every_number(trials, tmp_path, capsys):
    out = tmp_path / "out.json"
    benchmark.main(["benchmark", "--models=resnet50", "--runs=1", "--steps=2", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "tensorflow" in printed.splitlines()[0]
    assert "| resnet50 | 300.0MiB | 60.0MiB " in printed
    written = json.loads(out.read_text())
    assert written["machine"] == benchmark.machine()
    assert written["command"][-1] == f"--out={out}"
    assert [case["memory_bytes"] for case in written["cases"]] == [300 * MIB, 220 * MIB]
    assert Result(**written["cases"][0]["graphswap"][0]) == PLANNED


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=vgg", "--models: expected names out of resnet50, gpt, .*, received 'vgg'."),
        ("--budgets=40", "expected a size"),
        ("--runs=0", "0 is not a positive integer"),
        ("more", "expected flags, received more."),
    ],
)
def test_the_benchmark_refuses(argument, message, trials):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(["benchmark", argument])
    assert trials == []

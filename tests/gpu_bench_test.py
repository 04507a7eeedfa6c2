"""What is run on a GPU, in which order, and what people see of it. No GPU is at hand here: the runs are made up."""

import json

import pytest

from graphswap.tools import gpu_bench, trial
from graphswap.tools.trial import Result

MIB = 1 << 20
PLAIN = Result("", [2.5, 1.5], [9.0, 1.0], 100 * MIB, "abc")
PLANNED = Result(
    "", [2.5, 1.5], [9.0, 1.25], 59 * MIB, "abc", {"predicted_peak_bytes": 58 * MIB, "predicted_seconds": 1.2}
)


@pytest.fixture
def trials(monkeypatch):
    """The trials that were run. One under Chen's plan runs out of memory."""
    ran = []

    def run(one, say):
        ran.append(one)
        if one.strategy == "chen":
            return Result("ResourceExhaustedError: too much")
        return PLANNED if one.graphswap else PLAIN

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(gpu_bench, "calibrated", lambda: {"links": "measured"})
    return ran


def test_every_strategy_gets_every_budget_of_the_plain_peak(trials, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu_bench.main(
        [
            "",
            "--models=gpt_gpu",
            "--budgets=60%,40MiB",
            "--strategies=auto,chen",
            "--back_ends=executor",
            f"--out={out}",
        ]
    )
    assert [(one.strategy, one.memory_bytes, one.graphswap) for one in trials] == [
        ("auto", 60 << 30, ""),
        ("auto", 60 * MIB, "60MiB"),
        ("chen", 60 * MIB, "60MiB"),
        ("auto", 40 * MIB, "40MiB"),
        ("chen", 40 * MIB, "40MiB"),
    ]
    assert all(one.on_gpu for one in trials)
    found = json.loads(out.read_text())
    assert [run["trial"]["graphswap"] for run in found["runs"]] == ["", "60MiB", "60MiB", "40MiB", "40MiB"]
    assert found["machine"]["python"]
    assert found["device"] == {"links": "measured"}
    shown = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.out.splitlines()[1:]]
    assert rows[2] == ["gpt_gpu", "60.0GiB", "plain", "100.0MiB", "", "100.0MiB", "1000.0 ms, 1.00x", "", "equal"]
    assert rows[3][1:] == ["60MiB", "auto", "100.0MiB", "58.0MiB", "59.0MiB", "1250.0 ms, 1.25x", "1200.0 ms", "equal"]
    assert rows[4][1:6] == ["60MiB", "chen", "100.0MiB", "", "ResourceExhaustedError: too much"]
    assert "gpt_gpu, chen in 60MiB: ResourceExhaustedError" in shown.err


def test_every_back_end_gets_the_same_budgets(trials, tmp_path, capsys):
    gpu_bench.main(["", "--models=gpt_gpu", "--budgets=60%", f"--out={tmp_path / 'gpu.json'}"])
    assert [(one.jit_compile, one.graphswap) for one in trials] == [
        *((False, ""), (True, "")),
        *((False, "60MiB"), (True, "60MiB")),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[2] for row in rows] == ["plain", "plain, XLA", "auto", "auto, XLA"]


def test_a_plan_may_run_where_plain_xla_does_not():
    plain = Result("ResourceExhaustedError: too much")
    cells = gpu_bench.row(gpu_bench.Run(trial.Trial("gpt_gpu", MIB, "60MiB", jit_compile=True), PLANNED, 1.0), plain)
    assert cells[2:] == ("auto, XLA", "0B", "58.0MiB", "59.0MiB", "1250.0 ms", "1200.0 ms", "different")


def test_the_links_are_measured_in_another_process():
    assert set(gpu_bench.calibrated()["links"]) >= {"host"}


def test_a_device_with_room_shows_by_how_much_a_plan_misses(trials, tmp_path):
    gpu_bench.main(
        [
            "",
            "--models=gpt_gpu",
            "--budgets=60%",
            "--nocapped",
            "--back_ends=executor",
            f"--out={tmp_path / 'gpu.json'}",
        ]
    )
    assert [(one.memory_bytes, one.graphswap) for one in trials] == [(60 << 30, ""), (60 << 30, "60MiB")]


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"expected gpt_gpu to train in 1.0GiB, received .*TensorFlow finds none"):
        gpu_bench.main(["", "--models=gpt_gpu", "--ample=1GiB", f"--out={tmp_path / 'gpu.json'}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet", "--models: expected names out of mlp, .*, gpt_gpu, received 'resnet'"),
        ("--budgets=half", "'half'"),
        ("--strategies=best", "'best'"),
        ("--ample=much", "'much'"),
        ("--back_ends=TPU", "--back_ends: expected executor or XLA, received 'TPU'"),
        ("--out=/nowhere/gpu.json", "expected a file in a folder that exists, received '/nowhere/gpu.json'"),
        ("--jit", "Unknown command line flag 'jit'"),
        ("gpt_gpu", "expected flags, received gpt_gpu"),
    ],
)
def test_bad_flags_are_named_before_anything_runs(flag, message, trials):
    with pytest.raises(SystemExit, match=f"gpu_bench: .*{message}"):
        gpu_bench.main(["", flag])
    assert not trials

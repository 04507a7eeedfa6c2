"""What is run on a GPU, in which order, and what people see of it. No GPU is at hand here: the runs are made up."""

import dataclasses
import json
import os
import sys

import pytest

from graphswap.tools import gpu_bench, jax_gpt, trial
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
    monkeypatch.setattr(gpu_bench, "_device_bytes", lambda: 1000 * MIB)
    return ran


@pytest.fixture
def processes(monkeypatch):
    """What other processes were asked: module, question, variables. PyTorch is not installed."""
    asked = []

    def elsewhere(module, question, variables=None):
        asked.append((module, question, variables))
        if module == "torch_peers":
            return Result("ImportError: graphswap.tools.torch_peers needs torch, which is not installed.")
        if module == "jax_gpt":
            return Result("", [2.0, 1.0], [9.0, 2.0], 30 * MIB, report={"compiled_bytes": 29 * MIB})
        if question["trial"]["graphswap"]:
            return dataclasses.replace(PLANNED, losses=[2.5, 1.5 + 1e-7], variables="")
        return dataclasses.replace(PLAIN, variables="", peak_bytes=0)

    monkeypatch.setattr(gpu_bench, "elsewhere", elsewhere)
    return asked


def table(shown):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[3:]]


def test_every_strategy_gets_every_budget_of_the_plain_peak(trials, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    asked = ["--models=gpt_gpu", "--budgets=60%,40MiB", "--strategies=auto,chen", "--back_ends=executor", "--peers="]
    gpu_bench.main(["", *asked, f"--out={out}"])
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
    assert [run["way"] for run in found["runs"]] == ["plain", "auto", "chen", "auto", "chen"]
    assert found["machine"]["python"]
    assert found["device"] == {"links": "measured"}
    shown = capsys.readouterr()
    rows = table(shown.out)
    assert rows[0] == ["gpt_gpu", "60.0GiB", "plain", "100.0MiB", "", "100.0MiB", "1000.0 ms, 1.00x", "", "equal"]
    assert rows[1][1:] == ["60MiB", "auto", "100.0MiB", "58.0MiB", "59.0MiB", "1250.0 ms, 1.25x", "1200.0 ms", "equal"]
    assert rows[2][1:6] == ["60MiB", "chen", "100.0MiB", "", "ResourceExhaustedError: too much"]
    assert "gpt_gpu, chen in 60MiB: ResourceExhaustedError" in shown.err


def test_every_back_end_gets_the_same_budgets(trials, processes, tmp_path, capsys):
    gpu_bench.main(["", "--models=gpt_gpu", "--budgets=60%", "--peers=", f"--out={tmp_path / 'gpu.json'}"])
    assert [(one.jit_compile, one.graphswap) for one in trials] == [
        *((False, ""), (True, "")),
        *((False, "60MiB"), (True, "60MiB")),
    ]
    assert [(module, question["trial"]["graphswap"]) for module, question, _ in processes] == [
        *(("pjrt_trial", ""), ("pjrt_trial", "60MiB"))
    ]
    assert [variables for _, _, variables in processes] == [
        *({"XLA_CLIENT_MEM_FRACTION": "1.000000"}, {"XLA_CLIENT_MEM_FRACTION": "0.060000"})
    ]
    question = processes[1][1]
    assert (question["device"], question["data_sheet"], question["trial"]["model"]) == ("gpu", "h200", "gpt_gpu")
    rows = table(capsys.readouterr().out)
    assert [row[2] for row in rows] == ["plain", "plain, XLA", "plain, PJRT", "auto", "auto, XLA", "auto, PJRT"]
    assert rows[2][5:] == ["not counted", "1000.0 ms, 1.00x", "", "losses equal"]
    assert rows[5][4:] == ["58.0MiB", "59.0MiB", "1250.0 ms, 1.25x", "1200.0 ms", "losses within 7e-08"]


def test_peers_train_the_same_sizes_within_the_same_memory(trials, processes, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu_bench.main(["", "--models=gpt_gpu", "--budgets=60%", "--back_ends=executor", f"--out={out}"])
    ways = [("jax_gpt", way) for way in jax_gpt.WAYS]
    ways += [("torch_peers", way) for way in ("plain", "torch.utils.checkpoint", "save_on_cpu")]
    assert [(module, question["way"]) for module, question, _ in processes] == [
        *(("jax_gpt", "plain"), ("torch_peers", "plain"), *ways)
    ]
    sizes = {"blocks": 12, "width": 1024, "heads": 16, "length": 1024, "batch": 8}
    assert processes[2] == (
        "jax_gpt",
        {"size": sizes, "way": "plain", "steps": 12, "device": "gpu"},
        {"XLA_CLIENT_MEM_FRACTION": "0.060000"},
    )
    question = {"model": "gpt", "sizes": sizes, "way": "save_on_cpu", "steps": 12}
    assert processes[-1] == ("torch_peers", {**question, "device": "cuda", "memory_bytes": 60 * MIB}, None)
    rows = table(capsys.readouterr().out)
    assert [row[2] for row in rows[4:6]] == ["plain, JAX", "remat of blocks, JAX"]
    assert rows[5][1:] == ["60.0MiB", rows[5][2], "30.0MiB", "", "30.0MiB", "2000.0 ms, 1.00x", "", "losses equal"]
    assert rows[-1][2:5] == ["save_on_cpu, torch", "", ""]
    assert rows[-1][5].startswith("ImportError: graphswap.tools.torch_peers needs torch")
    runs = json.loads(out.read_text())["runs"]
    assert [run["place"] for run in runs] == ["executor", "JAX", "torch", "executor", *["JAX"] * 4, *["torch"] * 3]


def test_peers_know_no_budget_so_that_without_a_cap_they_run_once(trials, processes, tmp_path):
    asked = ["--models=resnet50_gpu,mlp", "--budgets=60%,40%", "--back_ends=executor", "--nocapped"]
    gpu_bench.main(["", *asked, f"--out={tmp_path / 'gpu.json'}"])
    assert [(module, question["way"]) for module, question, _ in processes] == [
        ("torch_peers", way) for way in ("plain", "torch.utils.checkpoint", "save_on_cpu")
    ]
    assert processes[0][1]["sizes"] == {"size": 224, "batch": 128}


def test_a_library_that_is_missing_is_told(tmp_path):
    """A torch that can't be found, whether one is installed or not."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None")
    result = gpu_bench.elsewhere("torch_peers", {}, {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert result.error == (
        "ImportError: graphswap.tools.torch_peers needs torch, which is not installed. "
        "Run `pip install graphswap[torch]`."
    )


def test_a_plan_may_run_where_plain_xla_does_not():
    plain = Result("ResourceExhaustedError: too much")
    one = trial.Trial("gpt_gpu", MIB, "60MiB", jit_compile=True)
    cells = gpu_bench.row(gpu_bench.Run("XLA", "auto", one, PLANNED, 1.0), plain)
    assert cells[2:] == ("auto, XLA", "", "58.0MiB", "59.0MiB", "1250.0 ms", "1200.0 ms", "different")


def test_the_links_are_measured_in_another_process():
    assert set(gpu_bench.calibrated()["links"]) >= {"host"}


def test_a_device_with_room_shows_by_how_much_a_plan_misses(trials, tmp_path):
    asked = ["--models=gpt_gpu", "--budgets=60%", "--nocapped", "--back_ends=executor", "--peers="]
    gpu_bench.main(["", *asked, f"--out={tmp_path / 'gpu.json'}"])
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
        ("--back_ends=TPU", "--back_ends: expected names out of executor, XLA, PJRT, received 'TPU'"),
        ("--peers=mxnet", "--peers: expected names out of JAX, torch, received 'mxnet'"),
        ("--data_sheet=v3", "--data_sheet: expected names out of v100, .*, received 'v3'"),
        ("--out=/nowhere/gpu.json", "expected a file in a folder that exists, received '/nowhere/gpu.json'"),
        ("--jit", "Unknown command line flag 'jit'"),
        ("gpt_gpu", "expected flags, received gpt_gpu"),
    ],
)
def test_bad_flags_are_named_before_anything_runs(flag, message, trials):
    with pytest.raises(SystemExit, match=f"gpu_bench: .*{message}"):
        gpu_bench.main(["", flag])
    assert not trials

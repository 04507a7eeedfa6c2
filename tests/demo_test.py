import pytest
from absl import app, flags

from graphswap.tools import demo, trial
from graphswap.tools.trial import Result, Trial

MIB = 1 << 20
OUT_OF_MEMORY = Result("errors_impl.ResourceExhaustedError: Graph execution error:\nOOM when allocating tensor")
PLAIN = Result("", [2.5, 1.5], [9.0, 1.0, 1.2, 1.1], 640 * MIB, "abc")
PLANNED = Result("", [2.5, 1.5], [12.0, 1.6, 1.5, 1.7], 290 * MIB, "abc", {"predicted_peak_bytes": 288 * MIB})


@pytest.fixture
def trials(monkeypatch):
    """What would be run; instead of running it, the results are those in `results`."""
    started = []
    results = [OUT_OF_MEMORY, PLANNED, PLAIN]

    def run(what, say):
        started.append(what)
        say(f"run {len(started)}")
        return results[len(started) - 1]

    monkeypatch.setattr(trial, "run", run)
    return started, results


def test_three_runs_and_a_table(trials, capsys):
    assert demo.main(["graphswap demo"]) == 0
    assert trials[0] == [
        Trial("resnet50", 300 * MIB, "", 8),
        Trial("resnet50", 300 * MIB, "300MiB", 8),
        Trial("resnet50", trial.AMPLE_BYTES, "", 8),
    ]
    printed = capsys.readouterr().out
    assert [line[9:] for line in printed.splitlines() if line[5:9] == " s  "] == [
        "run 1",
        *OUT_OF_MEMORY.error.splitlines(),
        "run 2",
        "run 3",
    ]
    assert printed.count('model.compile(SGD(0.001), "sparse_categorical_crossentropy")\n') == 2
    assert printed.count('model.compile(SGD(0.001), "sparse_categorical_crossentropy", graphswap="300MiB")\n') == 1
    assert printed.endswith(
        """
|                    | plain Keras | graphswap     |
| ------------------ | ----------- | ------------- |
| budget             | none        | 300MiB        |
| predicted peak     | -           | 288.0MiB      |
| measured peak      | 640.0MiB    | 290.0MiB      |
| step time (median) | 1.10 s      | 1.60 s, 1.45x |
| loss of step 1     | 2.5         | 2.5           |
| loss of step 2     | 1.5         | 1.5           |

yes  plain Keras runs out of 300.0MiB
yes  graphswap trains within 300.0MiB
yes  losses and all variables are equal, bit for bit
"""
    )


@pytest.mark.parametrize(
    ("run", "result", "denied"),
    [
        (0, PLAIN, [0]),
        (1, Result("InfeasibleBudgetError: no"), [1, 2]),
        (1, Result("", [2.5, 1.5], [1.0], 301 * MIB, "abc", PLANNED.report), [1]),
        (1, Result("", [2.5, 1.6], [1.0], 290 * MIB, "abd", PLANNED.report), [2]),
    ],
)
def test_what_did_not_come_out_is_said(trials, run, result, denied, capsys):
    trials[1][run] = result
    assert demo.main(["graphswap demo", "--steps=2"]) == 1
    said = capsys.readouterr().out.splitlines()[-3:]
    assert [number for number, line in enumerate(said) if line.startswith("NO ")] == denied


@pytest.mark.parametrize(
    ("argument", "message"), [("--steps=0", "0"), ("--stpes=2", "Did you mean"), ("more", "expected flags")]
)
def test_the_demo_refuses(argument, message, trials):
    with pytest.raises((app.UsageError, flags.Error), match=message):
        demo.main(["graphswap demo", argument])
    assert trials[0] == []

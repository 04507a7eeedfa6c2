"""The commands on saved steps: what they print and write, and every refusal in full."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from typing import Any

import emulated
import keras
import numpy as np
import pytest
import small_gpu
import tensorflow as tf
import trainings

import graphswap
from graphswap import page, plan_file
from graphswap.devices import DEVICES
from graphswap.plan import Plan, PlanError
from graphswap.simulator import simulate
from graphswap.tools import graphswap_cli

WIDTH, BATCH = 256, 256
"""An activation takes 256 KiB; those up to 64 KiB stay where they are."""
FIGURES = (
    "plain_peak_bytes",
    "plain_seconds",
    "predicted_peak_bytes",
    "predicted_seconds",
    "swapped_bytes",
    "recomputed_seconds",
    "bound_seconds",
)


class Saved(tf.Module):
    """Dense layers with a training step."""

    def __init__(self, layers: int = 4):
        super().__init__()
        random = tf.random.Generator.from_seed(0)
        self.weights = [tf.Variable(0.1 * random.normal((WIDTH, WIDTH)), name=f"w{layer}") for layer in range(layers)]

    def scores(self, x: Any) -> Any:
        for weight in self.weights:
            x = tf.tanh(x @ weight)
        return x

    @tf.function(input_signature=[tf.TensorSpec((None, WIDTH), name="images")])
    def forward(self, images):
        return {"scores": self.scores(images)}

    @tf.function(input_signature=[tf.TensorSpec((None, WIDTH), name=name) for name in ("images", "targets")])
    def step(self, images, targets):
        with tf.GradientTape() as tape:
            loss = tf.nn.l2_loss(self.scores(images) - targets) / WIDTH
        for weight, gradient in zip(self.weights, tape.gradient(loss, self.weights), strict=True):
            weight.assign_sub(0.05 * gradient)
        return loss

    @tf.function
    def traced_twice(self, x):
        return x + 1.0


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Costs that this machine measured before would decide what is planned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("saved") / "model")
    module = Saved()
    for size in (1, 2):
        module.traced_twice(tf.zeros(size))
    tf.saved_model.save(module, path, signatures={"serving_default": module.forward})
    return path


@pytest.fixture(scope="module")
def planned(saved, tmp_path_factory):
    """What `plan` printed, and the files that it wrote."""
    folder = tmp_path_factory.mktemp("planned")
    files = [f"--output={folder}/plan.json", f"--html={folder}/plan.html", f"--trace={folder}/plan.trace"]
    text = done("plan", *step_of(saved), *V100, "--memory_budget=2.8MiB", *files, "--format=json")
    return json.loads(text), folder


def step_of(saved):
    return [f"--saved_model={saved}", f"--batch_size={BATCH}"]


V100 = ["--device=v100", "--planning_seconds=0.5"]


def call(*argv):
    """Runs a command. Returns its exit status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = graphswap_cli.main([*map(str, argv)])
    return status, out.getvalue(), err.getvalue()


def done(*argv):
    """The output of a command that does its work."""
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    return out


def failed(command, *argv):
    """The one line that a command says when it can't do its work."""
    status, out, err = call(command, *argv)
    assert (status, out) == (1, "")
    assert err.startswith(f"graphswap {command}: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix(f"graphswap {command}: ").removesuffix("\n")


def misused(command, *argv):
    """What a command says of arguments that are wrong; an example follows."""
    status, out, err = call(command, *argv)
    assert (status, out) == (2, "")
    message, example, rest = err.split("\n")
    assert (example, rest) == (f"For example: {graphswap_cli.COMMANDS[command].example}", "")
    return message.removeprefix(f"graphswap {command}: ")


def losses(path, steps=4):
    module: Any = tf.saved_model.load(str(path))
    random = np.random.default_rng(0)
    images, targets = (random.normal(size=(BATCH, WIDTH)).astype("float32") for _ in range(2))
    return [float(module.step(images, targets)) for _ in range(steps)]


# --- what they print and write ------------------------------------------------------------------------------------


def test_explain_as_text(saved):
    text = done("explain", *step_of(saved), "--device=v100")
    assert text.startswith("step: ")
    for part in ("\n  peak    ", "\n  least   no plan has a peak below ", "\n  at the peak by kind\n", " activation\n"):
        assert part in text


def test_explain_as_json(saved):
    fields = json.loads(done("explain", *step_of(saved), "--device=v100", "--format=json"))
    assert fields["name"] == "step"
    assert fields["by_kind"]["variable"] == 4 * 4 * WIDTH * WIDTH
    assert fields["peak_bytes"] == sum(fields["by_kind"].values()) == sum(fields["by_layer"].values())
    assert fields["least_bytes"] < fields["peak_bytes"]


def test_plan_prints_its_decisions_and_its_figures(saved):
    text = done("plan", *step_of(saved), *V100, "--memory_budget=2.8MiB")
    lines = text.splitlines()
    assert lines[0].startswith("plan ") and lines[0].endswith(", budget 2.8MiB")
    assert any(line.startswith(("  swap  ", "  recompute  ")) for line in lines)
    assert any(line.startswith("  keep  ") for line in lines)
    assert [line.split()[0] for line in lines[-4:]] == ["peak", "step", "moved", "bound"]


def test_plan_prints_json(planned):
    fields, _ = planned
    assert tuple(fields) == ("plan", *FIGURES)
    plan = Plan.from_json(json.dumps(fields["plan"]))
    assert plan.swaps or plan.recomputes
    assert plan.memory_budget == int(2.8 * 2**20)
    assert fields["predicted_peak_bytes"] <= plan.memory_budget < fields["plain_peak_bytes"]
    assert fields["bound_seconds"] <= fields["predicted_seconds"]


def test_plan_writes_the_plan_with_its_graph_and_costs(planned):
    fields, folder = planned
    made = plan_file.read(folder / "plan.json")
    assert made.cost_model.device == DEVICES["v100"]
    assert json.loads(made.plan.to_json()) == fields["plan"]
    assert simulate(made.graph, made.plan, made.cost_model).seconds == fields["predicted_seconds"]
    assert {one.value for one in made.plan.declined} <= {ref for node in made.graph.nodes for ref in node.refs()}


def test_plan_writes_a_page_and_a_trace(planned):
    _, folder = planned
    text = (folder / "plan.html").read_text()
    assert "<h1>step on v100</h1>" in text
    assert "<h2>Budget and time</h2>" in text and "no plan was found" not in text.lower()
    assert {event["ph"] for event in json.loads((folder / "plan.trace").read_text())["traceEvents"]} >= {"X", "C"}
    assert sorted(file.name for file in folder.iterdir()) == ["plan.html", "plan.json", "plan.trace"]


def test_explain_of_a_plan_file_is_that_of_its_step(planned, saved):
    _, folder = planned
    fields = json.loads(done("explain", folder / "plan.json", "--device=v100", "--format=json"))
    assert fields == json.loads(done("explain", *step_of(saved), "--device=v100", "--format=json"))


def test_simulate_gives_exactly_the_figures_of_plan(planned):
    fields, folder = planned
    again = json.loads(done("simulate", folder / "plan.json", "--format=json"))
    assert again == {name: fields[name] for name in FIGURES}


def test_simulate_as_text(planned):
    fields, folder = planned
    lines = done("simulate", folder / "plan.json").splitlines()
    peaks = [plan_file.number("x_bytes", fields[f"{which}_peak_bytes"]) for which in ("plain", "predicted")]
    assert lines[0] == "peak    plain {}, planned {}".format(*peaks)
    assert lines[-1] == (f"bound   no plan of its class takes less than {fields['bound_seconds']:.4f} s in this budget")


def test_simulate_on_another_device(planned):
    fields, folder = planned
    other = json.loads(done("simulate", folder / "plan.json", "--device=h200", "--format=json"))
    assert other["predicted_peak_bytes"] == fields["predicted_peak_bytes"]
    assert other["predicted_seconds"] < fields["predicted_seconds"]
    assert other["bound_seconds"] is None


def test_diff_of_a_plan_with_itself(planned):
    _, folder = planned
    fields = json.loads(done("diff", folder / "plan.json", folder / "plan.json", "--format=json"))
    assert fields["same_graph"] and fields["same_order"]
    assert fields["first"] == fields["second"]
    assert fields["only_in_first"] == fields["only_in_second"] == []
    assert fields["in_both"] > 0


def test_diff_of_two_plans(saved, planned, tmp_path):
    _, folder = planned
    other = tmp_path / "other.json"
    swaps = ["--strategy=swap_all", "--memory_budget=4MiB"]
    done("plan", *step_of(saved), *V100, *swaps, f"--output={other}")
    text = done("diff", folder / "plan.json", other)
    fields = json.loads(done("diff", folder / "plan.json", other, "--format=json"))
    assert text.splitlines()[0].split() == ["first", "second"]
    assert [line.split()[0] for line in text.splitlines()[1:8]] == list(FIGURES)
    assert ("the graph is the same\n" in text) == fields["same_graph"]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        f"- {one}" for one in fields["only_in_first"]
    ]
    assert [line for line in text.splitlines() if line.startswith("+ ")] == [
        f"+ {one}" for one in fields["only_in_second"]
    ]
    assert fields["only_in_second"]


def test_sweep_gives_bounds_and_plans(saved, tmp_path):
    shown = tmp_path / "curve.html"
    argv = ["sweep", *step_of(saved), *V100, "--budgets=120%,2.8MiB,10%"]
    fields = json.loads(done(*argv, f"--html={shown}", "--format=json"))
    points = fields["points"]
    assert [point["memory_budget"] for point in points] == sorted(point["memory_budget"] for point in points)
    assert points[1]["memory_budget"] == int(2.8 * 2**20)
    assert [point["planned_seconds"] is None for point in points] == [True, False, False]
    for point in points[1:]:
        assert point["bound_seconds"] <= point["planned_seconds"]
    assert "<h2>Budget and time</h2>" in shown.read_text()


def test_sweep_as_text(saved):
    lines = done("sweep", *step_of(saved), *V100, "--budgets=120%,10%").splitlines()
    assert lines[0].split() == ["budget", "bound", "planned", "slower"]
    assert lines[1].split()[-2:] == ["no", "plan"]
    assert lines[2].endswith("%")


def test_calibrate_writes_a_device_that_can_be_planned_for(saved, tmp_path):
    file = tmp_path / "device.json"
    text = done("calibrate", f"--output={file}")
    name, host, disk = text.splitlines()
    assert name.endswith(": memory no limit")
    assert host.split()[0] == "host" and "/s out, " in host and host.endswith("/s in")
    assert disk.split()[0] == "disk"
    device = plan_file.device_from_fields(json.loads(file.read_text()))
    argv = ["plan", *step_of(saved), f"--device={file}", "--planning_seconds=0.5", "--memory_budget=min"]
    made = tmp_path / "plan.json"
    done(*argv, f"--output={made}")
    assert plan_file.read(made).cost_model.device == device


def test_calibrate_as_json():
    fields = json.loads(done("calibrate", "--format=json"))
    assert fields["format"] == "graphswap device 1"
    assert set(fields["links"]) == {"host", "disk"}


def test_a_step_is_measured_and_planned_on_this_machine(saved, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["plan", *step_of(saved), "--planning_seconds=0.5", "--memory_budget=3MiB", f"--output={file}"]
    fields = json.loads(done(*argv, "--format=json"))
    assert json.loads(done("simulate", file, "--format=json")) == {name: fields[name] for name in FIGURES}
    profile = plan_file.read(file).cost_model.profile
    assert profile is not None and profile.seconds


def on_emulated_accelerator(path, folder):
    with trainings.reproducible():
        argv = ["plan", *step_of(path), "--planning_seconds=0.5", f"--output={folder}/plan.json", "--format=json"]
        fields = json.loads(done(*argv))
        again = json.loads(done("simulate", f"{folder}/plan.json", "--format=json"))
        text = done("calibrate")
    return fields, again, text


def test_on_an_emulated_accelerator_the_budget_is_its_memory(saved, tmp_path):
    fields, again, text = emulated.call(3 << 20, __file__, "on_emulated_accelerator", saved, str(tmp_path))
    assert again == {name: fields[name] for name in FIGURES}
    assert fields["predicted_peak_bytes"] <= 3 << 20 < fields["plain_peak_bytes"]
    assert plan_file.read(tmp_path / "plan.json").cost_model.device.memory_bytes == 3 << 20
    assert text.splitlines()[0].endswith(": memory 3.0MiB")


def explain_on_emulated_accelerator(path):
    return json.loads(done("explain", *step_of(path), "--format=json"))


def test_on_an_emulated_accelerator_the_peak_is_measured(saved):
    fields = emulated.call(64 << 20, __file__, "explain_on_emulated_accelerator", saved)
    assert fields["is_measured"]
    assert fields["peak_bytes"] == sum(fields["by_kind"].values())
    # A free chunk is not split unless as much is left as was asked for, so that a buffer may take twice its bytes.
    # Among a dozen of equal size that shows; saved_model_test holds real models to 8 %.
    assert 0.8 <= fields["peak_bytes"] / fields["predicted_peak_bytes"] <= 2


def explain_what_zeros_break(path):
    module = tf.Module()
    module.weight = tf.Variable(tf.ones((WIDTH, WIDTH)))

    @tf.function(input_signature=[tf.TensorSpec((BATCH, WIDTH))])
    def step(images):
        tf.debugging.assert_positive(images)
        module.weight.assign_sub(tf.matmul(images, images, transpose_a=True))

    module.step = step
    tf.saved_model.save(module, path)
    status, out, err = call("explain", f"--saved_model={path}", "--format=json")
    assert status == 0
    return json.loads(out), err


def test_a_step_that_can_not_run_on_zeros_is_explained_as_predicted(tmp_path):
    fields, said = emulated.call(64 << 20, __file__, "explain_what_zeros_break", str(tmp_path / "saved"))
    assert said.startswith("graphswap: note: memory is predicted, not measured: ")
    assert not fields["is_measured"]
    assert fields["peak_bytes"] == fields["predicted_peak_bytes"]


def trace_on_emulated_accelerator(path, trace):
    done("plan", *step_of(path), "--memory_budget=3MiB", "--planning_seconds=0.5", f"--trace={trace}")
    return [event["args"] for event in json.loads(pathlib.Path(trace).read_text())["traceEvents"] if event["pid"] == 3]


def test_on_an_emulated_accelerator_the_planned_step_is_recorded(saved, tmp_path):
    name, *levels = emulated.call(64 << 20, __file__, "trace_on_emulated_accelerator", saved, str(tmp_path / "t.json"))
    assert name == {"name": "measured"}
    peak = max(next(iter(level.values())) for level in levels)
    assert 1 << 20 < peak <= 3 << 20


@pytest.mark.parametrize("form", ["text", "json"])
def test_rewrite_writes_a_step_with_the_same_losses(form, saved, tmp_path):
    output = tmp_path / "rewritten"
    argv = ["rewrite", *step_of(saved), "--planning_seconds=0.5", "--memory_budget=3MiB", f"--output={output}"]
    text = done(*argv, f"--format={form}")
    if form == "json":
        fields = json.loads(text)
        assert tuple(fields) == ("output", *FIGURES, "measured_peak_bytes")
        assert fields["measured_peak_bytes"] is None  # this device counts no bytes
        assert fields["predicted_peak_bytes"] <= 3 << 20 < fields["plain_peak_bytes"]
    else:
        assert text.startswith("peak    plain ") and text.endswith(f"\nwrote   {output}\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rewritten"]
    with trainings.reproducible():
        expected = losses(saved)
        assert losses(output) == expected
    assert expected[-1] < expected[0]


def test_export(saved, tmp_path):
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    text = done("export", f"--saved_model={saved}", "--format=onnx", f"--output={tmp_path}/model.onnx")
    assert text.startswith(f"{tmp_path}/model.onnx: ")
    assert (tmp_path / "model.onnx").stat().st_size > 4 * 4 * WIDTH * WIDTH


def test_export_of_a_planned_step_for_pjrt(planned, saved, tmp_path):
    pytest.importorskip("jax")
    from graphswap import pjrt

    output = tmp_path / "step"
    text = done(*STABLEHLO, *step_of(saved), f"--plan={planned[1]}/plan.json", f"--output={output}")
    assert re.fullmatch(
        rf"{output}: step 'step' with 2 inputs, 4 arrays of state and 1 results; \d+ copies to the host and \d+ back\n",
        text,
    )
    step = pjrt.load(output)
    assert step.manifest.plan == planned[0]["plan"]
    random = np.random.default_rng(0)
    batch = random.normal(size=(BATCH, WIDTH)).astype("float32"), random.normal(size=(BATCH, WIDTH)).astype("float32")
    module = tf.saved_model.load(saved)
    for _ in range(3):
        np.testing.assert_allclose(step(*batch)[0], module.step(*batch), rtol=1e-6)
    assert sorted(step.state) == ["w0", "w1", "w2", "w3"]


STABLEHLO = ["export", "--format=stablehlo"]


@small_gpu.needs_compiler
def test_export_compiles_for_a_target_until_the_budget_is_kept(saved, tmp_path):
    target = tmp_path / "target.txtpb"
    target.write_text(small_gpu.TARGET)
    argv = [*STABLEHLO, *step_of(saved), *V100, f"--target={target}", f"--output={tmp_path}/step"]
    said = done(*argv, "--memory_budget=2.8MiB").splitlines()
    assert [line.split()[0] for line in said[1:]] == ["predicted", "device", "host", "copies"]
    assert float(said[2].split()[1].removesuffix("MiB:")) <= 2.8
    shutil.rmtree(tmp_path / "step")
    assert failed(*argv, "--memory_budget=1.7MiB").startswith("memory_budget=")
    target.write_text("gpu")
    assert failed(*argv).startswith("target: expected the text of XLA's GpuTargetConfigProto, received one without ")
    assert failed(*argv[:-2], f"--target={tmp_path}/none", argv[-1]) == (
        f"--target: expected the text of XLA's GpuTargetConfigProto, received '{tmp_path}/none', which can't be read: "
        "No such file or directory."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["target.txtpb"]


def test_export_without_jax_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert failed(*STABLEHLO, *step_of(saved), f"--output={tmp_path}/step") == (
        "graphswap.pjrt needs jax>=0.10.2,<0.11, which is not installed. Run `pip install graphswap[pjrt]`."
    )
    assert not list(tmp_path.iterdir())


def test_export_into_what_exists_is_refused(saved, tmp_path):
    pytest.importorskip("jax")
    assert failed(*STABLEHLO, *step_of(saved), f"--output={tmp_path}") == (
        f"expected an output directory that does not exist, received '{tmp_path}', which does. "
        "Remove it, or name another one."
    )


# --- models that Keras saved --------------------------------------------------------------------------------------


def model(layers=4):
    """A model, named as if it were the first one of its process."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(WIDTH, "tanh") for _ in range(layers)]
    return keras.Sequential([keras.Input((WIDTH,)), *dense, keras.layers.Dense(10)])


def trained(**option):
    images, labels = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32"), np.arange(BATCH) % 10
    made = model(layers=12)
    made.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **option)
    with trainings.reproducible():
        return made, [float(made.train_on_batch(images, labels)) for _ in range(4)]


def save_plan(path):
    """Trains under a budget and saves the plan."""
    made, found = trained(graphswap=graphswap.Options("5.5MiB", swap_to="host", planning_seconds=0.5))
    step = graphswap.report(made).step
    step.save_plan(path)
    return found, step.plan.to_json()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A plan that another process saved, with its losses."""
    path = str(tmp_path_factory.mktemp("kept") / "plan.json")
    found, plan = emulated.call(1 << 30, __file__, "save_plan", path)
    return path, found, Plan.from_json(plan)


@pytest.mark.parametrize("command", ["explain", "plan", "sweep"])
def test_a_keras_file(command, tmp_path):
    made = model()
    made.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made.save(tmp_path / "dense.keras")
    argv = [f"--model={tmp_path}/dense.keras", f"--batch_size={BATCH}", "--device=v100", "--format=json"]
    more = {
        "explain": [],
        "plan": ["--memory_budget=5MiB", "--planning_seconds=0.5"],
        "sweep": ["--budgets=90%", "--planning_seconds=0.5"],
    }
    fields = json.loads(done(command, *argv, *more[command]))
    assert {
        "explain": lambda: fields["name"] == "dense" and fields["by_kind"]["variable"] > 3 * 4 * 4 * WIDTH * WIDTH,
        "plan": lambda: fields["predicted_peak_bytes"] <= 5 << 20,
        "sweep": lambda: len(fields["points"]) == 1,
    }[command]()


def test_a_saved_plan_is_used_as_it_is(kept):
    path, expected, plan = kept
    assert plan.swaps or plan.recomputes
    made, found = trained(graphswap=graphswap.Options("5.5MiB", plan=path))
    _, plain = trained()
    step = graphswap.report(made).step
    assert step.plan == plan
    assert f"the plan is that of '{path}'" in step.notes
    assert f"\n  note    the plan is that of '{path}'" in str(step)
    assert "plan" not in step.breakdown and not step.rounds
    assert found == expected == plain


def test_a_saved_plan_that_passes_the_budget_is_refused(kept):
    path, _, _ = kept
    with pytest.raises(graphswap.InfeasibleBudgetError, match=r"^memory_budget=1.0MiB is below the smallest reachable"):
        trained(graphswap=graphswap.Options("1MiB", plan=path))


def test_a_saved_plan_for_another_model_is_refused(kept):
    path, _, _ = kept
    keras.backend.clear_session()
    made = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(10)])
    made.compile("sgd", "mse", graphswap=graphswap.Options("5.5MiB", plan=path))
    with pytest.raises(PlanError) as error:
        made.train_on_batch(np.ones((BATCH, WIDTH), "float32"), np.ones((BATCH, 10), "float32"))
    # What it moves hangs on measured costs: the first difference is a variable that is not here, or a node.
    expected = f"expected a plan for graph 'one_step_on_data', received '{path}', which is for another one"
    assert str(error.value).startswith(
        (f"{expected}: it has a variable '", f"{expected}. The first difference is node ")
    )
    assert str(error.value).endswith(" Plan again for this graph.")


def test_a_report_without_a_plan_has_nothing_to_save(tmp_path):
    step = graphswap.report(trained(graphswap="1GiB")[0]).step
    step.save_plan(tmp_path / "plan.json")
    assert plan_file.read(tmp_path / "plan.json").plan.is_empty


def test_a_report_saves_a_page_and_a_trace(kept, tmp_path):
    made, _ = trained(graphswap=graphswap.Options("5.5MiB", plan=kept[0]))
    step = graphswap.report(made).step
    step.save_html(tmp_path / "page.html")
    step.save_trace(tmp_path / "plan.trace")
    assert "one_step_on_data" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "plan.trace").read_text())["traceEvents"]


# --- arguments that are wrong -------------------------------------------------------------------------------------

SIZES = "B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)."
KNOWN = "v100, a100, h100, h200, gh200, tpu_v4, tpu_v5e"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain"], "expected --saved_model=DIR or --model=FILE.keras, received neither."),
        (
            ["plan", "--saved_model=a", "--model=b.keras"],
            "expected --saved_model=DIR or --model=FILE.keras, received both.",
        ),
        (["sweep", "--model=b.keras"], "expected --batch_size=N beside --model, received none."),
        (["rewrite", "--output=x"], "expected --saved_model=DIR, received no --saved_model."),
        (["export", "--output=x"], "expected --saved_model=DIR or --model=FILE.keras, received neither."),
        (["rewrite", "--saved_model=a"], "expected --output=DIR, received no --output."),
        (["export", "--saved_model=a"], "expected --output=PATH, received no --output."),
        (
            ["export", "--model=b.keras", "--batch_size=2", "--output=x"],
            "expected --saved_model=DIR for ONNX, received --model.",
        ),
        (
            ["export", "--saved_model=a", "--format=stablehlo", "--output=x", "--plan=p", "--memory_budget=1GiB"],
            "expected --plan=FILE or --memory_budget=SIZE, received both.",
        ),
        (["rewrite", "--model=b.keras"], "Unknown command line flag 'model'"),
        (["plan", "--saved_modle=a"], "Unknown command line flag 'saved_modle'. Did you mean: saved_model ?"),
        (["plan", "--saved_model=a", "b"], "expected flags, received b."),
        (
            ["plan", "--saved_model=a", "--batch_size=0"],
            "flag --batch_size=0: 0 is not a positive integer",
        ),
        (
            ["plan", "--saved_model=a", "--format=xml"],
            "flag --format=xml: value should be one of <text|json>",
        ),
        (
            ["plan", "--saved_model=a", "--memory_budget=lots"],
            'memory_budget: expected bytes as an int, a size such as "2GiB", or "auto", "free" or "min"; '
            f"received 'lots'. Write a number and a unit: {SIZES}",
        ),
        (
            ["plan", "--saved_model=a", "--strategy=jiont"],
            "strategy: expected one of {strategies}, received 'jiont'. Did you mean \"joint\"?",
        ),
        (
            ["plan", "--saved_model=a", "--planning_seconds=0"],
            "planning_seconds: expected a number of seconds above 0, received 0.0. Give a number such as 30.",
        ),
        (["simulate"], "expected a plan file, received none."),
        (["simulate", "a", "b"], "expected a plan file, received a, b."),
        (["diff", "a"], "expected two plan files, received a."),
        (["calibrate", "v100"], "expected flags, received v100."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_are_wrong(argv, message):
    strategies = ", ".join(f'"{name}"' for name in graphswap_cli.commands.STRATEGIES)
    assert misused(*argv).startswith(message.replace("{strategies}", strategies))


def test_a_device_that_is_unknown(saved, tmp_path):
    said = f"--device: expected one of {KNOWN} or a file of `graphswap calibrate`, received"
    argv = ["explain", *step_of(saved)]
    assert misused(*argv, "--device=v1000") == f"{said} 'v1000': No such file or directory."
    file = tmp_path / "device.json"
    file.write_text("{}")
    assert misused(*argv, f"--device={file}") == (
        f"{said} '{file}': expected a device file as written by `graphswap calibrate`, received something else."
    )


def test_budgets_that_are_no_sizes(saved):
    assert misused("sweep", *step_of(saved), *V100, "--budgets=50%,half") == (
        f'--budgets: expected a size such as "2GiB" or "300MB", received \'half\'. Write a number and a unit: {SIZES}'
    )


# --- work that can't be done --------------------------------------------------------------------------------------


def test_a_directory_without_a_saved_model(tmp_path):
    assert failed("plan", f"--saved_model={tmp_path}") == (
        f"expected a directory with saved_model.pb, received '{tmp_path}'. "
        "Save the model with tf.saved_model.save, and name that directory."
    )


def test_a_saved_model_that_is_not_there(tmp_path):
    assert failed("explain", f"--saved_model={tmp_path}/none") == (
        f"expected a directory with saved_model.pb, received '{tmp_path}/none'. "
        "Save the model with tf.saved_model.save, and name that directory."
    )


def test_a_saved_model_that_is_damaged(saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (broken / "saved_model.pb").write_bytes((broken / "saved_model.pb").read_bytes()[:1000])
    assert failed("plan", f"--saved_model={broken}") == (
        f"expected a SavedModel, received '{broken}/saved_model.pb', which is damaged: "
        "Error parsing message with type 'tensorflow.SavedModel': Wire format was corrupt."
    )


def test_a_saved_model_without_its_variables(saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    shutil.rmtree(broken / "variables")
    message = failed("plan", f"--saved_model={broken}")
    assert message.startswith(
        f"expected a SavedModel that TensorFlow can load, received '{broken}', of which it says: "
    )
    assert message.endswith(" Save it again.")


def test_a_frozen_graph(tmp_path):
    file = tmp_path / "frozen.pb"
    file.write_bytes(tf.Graph().as_graph_def().SerializeToString())
    assert failed("plan", f"--saved_model={file}") == (
        f"expected a directory with a SavedModel, received the file '{file}'. A frozen graph has no variables that a "
        "step could train: save the model with tf.saved_model.save."
    )
    assert failed("plan", f"--saved_model={tmp_path}") == (
        f"expected a directory with saved_model.pb, received '{tmp_path}'. There is frozen.pb, which may be a frozen "
        "graph: it has no variables that a step could train. Save the model with tf.saved_model.save, and name that "
        "directory."
    )


def test_a_function_that_is_unknown(saved):
    assert failed("plan", f"--saved_model={saved}", "--function=train") == (
        f"expected a function of '{saved}', received 'train'. It has forward, serving_default, step, traced_twice. "
        "Name one of these, or save the function as an attribute: a tf.function with an input_signature."
    )


def test_a_function_that_was_traced_twice(saved):
    assert failed("plan", f"--saved_model={saved}", "--function=traced_twice") == (
        f"expected a function with one input signature, received 'traced_twice' of '{saved}', which was traced 2 "
        "times. Save it with tf.function(input_signature=...)."
    )


def test_a_function_without_updates_is_not_rewritten(saved, tmp_path):
    argv = [*step_of(saved), "--function=forward", f"--output={tmp_path}/out"]
    assert failed("rewrite", *argv) == (
        "expected a function that updates variables, received 'forward', which updates none. "
        "Name the training step: --function=NAME."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["explain", "plan", "sweep"])
def test_an_open_dimension(command, saved):
    assert failed(command, f"--saved_model={saved}") == (
        f"expected arguments of known sizes, received (None, {WIDTH}) for 'images'. Give --batch_size=N."
    )


def test_a_keras_file_that_is_not_there(tmp_path):
    assert failed("plan", f"--model={tmp_path}/none.keras", "--batch_size=2") == (
        f"expected a .keras file, received '{tmp_path}/none.keras', which is none. Save it with model.save(...)."
    )


def test_a_model_that_was_not_compiled(tmp_path):
    model().save(tmp_path / "plain.keras")
    assert failed("plan", f"--model={tmp_path}/plain.keras", "--batch_size=2") == (
        f"expected a compiled model, received '{tmp_path}/plain.keras', which has no optimizer and no loss. "
        "Call model.compile(...) before model.save(...)."
    )


@pytest.mark.parametrize("place", ["v100", "here"])
def test_a_budget_that_no_plan_keeps(place, saved):
    device = ["--planning_seconds=0.5", *(["--device=v100"] if place == "v100" else [])]
    message = failed("plan", *step_of(saved), *device, "--memory_budget=1MiB")
    _, _, smallest = message.partition("Raise memory_budget to at least ")
    smallest, _, rest = smallest.partition(" or ")
    assert rest == "reduce the batch size."
    assert message.startswith(f"memory_budget=1.0MiB is below the smallest reachable peak, {smallest}, set by node '")
    assert "No plan of its class (docs/limits.md) has a peak below " in message
    done("plan", *step_of(saved), *device, f"--memory_budget={smallest}")


def test_a_device_that_does_not_say_what_memory_it_has(saved):
    assert failed("plan", *step_of(saved), *V100) == (
        "expected a --memory_budget such as 16GiB, received none, and device 'v100' does not say how much memory it "
        "has."
    )


def test_a_plan_file_that_is_none(planned, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("{}")
    said = "expected a plan file as written by `graphswap plan`, received other JSON."
    assert failed("simulate", file) == said
    assert failed("diff", planned[1] / "plan.json", file) == said
    assert failed("simulate", tmp_path / "none.json") == (
        f"expected a plan file, received '{tmp_path}/none.json', which can't be read: No such file or directory."
    )


def test_a_plan_that_does_not_fit_a_device(planned, tmp_path):
    fields = json.loads((planned[1] / "plan.json").read_text())
    fields["plan"]["memory_budget"] = None
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(fields))
    small = tmp_path / "small.json"
    small.write_text(json.dumps({**fields["device"], "name": "small", "memory_bytes": 2 << 20}))
    message = failed("simulate", plan, f"--device={small}")
    assert message.startswith(f"'{plan}': no room for {4 * WIDTH * BATCH} bytes after node '")
    assert message.endswith("'. The plan does not fit this device: plan for it.")


# --- places that can't be written to ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [["plan", "--output"], ["plan", "--html"], ["plan", "--trace"], ["sweep", "--html"], ["calibrate", "--output"]],
    ids=" ".join,
)
def test_a_file_in_a_folder_that_is_not_there_is_refused_before_any_work(argv, tmp_path):
    command, flag = argv
    source = [] if command == "calibrate" else ["--saved_model=not_even_there"]
    for path in (f"{tmp_path}/none/file", tmp_path):
        assert failed(command, *source, f"{flag}={path}") == (
            f"expected a file in a folder that can be written to, received '{path}'. Name another place."
        )


def test_a_disk_that_is_full_when_the_plan_is_written(saved, tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    assert failed("plan", *step_of(saved), *V100, "--memory_budget=2.8MiB", f"--output={file}") == (
        f"writing '{file}' failed: No space left on device. Nothing was left there. Free space, or name another place."
    )
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_a_page_without_bokeh_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert failed("plan", "--saved_model=not_even_there", f"--html={tmp_path}/plan.html") == (
        "graphswap.page expected Bokeh, which draws the page, but it is not installed. "
        "Run `pip install graphswap[report]`."
    )
    with pytest.raises(ImportError):
        page.check()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_output_directory_that_exists_stays_as_it_is(saved, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    assert failed("rewrite", *step_of(saved), f"--output={output}") == (
        f"expected an output directory that does not exist, received '{output}', which does. "
        "Remove it, or name another one."
    )
    assert [(entry.name, entry.read_text()) for entry in output.iterdir()] == [("mine", "mine")]


def test_an_output_directory_in_a_folder_that_is_not_there(saved, tmp_path):
    assert failed("rewrite", *step_of(saved), f"--output={tmp_path}/none/out") == (
        f"expected an output directory in a folder that can be written to, received '{tmp_path}/none/out'. "
        "Make the folder, or name another one."
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_half_way_through_leaves_nothing(saved, tmp_path, monkeypatch):
    copied = []

    def copy_some(source, target, **_):
        for file in (pathlib.Path(source) / "variables").iterdir():
            shutil.copy(file, target)
            copied.append(pathlib.Path(target) / file.name)
        full()

    monkeypatch.setattr(shutil, "copytree", copy_some)
    argv = ["--planning_seconds=0.5", "--memory_budget=3MiB", f"--output={tmp_path}/out"]
    assert failed("rewrite", *step_of(saved), *argv) == (
        f"writing '{tmp_path}/out' failed: No space left on device. Nothing was left there. "
        "Free space, or name another place."
    )
    assert copied and not list(tmp_path.iterdir())


# --- the documentation --------------------------------------------------------------------------------------------

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "commands.md"


def test_what_the_page_shows_works_as_written(tmp_path, monkeypatch, capsys):
    """Snippets and commands in their order; less time to plan than there, so that the test is short."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"^```python\n(.*?)^```|^    (graphswap [^\n]*)$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shown = {command.split()[1] for _, command in parts if command}
    assert shown == set(graphswap_cli.COMMANDS) - {"run", "demo", "launch"}
    keras.backend.clear_session()
    names: dict[str, Any] = {}
    for snippet, command in parts:
        if snippet:
            with trainings.reproducible():
                exec(snippet.replace('swap_to="host"', 'swap_to="host", planning_seconds=0.5'), names)
        else:
            _, name, *argv = shlex.split(command)
            brief = [] if name in ("simulate", "diff", "explain", "calibrate", "export") else ["--planning_seconds=0.5"]
            assert call(name, *argv, *brief)[0] == 0, command
    assert names["losses"]["rewritten"] == names["losses"]["saved"]
    assert "the plan is that of" in capsys.readouterr().out
    assert list((tmp_path / "logs").rglob("*tfevents*"))


if __name__ == "__main__":
    emulated.main(globals())

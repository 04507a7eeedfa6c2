"""The compile option itself: what it refuses, how it comes and goes, how it is saved."""

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import graphswap
from graphswap import keras_compile, strategies
from graphswap.cost_model import CostModel
from graphswap.graphdef import tracing

X, Y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")


def small_model():
    return keras.Sequential([keras.Input((4,)), layers.Dense(1)])


def compiled(**arguments):
    model = small_model()
    model.compile(**{"optimizer": "sgd", "loss": "mse", "graphswap": "1GiB", **arguments})
    return model


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_eagerly": True}, "expected run_eagerly=False, received True"),
        (
            {"jit_compile": True, "graphswap": graphswap.Options("1GiB", swap_to="host")},
            "expected swap_to='auto' with jit_compile=True, received 'host'",
        ),
        ({"optimizer": None}, "expected an optimizer, received optimizer=None"),
        ({"graphswap": "2GiBB"}, "memory_budget: expected bytes as an int"),
        ({"graphswap": "0MiB"}, "memory_budget: expected bytes as an int"),
        ({"graphswap": -1}, "received -1"),
        ({"graphswap": {"memory_bugdet": 1}}, 'Did you mean "memory_budget"?'),
        ({"graphswap": {"memory_budget": 1 << 30, "strategy": "karmaa"}}, 'Did you mean "karma"?'),
    ],
)
def test_refuses_with_a_clear_message(arguments, message):
    model = small_model()
    with pytest.raises(ValueError, match="(?s)" + message.replace("?", r"\?").replace("(", r"\(")) as caught:
        model.compile(**{"optimizer": "sgd", "loss": "mse", "graphswap": "1GiB", **arguments})
    assert str(caught.value).endswith((".", "?"))
    assert not model.compiled


@pytest.mark.parametrize("value", [True, 1.5, ["2GiB"], object()])
def test_refuses_what_is_no_budget(value):
    with pytest.raises(TypeError, match="expected a memory budget such as"):
        compiled(graphswap=value)


def test_run_eagerly_by_position_is_refused():
    with pytest.raises(ValueError, match="run_eagerly=False"):
        small_model().compile("sgd", "mse", None, None, None, True, graphswap="1GiB")


@pytest.mark.parametrize(
    "switch", [lambda model: setattr(model, "run_eagerly", True), lambda _: tf.config.run_functions_eagerly(True)]
)
def test_a_step_made_eager_after_compile_is_refused(switch):
    model = compiled()
    switch(model)
    try:
        with pytest.raises(ValueError, match="expected a step that is traced, received one that runs eagerly"):
            model.fit(X, Y, verbose=0)
    finally:
        tf.config.run_functions_eagerly(False)


def test_a_swap_directory_must_exist(tmp_path):
    with pytest.raises(ValueError, match="expected a directory that exists"):
        compiled(graphswap=graphswap.Options("1GiB", swap_to=tmp_path / "missing"))


def test_a_misspelt_option_is_refused_by_keras():
    with pytest.raises(TypeError, match="graphswop"):
        small_model().compile("sgd", "mse", graphswop="1GiB")


# --- coming and going -------------------------------------------------------------------------------------------


def patched():
    return (
        keras_compile.Trainer.compile,
        keras_compile.Trainer.get_compile_config,
        keras_compile.TensorFlowTrainer.make_train_function,
    )


def test_disable_leaves_keras_as_it_was():
    keras_compile.disable()
    originals = patched()
    try:
        with pytest.raises(TypeError, match="graphswap"):
            compiled()
        assert "graphswap>Options" not in keras.saving.get_custom_objects()
        keras_compile.enable()
        assert all(now is not before for now, before in zip(patched(), originals, strict=True))
        once = patched()
        keras_compile.enable()
        assert patched() == once
        keras_compile.disable()
        keras_compile.disable()
        assert patched() == originals
        assert not [t for t in tracing.transform.FUNC_GRAPH_TRANSFORMS if isinstance(t, tracing._Transform)]
    finally:
        keras_compile.enable()


def test_a_model_made_before_disable_still_trains():
    model = compiled()
    model.fit(X, Y, verbose=0)
    keras_compile.disable()
    try:
        model.fit(X, Y, verbose=0)
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0)
    finally:
        keras_compile.enable()


def test_a_model_made_before_disable_and_enable_is_planned():
    model = compiled()
    keras_compile.disable()
    keras_compile.enable()
    model.fit(X, Y, verbose=0)
    assert graphswap.report(model).steps


def test_compile_without_the_option_drops_it():
    model = compiled()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="expected a model compiled with graphswap"):
        graphswap.report(model)
    assert "graphswap" not in model.get_compile_config()


def test_models_without_the_option_are_left_alone():
    model = small_model()
    model.compile("sgd", "mse")
    assert "graphswap" not in model.get_compile_config()
    model.fit(X, Y, verbose=0)
    assert model._graphswap_session is None


def test_jit_compile_is_on_only_where_it_is_asked_for():
    assert compiled(jit_compile="auto").jit_compile is False
    assert compiled(jit_compile=False).jit_compile is False
    assert compiled(jit_compile=True).jit_compile is True
    model = small_model()
    model.compile("sgd", "mse", None, None, None, False, 1, True, graphswap="1GiB")
    assert model.jit_compile is True


def test_the_option_is_none_of_the_models_parts():
    model, plain = compiled(), small_model()
    plain.compile("sgd", "mse")
    assert [v.name for v in model.variables] == [v.name for v in plain.variables]
    assert model.summary(print_fn=str) == plain.summary(print_fn=str)


def test_a_subclass_with_its_own_compile_takes_the_option():
    class Own(keras.Sequential):
        def compile(self, name, **arguments):
            super().compile(name, "mse", **arguments)

    model = Own([keras.Input((4,)), layers.Dense(1)])
    model.compile("sgd", graphswap="1GiB")
    model.fit(X, Y, verbose=0)
    assert graphswap.report(model).step.status == "needs nothing"


# --- saving -----------------------------------------------------------------------------------------------------

OPTIONS = graphswap.Options(
    "1GiB", strategy="karma", swap_to="host", planning_seconds=3, on_unsupported="run_unchanged"
)


def test_a_saved_model_keeps_the_option(tmp_path):
    compiled(graphswap=OPTIONS).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded._graphswap_options == OPTIONS
    loaded.fit(X, Y, verbose=0)
    assert graphswap.report(loaded).steps


def test_compile_config_round_trips():
    config = json.loads(json.dumps(compiled(graphswap=OPTIONS).get_compile_config()))
    other = small_model()
    other.compile_from_config(config)
    assert other._graphswap_options == OPTIONS


def test_a_strategy_object_can_not_be_saved(tmp_path):
    class Own:
        def plan(self, graph, cost_model: CostModel, memory_budget: int):
            return strategies.STRATEGIES["greedy"].plan(graph, cost_model, memory_budget)

    model = compiled(graphswap=graphswap.Options("1GiB", strategy=Own()))
    with pytest.raises(TypeError, match="expected a name, which can be saved"):
        model.save(tmp_path / "model.keras")


def test_a_saved_model_loads_without_graphswap_if_not_compiled(tmp_path):
    path = tmp_path / "model.keras"
    compiled(graphswap=OPTIONS).save(path)
    script = (
        "import sys, keras\n"
        "model = keras.saving.load_model(sys.argv[1], compile=False)\n"
        "model.compile('sgd', 'mse')\n"
        "assert 'graphswap' not in sys.modules\n"
        "try: keras.saving.load_model(sys.argv[1])\n"
        "except TypeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, env=os.environ, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "graphswap" in done.stdout  # Keras's own message names the class it misses
    assert "graphswap>Options" in zipfile.ZipFile(path).read("config.json").decode()


def test_clones_and_copies_start_without_the_option():
    model = compiled()
    clone = keras.models.clone_model(model)
    clone.compile("sgd", "mse")
    clone.fit(X, Y, verbose=0)
    assert not graphswap.report(model).steps


# --- two entrances ----------------------------------------------------------------------------------------------


def test_train_function_can_be_made_anew():
    model = compiled()
    model.fit(X, Y, verbose=0)
    model.make_train_function(force=True)
    model.fit(X, Y, verbose=0)
    assert len(graphswap.report(model).step.measured_seconds) >= 1


def test_the_free_budget():
    model = small_model()
    model.compile("sgd", "mse", graphswap="free")
    model.fit(X, Y, verbose=0)
    step = graphswap.report(model).step
    assert step.budget_word == "free"
    assert step.free_bound_bytes is not None and step.free_bound_bytes <= step.memory_budget

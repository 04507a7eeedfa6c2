"""What TensorBoard gets to see: the report once, its numbers after every epoch, and nothing that holds memory."""

import itertools
import pathlib

import emulated
import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from keras import layers

import graphswap
from graphswap import callback

X, Y = np.ones((64, 256), "float32"), np.ones((64, 1), "float32")
ALWAYS = {
    "memory/budget_bytes",
    "memory/predicted_peak_bytes",
    "memory/swapped_bytes",
    "time/predicted_seconds",
    "time/measured_seconds",
    "time/recomputed_seconds",
}


def small_model(**options):
    """Each activation has 512 KiB: 64 KiB would stay where they are."""
    wide = [layers.Dense(2048, "relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((256,)), *wide, layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    return model


def evict_all():
    return graphswap.Options("min", strategy=trainings.EvictAll(), swap_to="host", planning_seconds=0.5)


def events(log_dir):
    """The events of the newest file, the first record apart."""
    newest = max(pathlib.Path(log_dir, "graphswap").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    first, *rest = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(newest))]
    assert first.file_version == "brain.Event:2"
    return rest


def written(log_dir):
    """By epoch, the number of each tag."""
    return {
        event.step: {value.tag: tf.make_ndarray(value.tensor).item() for value in event.summary.value}
        for event in events(log_dir)
        if event.summary.value[0].metadata.plugin_data.plugin_name == "scalars"
    }


def test_the_report_comes_once_and_the_numbers_after_every_epoch(tmp_path):
    model = small_model(graphswap=evict_all())
    model.fit(X, Y, batch_size=32, epochs=3, verbose=0, callbacks=[callback.ReportCallback(tmp_path)])
    text, *rest = events(tmp_path)
    (value,) = text.summary.value
    assert (value.tag, value.metadata.plugin_data.plugin_name) == ("report", "text")
    lines = tf.make_ndarray(value.tensor).item().decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert lines[0].endswith(": rewritten") and any("budget" in line for line in lines)
    assert [event.step for event in rest] == [0, 1, 2]
    numbers, step = written(tmp_path), graphswap.report(model).step
    for epoch in range(3):
        assert set(numbers[epoch]) == ALWAYS
    last = numbers[2]
    assert last["memory/budget_bytes"] == step.memory_budget
    assert last["memory/swapped_bytes"] == step.swapped_bytes > 0
    assert last["time/measured_seconds"] == pytest.approx(np.median(step.measured_seconds[1:]))
    assert last["time/recomputed_seconds"] == pytest.approx(step.recomputed_seconds)


def test_the_files_are_those_of_tensorboard(tmp_path):
    model = small_model(graphswap="1GiB")
    model.fit(X, Y, verbose=0, callbacks=[callback.ReportCallback(tmp_path)])
    values = list(itertools.chain.from_iterable(event.summary.value for event in events(tmp_path)))
    classes = {value.metadata.plugin_data.plugin_name: value.metadata.data_class for value in values}
    assert classes == {"text": 2, "scalars": 1}  # DATA_CLASS_TENSOR, DATA_CLASS_SCALAR
    assert {value.tensor.dtype for value in values} == {tf.string.as_datatype_enum, tf.float32.as_datatype_enum}
    assert all(list(value.tensor.tensor_shape.dim) == [] for value in values)


def test_a_second_training_gets_a_file_of_its_own(tmp_path):
    model, reporter = small_model(graphswap="1GiB"), callback.ReportCallback(str(tmp_path / "new" / "logs"))
    for _ in range(2):
        model.fit(X, Y, verbose=0, callbacks=[reporter])
    assert len(list((tmp_path / "new" / "logs" / "graphswap").iterdir())) == 2
    assert len(events(tmp_path / "new" / "logs")) == 2


def test_a_model_without_graphswap_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a model compiled with graphswap=") as caught:
        small_model().fit(X, Y, verbose=0, callbacks=[callback.ReportCallback(tmp_path)])
    assert str(caught.value).endswith('Compile it with model.compile(..., graphswap="2GiB").')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = small_model(graphswap="1GiB")
    with pytest.raises(ValueError) as caught:
        model.fit(X, Y, verbose=0, callbacks=[callback.ReportCallback(tmp_path / "file")])
    assert str(caught.value) == (
        f"log_dir: expected a folder that takes files, received '{tmp_path / 'file'}' (Not a directory). "
        "Name another one."
    )
    assert not graphswap.report(model).steps


def test_a_file_that_can_not_be_opened_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(path):
        raise tf.errors.PermissionDeniedError(None, None, "Permission denied")

    monkeypatch.setattr(tf.io, "TFRecordWriter", refuse)
    with pytest.raises(ValueError, match=r"received '.*' \(Permission denied\). Name another one."):
        small_model(graphswap="1GiB").fit(X, Y, verbose=0, callbacks=[callback.ReportCallback(tmp_path)])


def test_a_measured_peak_is_written_and_writing_holds_no_device_memory(tmp_path):
    peaks = emulated.call(1 << 29, __file__, "train", str(tmp_path))
    numbers = written(tmp_path)
    for epoch in range(2):
        assert set(numbers[epoch]) == ALWAYS | {"memory/measured_peak_bytes"}
    assert numbers[1]["memory/measured_peak_bytes"] == pytest.approx(peaks["measured"])
    assert numbers[1]["memory/measured_peak_bytes"] <= numbers[1]["memory/budget_bytes"]
    assert peaks["held_by_writing"] == 0


def train(log_dir):
    model = small_model(graphswap="300MiB")
    model.fit(X, Y, batch_size=32, epochs=2, verbose=0, callbacks=[callback.ReportCallback(log_dir)])
    again = callback.ReportCallback(f"{log_dir}/again")
    again.set_model(model)
    tf.config.experimental.reset_memory_stats("CPU:0")
    again.on_train_begin()
    again.on_train_batch_end(0)
    again.on_epoch_end(0)
    again.on_train_end()
    memory = tf.config.experimental.get_memory_info("CPU:0")
    return {
        "measured": graphswap.report(model).step.measured_peak_bytes,
        "held_by_writing": memory["peak"] - memory["current"],
    }


if __name__ == "__main__":
    emulated.main(globals())

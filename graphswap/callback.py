"""The report in TensorBoard: a Keras callback that writes what was planned, what was predicted and what was measured.

The files are written record by record. TensorFlow's own summary ops would need the package `tensorboard`, and would
make tensors on the device whose memory is counted.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import socket
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from graphswap.report import StepReport, report

RUN = "graphswap"
"""The folder in `log_dir`, and so the run's name in TensorBoard."""

_FILES = itertools.count()


class ReportCallback(keras.callbacks.Callback):
    """Shows the report of a model compiled with graphswap in TensorBoard.

    After the first step it writes the report's text, and at the end of every epoch the step's peak, budget, swapped
    bytes and seconds.

    Args:
        log_dir: As of `keras.callbacks.TensorBoard`, which may write there, too.
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        super().__init__()
        self.log_dir = pathlib.Path(log_dir)
        self._file: Any = None
        self._told = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Opens the file.

        Raises:
            ValueError: If the model was compiled without graphswap, or if the file can't be written.
        """
        report(self.model)
        self._file, self._told = _opened(self.log_dir / RUN), False

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self._told:
            self._told = True
            self._write(0, [_text("report", str(report(self.model)))])

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        values = scalars(report(self.model).step)
        self._write(epoch, [_scalar(tag, value) for tag, value in values.items()])

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._file.close()

    def _write(self, step: int, values: list[Any]) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), step=step, summary=tf.compat.v1.Summary(value=values))
        self._file.write(event.SerializeToString())
        self._file.flush()


def scalars(step: StepReport) -> dict[str, float]:
    """What is written at the end of an epoch, by tag. What was not measured is left out."""
    values: dict[str, float | None] = {
        "memory/budget_bytes": step.memory_budget,
        "memory/predicted_peak_bytes": step.predicted_peak_bytes,
        "memory/measured_peak_bytes": step.measured_peak_bytes,
        "memory/swapped_bytes": step.swapped_bytes,
        "time/predicted_seconds": step.predicted_seconds,
        "time/measured_seconds": step.step_seconds,
        "time/recomputed_seconds": step.recomputed_seconds,
    }
    return {tag: float(value) for tag, value in values.items() if value is not None}


# --- TensorBoard's files ----------------------------------------------------------------------------------------


def _opened(folder: pathlib.Path) -> Any:
    """A new file in the folder, its first record written."""
    # TensorBoard looks for "tfevents" in the name, and reads files in the order of their names.
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILES)}"
    first = tf.compat.v1.Event(wall_time=time.time(), file_version="brain.Event:2")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tf.io.TFRecordWriter(str(folder / name))
        file.write(first.SerializeToString())
        file.flush()
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", error)
        raise ValueError(
            f"log_dir: expected a folder that takes files, received '{folder.parent}' ({reason}). Name another one."
        ) from error
    return file


def _scalar(tag: str, value: float) -> Any:
    return _value(tag, "scalars", "DATA_CLASS_SCALAR", tf.make_tensor_proto(np.float32(value)))


def _text(tag: str, text: str) -> Any:
    """A text in fixed width: TensorBoard takes it for Markdown, where four spaces say so."""
    return _value(tag, "text", "DATA_CLASS_TENSOR", tf.make_tensor_proto(textwrap.indent(text, "    ")))


def _value(tag: str, plugin: str, data_class: str, tensor: Any) -> Any:
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class
    )
    return tf.compat.v1.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)

"""Training steps of a Keras model with parameter servers: gradients by workers, updates where the variables live.

A worker computes gradients and changes nothing: what the step would assign are results. Gradients go to the parameter
servers, into buffers of the worker's share of the batch, so that a share that is done once more, as its worker was
lost, is counted once. Then the optimizer of the model runs there, called by the chief: one update after the other.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from graphswap import parameter_server
from graphswap.options import Options


class Training:
    """Trains a model that was compiled under ParameterServerStrategy.

    Args:
        model: The model.
        options: What the user asked for; None to train without planning.
    """

    def __init__(self, model: keras.Model, options: Options | None):
        self._model = model
        self._options = options
        self._is_synchronous = options is None or not options.asynchronous
        self._buffers: list[list[tf.Variable]] = []  # for the gradients of each share
        self._trained: list[bool] = []  # which of the weights have a gradient
        self._assigned: list[keras.Variable] = []  # what a step assigns besides
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()  # buffer, and what will come of a step
        self._logs: Mapping[str, Any] = {}

    @functools.cached_property
    def session(self) -> parameter_server.WorkerSession:
        """The plans of what workers run, and the report of them.

        Raises:
            ValueError: If TF_CONFIG lacks something, or the options ask for what workers can't do.
        """
        return parameter_server.WorkerSession(self._options, self._workers)

    @functools.cached_property
    def _workers(self) -> parameter_server.Workers:
        return parameter_server.Workers(self._model.distribute_strategy)

    # --- steps -------------------------------------------------------------------------------------------------

    def run(self, batch: Any) -> Mapping[str, Any]:
        """Trains on a batch.

        Synchronously all workers take a share of the batch, and weights change once for all of it. Asynchronously it is
        one worker's, whose gradients count when they come: the metrics are those of the batches that are done.

        Args:
            batch: Nested arrays or tensors, or None, the first dimension that of the examples.

        Returns:
            The model's metrics.

        Raises:
            InfeasibleBudgetError: If no plan keeps the budget.
            UnsupportedGraphError: If the step can't be planned.
            ValueError: If the model's train step does what workers can't.
            WorkerError: If processes differ, or the servers have no room.
        """
        self._prepare()
        batch = tf.nest.map_structure(_tensor, batch)
        if not self._is_synchronous:
            if not self.session.is_planned((batch, self._buffers[0])):  # planning looks at workers between two steps
                self._finish_pending()
            free = [index for index in range(len(self._buffers)) if index not in dict(self._pending)]
            if not free:
                self._finish_oldest()
                free = [index for index in range(len(self._buffers)) if index not in dict(self._pending)]
            self._pending.append((free[0], *self._scheduled([batch], free)))
            return self._logs
        start = time.perf_counter()
        shares = self._shares(batch)
        while True:
            try:
                results = self._scheduled(shares, range(len(shares)))
                self._workers.coordinator.join()
                updates = [result.fetch() for result in results]
            except tf.errors.ResourceExhaustedError as error:
                if not self.session.tighten(error):
                    raise
            else:
                break
        sizes = [_size(share) for share in shares]
        self._logs = self._apply(list(range(len(shares))), [size / sum(sizes) for size in sizes], updates)
        self.session.record(time.perf_counter() - start, (max(shares, key=_size), self._buffers[0]))
        return self._logs

    def finish(self) -> Mapping[str, Any]:
        """Waits for all that workers were given, and counts it. Returns the model's metrics; nothing without a step."""
        logs: Mapping[str, Any] = {}
        if self._buffers:
            self._finish_pending()
            self.session.record_peaks()
            logs, self._logs = self._logs, {}
        return logs

    def _finish_pending(self) -> None:
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        index, result = self._pending.popleft()
        try:
            update = result.fetch()
        except BaseException:
            self._pending.clear()
            with contextlib.suppress(Exception):  # of others, which are given up
                self._workers.coordinator.join()
            raise
        self._logs = self._apply([index], [1.0], [update])

    def _scheduled(self, shares: Sequence[Any], indices: Sequence[int]) -> list[Any]:
        """Has workers compute shares into buffers, once all of them are planned."""
        calls = [(share, self._buffers[index]) for share, index in zip(shares, indices, strict=False)]
        functions = [self.session.function(self._compute, call) for call in calls]
        schedule = self._workers.coordinator.schedule
        return [schedule(function, args=call) for function, call in zip(functions, calls, strict=True)]

    def _shares(self, batch: Any) -> list[Any]:
        """The workers' parts of a batch, whose sizes differ by one at most; none is empty."""
        size = _size(batch)
        count = min(self._workers.count, size)
        ends = [size * number // count for number in range(count + 1)]
        return [
            tf.nest.map_structure(lambda leaf: leaf if leaf is None else leaf[start:end], batch)  # noqa: B023
            for start, end in zip(ends, ends[1:], strict=False)
        ]

    def _prepare(self) -> None:
        """Makes the buffers for gradients, once all variables are there."""
        if self._buffers:
            return
        model = self._model
        weights = [_nbytes(weight) for weight in model.trainable_variables]
        others = sum(map(_nbytes, (*model.non_trainable_variables, *model.optimizer.variables)))
        self._workers.expect_room(sum(weights) * (1 + self._workers.count) + others)
        for _ in range(self._workers.count):
            self._buffers.append(
                [_buffer(model.distribute_strategy, weight.value) for weight in model.trainable_variables]
            )

    # --- what workers run --------------------------------------------------------------------------------------

    def _compute(self, batch: Any, buffers: Sequence[Any]) -> list[tf.Tensor]:
        """Computes gradients into buffers. Returns the new values of what else the step assigns."""
        model = self._model
        metrics = [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in model.metrics_variables]
        with keras.StatelessScope(metrics, collect_losses=True) as scope, _recorded(model.optimizer) as applied:
            initial = dict(scope.state_mapping)
            try:
                model.train_step(batch)
            except AttributeError:  # of a weight that was assigned: Keras finds no variable in it
                _expect_known(model, scope)
                raise
            _expect_known(model, scope)
            others = _assignable(model)
            values = {id(variable): (variable, scope.get_current_value(variable)) for variable in others}
        if len(applied) != 1:
            raise ValueError(
                f"graphswap: expected a train_step that calls the optimizer once, received one that does so "
                f"{len(applied)} times. Under ParameterServerStrategy such a model trains in a loop of its own only."
            )
        gradients = {id(weight): gradient for gradient, weight in applied[0] if gradient is not None}
        self._trained = [id(weight) in gradients for weight in model.trainable_variables]
        for weight, buffer in zip(model.trainable_variables, buffers, strict=True):
            if id(weight) in gradients:
                value = tf.convert_to_tensor(gradients[id(weight)])
                with tf.device(weight.value.device):
                    tf.raw_ops.AssignVariableOp(resource=buffer.handle, value=value)
        changed = [(v, new) for v, new in values.values() if new is not None and new is not initial.get(id(v))]
        self._assigned = [variable for variable, _ in changed]
        return [
            tf.convert_to_tensor(new - variable.value if self._is_added(variable, initial) else new)
            for variable, new in changed
        ]

    def _is_added(self, variable: Any, metrics: Container[int]) -> bool:
        """Whether of a variable its change counts, as another batch may have changed it meanwhile."""
        is_float = tf.as_dtype(variable.dtype).is_floating
        return not self._is_synchronous and is_float and id(variable) not in metrics

    # --- what parameter servers run ----------------------------------------------------------------------------

    def _apply(self, indices: list[int], shares: list[float], updates: list[Any]) -> Mapping[str, Any]:
        """Changes the model by what shares of a batch have come to.

        Args:
            indices: Of their buffers.
            shares: Their parts of the batch.
            updates: What `_compute` returned for each.
        """
        buffers = [self._buffers[index] for index in indices]
        with tf.device(self._model.optimizer.iterations.value.device):
            return self._update(tf.constant(shares), updates, buffers)

    @functools.cached_property
    def _update(self) -> Callable[..., Any]:
        return tf.function(self._updated, autograph=False, reduce_retracing=True)

    def _updated(self, shares: tf.Tensor, updates: list[Any], buffers: list[Any]) -> Mapping[str, Any]:
        model = self._model
        home = model.optimizer.iterations.value.device
        gradients = []
        for number, (weight, is_trained) in enumerate(zip(model.trainable_variables, self._trained, strict=True)):
            parts = []
            with tf.device(weight.value.device):
                for index in range(len(buffers) if is_trained else 0):
                    value = tf.raw_ops.ReadVariableOp(resource=buffers[index][number].handle, dtype=weight.value.dtype)
                    value = tf.ensure_shape(value, weight.shape)
                    parts.append(value if len(buffers) == 1 else value * tf.cast(shares[index], value.dtype))
                gradients.append(tf.add_n(parts) if parts else None)
        with tf.device(home):
            model.optimizer.apply(gradients, model.trainable_variables)
            metrics = {id(variable) for variable in model.metrics_variables}
            for variable, *values in zip(self._assigned, *updates, strict=True):
                if id(variable) in metrics or self._is_added(variable, metrics):
                    variable.assign(variable.value + tf.add_n(values))
                elif len(values) > 1 and values[0].dtype.is_floating and variable.aggregation != "only_first_replica":
                    parts = [value * tf.cast(shares[index], value.dtype) for index, value in enumerate(values)]
                    variable.assign(tf.add_n(parts))
                else:
                    variable.assign(values[0])
            return model.get_metrics_result()


def _assignable(model: keras.Model) -> list[Any]:
    """The variables that a step may assign itself."""
    return [*model.metrics_variables, *model.non_trainable_variables]


def _expect_known(model: keras.Model, scope: Any) -> None:
    """Raises a ValueError if a step in the scope has assigned other variables."""
    lost = {*scope.state_mapping} - {*map(id, _assignable(model))}
    if lost:
        known = (*model.trainable_variables, *model.optimizer.variables)
        names = [variable.path for variable in known if id(variable) in lost] or ["a variable of no layer"]
        raise ValueError(
            "graphswap: expected a train_step that assigns metrics and variables that are not trained, received one "
            f"that assigns {', '.join(names)}. Under ParameterServerStrategy only the optimizer changes weights; "
            "leave the layer that does so out, or train in a loop of your own."
        )


@contextlib.contextmanager
def _recorded(optimizer: Any) -> Iterator[list[list[tuple[Any, Any]]]]:
    """Notes the gradients that the optimizer is called with inside, which does nothing with them."""
    applied: list[list[tuple[Any, Any]]] = []

    def apply(grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        weights = optimizer._trainable_variables if trainable_variables is None else trainable_variables
        applied.append(list(zip(grads, weights, strict=True)))

    object.__setattr__(optimizer, "apply", apply)
    try:
        yield applied
    finally:
        object.__delattr__(optimizer, "apply")


def _buffer(distribution: tf.distribute.Strategy, weight: tf.Variable) -> tf.Variable:
    """A variable of the same shape in the same place."""

    def zeros() -> tf.Tensor:
        with tf.device(weight.device):
            return tf.zeros(weight.shape, weight.dtype)

    with distribution.scope(), distribution.extended.colocate_vars_with(weight):
        return tf.Variable(zeros, trainable=False, shape=weight.shape, dtype=weight.dtype)


def _tensor(leaf: Any) -> tf.Tensor | None:
    """A leaf of a batch; Keras's adapters make an empty optional of None."""
    return None if leaf is None or isinstance(leaf, tf.experimental.Optional) else tf.convert_to_tensor(leaf)


def _size(batch: Any) -> int:
    return next(int(leaf.shape[0]) for leaf in tf.nest.flatten(batch) if leaf is not None)


def _nbytes(variable: Any) -> int:
    return tf.TensorShape(variable.shape).num_elements() * tf.as_dtype(variable.dtype).size

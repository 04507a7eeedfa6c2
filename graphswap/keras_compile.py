"""The Keras compile option: `model.compile(..., graphswap="2GiB")`.

Three methods of Keras are extended: `Trainer.compile` takes the option, `Trainer.get_compile_config` saves
it with the model, `TensorFlowTrainer.make_train_function` runs the training step through a `Session`.

Four are mended, as Keras 3.15 can't `fit` or `evaluate` under MultiWorkerMirroredStrategy (keras-team/keras#20585):
`TensorFlowTrainer._maybe_symbolic_build` averages a whole batch over all workers to learn its shapes, which TensorFlow
refuses, `reduce_per_replica` averages losses and metrics along an axis that scalars don't have, and with
`BackupAndRestore` (`_save_model`, `on_train_end`) all workers would write the same files. `fit` itself says what to do
where a process is lost.

Four more make `fit`, `evaluate` and `predict` work under ParameterServerStrategy (keras-team/keras#18624):
`TFEpochIterator.__init__` would have workers read the dataset, which is the chief's here, `make_test_function` and
`make_predict_function` would ask for them, and `Trainer._get_metrics_result_or_logs` does not wait for them.

`disable` puts all of them back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import trainer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer, TFEpochIterator
from keras.src.callbacks.backup_and_restore import BackupAndRestore
from keras.src.trainers.trainer import Trainer

from graphswap import distribute, graphdef, keras_training, model_state, pipeline
from graphswap.host_variable import read_alone
from graphswap.options import Options

_PACKAGE = "graphswap"
_originals: dict[str, Any] = {}


def enable() -> None:
    """Registers the compile option. Doing it twice changes nothing."""
    if _originals:
        return
    keras.saving.register_keras_serializable(package=_PACKAGE)(Options)
    _originals["compile"] = Trainer.compile
    _originals["get_compile_config"] = Trainer.get_compile_config
    _originals["make_train_function"] = TensorFlowTrainer.make_train_function
    _originals["_maybe_symbolic_build"] = TensorFlowTrainer._maybe_symbolic_build
    _originals["reduce_per_replica"] = trainer.reduce_per_replica
    _originals["TFEpochIterator"] = TFEpochIterator.__init__
    _originals["make_test_function"] = TensorFlowTrainer.make_test_function
    _originals["make_predict_function"] = TensorFlowTrainer.make_predict_function
    _originals["_get_metrics_result_or_logs"] = Trainer._get_metrics_result_or_logs
    _originals["fit"] = TensorFlowTrainer.fit
    _originals["_save_model"] = BackupAndRestore._save_model
    _originals["on_train_end"] = BackupAndRestore.on_train_end
    Trainer.compile = functools.wraps(Trainer.compile)(_compile)
    Trainer.get_compile_config = functools.wraps(Trainer.get_compile_config)(_get_compile_config)
    TensorFlowTrainer.make_train_function = functools.wraps(TensorFlowTrainer.make_train_function)(_make_train_function)
    TensorFlowTrainer._maybe_symbolic_build = functools.wraps(TensorFlowTrainer._maybe_symbolic_build)(_maybe_build)
    trainer.reduce_per_replica = functools.wraps(trainer.reduce_per_replica)(_reduce_per_replica)
    TFEpochIterator.__init__ = functools.wraps(TFEpochIterator.__init__)(_epoch_iterator)
    for name in ("make_test_function", "make_predict_function"):
        setattr(TensorFlowTrainer, name, functools.partialmethod(_make_on_chief, name))
    Trainer._get_metrics_result_or_logs = functools.wraps(Trainer._get_metrics_result_or_logs)(_result_or_logs)
    TensorFlowTrainer.fit = distribute.noting_lost_processes()(TensorFlowTrainer.fit)
    BackupAndRestore._save_model = functools.wraps(BackupAndRestore._save_model)(_save_backup)
    BackupAndRestore.on_train_end = functools.wraps(BackupAndRestore.on_train_end)(_drop_backup)


def disable() -> None:
    """Removes the compile option. Models compiled with it train plainly once their train function is made anew."""
    if not _originals:
        return
    Trainer.compile = _originals.pop("compile")
    Trainer.get_compile_config = _originals.pop("get_compile_config")
    TensorFlowTrainer.make_train_function = _originals.pop("make_train_function")
    TensorFlowTrainer._maybe_symbolic_build = _originals.pop("_maybe_symbolic_build")
    trainer.reduce_per_replica = _originals.pop("reduce_per_replica")
    TFEpochIterator.__init__ = _originals.pop("TFEpochIterator")
    TensorFlowTrainer.make_test_function = _originals.pop("make_test_function")
    TensorFlowTrainer.make_predict_function = _originals.pop("make_predict_function")
    Trainer._get_metrics_result_or_logs = _originals.pop("_get_metrics_result_or_logs")
    TensorFlowTrainer.fit = _originals.pop("fit")
    BackupAndRestore._save_model = _originals.pop("_save_model")
    BackupAndRestore.on_train_end = _originals.pop("on_train_end")
    keras.saving.get_custom_objects().pop(f"{_PACKAGE}>Options", None)
    graphdef.off_traced()


def _compile(self: Any, *args: Any, graphswap: Any = None, **kwargs: Any) -> None:
    options = None if graphswap is None else Options.from_value(graphswap)
    session = None
    if options is not None:
        _refuse(self, options, args, kwargs)
        # Keras's own "auto" is its default, so that it can't mean to try both back ends.
        args, kwargs["jit_compile"] = args[:_JIT_COMPILE], _named(args, kwargs).get("jit_compile") is True
        if not _has_servers(self.distribute_strategy):
            variables = functools.partial(model_state.named_variables, self)
            slots = functools.partial(_slots, self)
            session = pipeline.session(options, kwargs["jit_compile"], variables, slots)
    training = None
    if _has_servers(self.distribute_strategy):
        training = keras_training.Training(self, options)
        session = None if options is None else training.session
    _originals["compile"](self, *args, **kwargs)
    # Keras tracks what is set as an attribute; a session is none of the model's parts.
    object.__setattr__(self, "_graphswap_options", options)
    object.__setattr__(self, "_graphswap_session", session)
    object.__setattr__(self, "_graphswap_training", training)


_NAMES = (
    *("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics", "run_eagerly"),
    *("steps_per_execution", "jit_compile"),
)
"""What `Trainer.compile` takes by position."""
_JIT_COMPILE = _NAMES.index("jit_compile")


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def _refuse(model: Any, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises for what graphswap can't be combined with, before anything is compiled."""
    given = _named(args, kwargs)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"graphswap: expected Keras on the TensorFlow backend, received '{keras.backend.backend()}'. "
            "Set KERAS_BACKEND=tensorflow."
        )
    if given.get("run_eagerly"):
        raise ValueError(
            "graphswap: expected run_eagerly=False, received True. graphswap rewrites the graph of the training step, "
            "and an eager step has none. Leave run_eagerly out, or compile without graphswap."
        )
    if given.get("optimizer", "rmsprop") is None:
        raise ValueError(
            "graphswap: expected an optimizer, received optimizer=None. Without one there is no training step to "
            "rewrite. Name an optimizer, or compile without graphswap."
        )
    has_servers = _has_servers(model.distribute_strategy)
    if options.shard_optimizer and (has_servers or not _is_alone_or_multi_worker(model.distribute_strategy)):
        raise ValueError(
            f"graphswap: expected shard_optimizer=False under {type(model.distribute_strategy).__name__}, received "
            "True. Optimizer state is divided among the workers of a MultiWorkerMirroredStrategy. Leave "
            "shard_optimizer out."
        )
    if model._distribute_strategy is not None and not has_servers:
        distribute.check(model.distribute_strategy)
    if options.asynchronous and not has_servers:
        raise ValueError(
            "graphswap: expected asynchronous=False without parameter servers, received True. Make the model in the "
            "scope of a ParameterServerStrategy, or leave asynchronous out."
        )
    asked = options.jit_compile or given.get("jit_compile") is True
    if asked and (has_servers or model.distribute_strategy.num_replicas_in_sync > 1):
        raise ValueError(
            f"graphswap: expected jit_compile=False with several workers or devices, received {asked!r}. XLA inside "
            "TensorFlow compiles a step for one device, and no collectives for CPUs. Leave jit_compile out, or compile "
            "without graphswap."
        )


def _get_compile_config(self: Any) -> Any:
    config = _originals["get_compile_config"](self)
    options = getattr(self, "_graphswap_options", None)
    if not config or options is None:
        return config
    return {**config, "graphswap": keras.saving.serialize_keras_object(options)}


def _make_train_function(self: Any, force: bool = False) -> Any:
    session, training = getattr(self, "_graphswap_session", None), getattr(self, "_graphswap_training", None)
    if session is None and training is None:
        return _originals["make_train_function"](self, force)
    if self.train_function is not None and not force:
        return self.train_function
    if training is not None:
        self.train_function = functools.partial(_train_with_servers, self, training)
        return None
    assert session is not None
    train_step, distribution = self.train_step, self.distribute_strategy

    @tf.autograph.experimental.do_not_convert
    def step(batch: Any) -> Any:
        outputs = distribution.run(train_step, args=(batch,))
        return trainer.reduce_per_replica(outputs, distribution, reduction="auto")

    def make(running: pipeline.Session) -> Any:
        @tf.autograph.experimental.do_not_convert
        def one_step_on_data(data: Any) -> Any:
            return running.trace(step, data)

        function = one_step_on_data
        if not self.run_eagerly:  # else `trace` refuses
            function = tf.function(function, reduce_retracing=True, jit_compile=running.jit_compile)
        return self._autoconvert_optionals(function)

    def train_function(iterator: Any) -> Any:
        # One batch at a time, so that a step can be repeated and its true shapes are known.
        outputs = None
        for _ in range(self.steps_per_execution):
            try:
                batch = distribute.local_batch(distribution, next(iterator))
            except StopIteration:
                break
            with distribution.scope(), _making_optimizer(self):
                _build(self, distribute.local_value(distribution, batch))
            outputs = session.run(make, batch)
        if outputs is None:
            raise StopIteration
        return outputs

    self.train_function = train_function
    return None


def _train_with_servers(self: Any, training: keras_training.Training, iterator: Any) -> Any:
    """Trains on the next batches."""
    logs = None
    for _ in range(self.steps_per_execution):
        try:
            batch = next(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            break
        with self.distribute_strategy.scope():
            _build(self, batch)
        logs = training.run(batch)
    if logs is None:
        raise StopIteration
    return logs


def _has_servers(distribution: Any) -> bool:
    return isinstance(distribution, tf.distribute.ParameterServerStrategy)


class _Local:
    """In the place of a distribution: datasets are read by this process."""

    @staticmethod
    def experimental_distribute_dataset(dataset: Any) -> Any:
        return dataset


def _epoch_iterator(self: Any, distribute_strategy: Any = None, *args: Any, **kwargs: Any) -> None:
    """Keras's method, with datasets under ParameterServerStrategy left to the chief."""
    local = _Local() if _has_servers(distribute_strategy) else distribute_strategy
    _originals["TFEpochIterator"](self, local, *args, **kwargs)


def _make_on_chief(self: Any, name: str, force: bool = False) -> Any:
    """Keras's method of that name, whose function the chief runs under ParameterServerStrategy."""
    attribute = name.removeprefix("make_")
    before = getattr(self, attribute)
    result = _originals[name](self, force)
    made = getattr(self, attribute)
    if made is before or not _has_servers(self.distribute_strategy):
        return result

    def function(*args: Any) -> Any:
        with _without_distribution(self):
            return made(*args)

    setattr(self, attribute, function)
    return result


@contextlib.contextmanager
def _without_distribution(model: Any) -> Iterator[None]:
    distribution, model._distribute_strategy = model._distribute_strategy, None
    try:
        yield
    finally:
        model._distribute_strategy = distribution


def _result_or_logs(self: Any, logs: Any) -> Any:
    """Keras's method, after all that workers were given."""
    training = getattr(self, "_graphswap_training", None)
    if training is not None:
        logs = training.finish() or logs
    return _originals["_get_metrics_result_or_logs"](self, logs)


def _maybe_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Keras's method, with a worker's own part of a batch in the place of all workers' average."""
    distribution = self.distribute_strategy
    if iterator is not None and _is_multi_worker(distribution):
        for _, _, batches in iterator:
            iterator, data_batch = None, distribute.local_value(distribution, next(batches))
            break
    with contextlib.ExitStack() as stack:
        if _is_multi_worker(distribution):  # others build when the step is traced
            stack.enter_context(distribution.scope())
            stack.enter_context(_making_optimizer(self))
        _originals["_maybe_symbolic_build"](self, iterator, data_batch)


def _reduce_per_replica(values: Any, distribution: Any, reduction: str) -> Any:
    """Keras's function, with the workers' average of what has no axis to average along."""
    try:
        return _originals["reduce_per_replica"](values, distribution, reduction)
    except ValueError as error:
        if not (_is_multi_worker(distribution) and "Invalid reduction dimension" in str(error)):
            raise
    return tf.nest.map_structure(lambda value: distribution.reduce("MEAN", value, axis=None), values)


def _save_backup(self: BackupAndRestore) -> None:
    """Keras's method, on one of several workers: all of them restore what it has saved."""
    distribution = self.model.distribute_strategy
    if not _is_multi_worker(distribution):
        _originals["_save_model"](self)
        return
    with read_alone(_slots(self.model)):
        if distribution.extended.should_checkpoint:
            _originals["_save_model"](self)


def _drop_backup(self: BackupAndRestore, logs: Any = None) -> None:
    """Keras's method, on one of several workers; none goes on before, to another `fit` that would restore it."""
    distribution = self.model.distribute_strategy
    if not _is_multi_worker(distribution):
        _originals["on_train_end"](self, logs)
        return
    if distribution.extended.should_checkpoint:
        _originals["on_train_end"](self, logs)
    distribution.reduce("SUM", distribution.run(lambda: tf.constant(1.0)), axis=None)


def _is_multi_worker(distribution: Any) -> bool:
    is_mirrored = isinstance(distribution, tf.distribute.MultiWorkerMirroredStrategy)
    return is_mirrored and bool(distribution.cluster_resolver.cluster_spec())


def _is_alone_or_multi_worker(distribution: Any) -> bool:
    return distribution.num_replicas_in_sync == 1 or _is_multi_worker(distribution)


def _slots(model: Any) -> list[tf.Variable]:
    """The optimizer's variables, as they are on this process's devices."""
    optimizer = getattr(model, "optimizer", None)
    values = [variable.value for variable in (optimizer.variables if optimizer is not None else ())]
    return [part for value in values for part in getattr(value, "values", (value,))]


def _making_optimizer(model: Any) -> contextlib.AbstractContextManager[None]:
    """For a model's optimizer, whose variables are made inside if they have not been yet."""
    session, optimizer = getattr(model, "_graphswap_session", None), getattr(model, "optimizer", None)
    if session is None or optimizer is None or optimizer.built:
        return contextlib.nullcontext()
    return pipeline.making_optimizer(session, model.trainable_variables if model.built else [])


def _build(model: Any, batch: Any) -> None:
    """Makes the variables of a step before it is traced; otherwise TensorFlow would trace, and plan, twice."""
    if type(model).train_step is TensorFlowTrainer.train_step:
        model._symbolic_build(data_batch=batch)
    elif model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)

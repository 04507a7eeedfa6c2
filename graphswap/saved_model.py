"""SavedModels: finds a function in one, and writes a copy in which that function computes another graph.

Only the function's definition changes. Variables, assets, signatures, and the names in checkpoints stay byte for byte
what they were, so the copy needs TensorFlow only, neither Keras nor graphswap.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, node_def_pb2, types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from graphswap import graphdef, new_directory

_FILE = "saved_model.pb"
_FINGERPRINT = "fingerprint.pb"


_UPDATE = re.compile(
    "Assign|Rng|Stateful(Standard|Truncated|Uniform|Random)|Resource(Sparse)?Apply|Resource(Scatter|StridedSliceAssign)"
)


class SavedModelError(ValueError):
    """A SavedModel that is none, or that does not hold what was asked for. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of a SavedModel.

    Attributes:
        directory: The SavedModel.
        name: What it is called there: an attribute of the saved object, or a signature.
        definition: Name of its definition in the file.
        concrete: The function as loaded.
        owner: What was loaded: it keeps the variables alive.
    """

    directory: pathlib.Path
    name: str
    definition: str
    concrete: Any
    owner: Any

    @property
    def arguments(self) -> tuple[tf.TensorSpec, ...]:
        """What it is called with, flat."""
        args, kwargs = self.concrete.structured_input_signature
        return tuple(leaf for leaf in tf.nest.flatten((args, kwargs)) if isinstance(leaf, tf.TensorSpec))

    def __call__(self, *arguments: tf.Tensor) -> Any:
        signature = self.concrete.structured_input_signature
        given = iter(arguments)
        leaves = [next(given) if isinstance(leaf, tf.TensorSpec) else leaf for leaf in tf.nest.flatten(signature)]
        args, kwargs = tf.nest.pack_sequence_as(signature, leaves)
        return self.concrete(*args, **kwargs)

    def update(self) -> str | None:
        """An op that changes a variable, as in a training step; None if there is none."""
        return update(self.concrete)

    def nodes(self) -> Iterator[Any]:
        """The definitions of its nodes, and of those of all functions that it calls."""
        return nodes(self.concrete)


def nodes(concrete: Any) -> Iterator[Any]:
    """The definitions of a concrete function's nodes, and of those of all functions that it calls."""
    for definition in (concrete.function_def, *graphdef.called_definitions(concrete.function_def)):
        yield from definition.node_def


def update(concrete: Any) -> str | None:
    """An op that changes a variable, in a concrete function or one that it calls; None if there is none."""
    return next((node.op for node in nodes(concrete) if _UPDATE.match(node.op)), None)


def first_line(error: Exception) -> str:
    """The first line of what an error says, else its type, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def load(directory: str | os.PathLike[str], function: str) -> Function:
    """Loads a SavedModel and finds a function in it.

    Args:
        directory: The SavedModel.
        function: An attribute of the saved object that is a tf.function with one input signature, or a signature.

    Raises:
        SavedModelError: If there is no SavedModel, if it can't be read, or if it has no such function.
    """
    path = pathlib.Path(directory)
    model = _read(path)
    try:
        owner = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow raises what it likes for what it can't read
        raise SavedModelError(
            f"expected a SavedModel that TensorFlow can load, received '{path}', of which it says: "
            f"{first_line(error)}. Save it again."
        ) from error
    definitions = _definitions(model)
    if function not in definitions:
        raise SavedModelError(
            f"expected a function of '{path}', received '{function}'. "
            f"It has {', '.join(sorted(definitions)) or 'none'}. "
            "Name one of these, or save the function as an attribute: a tf.function with an input_signature."
        )
    if len(definitions[function]) != 1:
        raise SavedModelError(
            f"expected a function with one input signature, received '{function}' of '{path}', which was traced "
            f"{len(definitions[function])} times. Save it with tf.function(input_signature=...)."
        )
    restored = getattr(owner, function, None)
    concrete = owner.signatures[function] if restored is None else restored.concrete_functions[0]
    return Function(path, function, definitions[function][0], concrete, owner)


def write(function: Function, new: Any, output: str | os.PathLike[str]) -> None:
    """Writes the function's SavedModel anew, its definition replaced. Nothing is left behind if that fails.

    Args:
        function: The function.
        new: A ConcreteFunction with the same flat inputs, captures last, and the same flat outputs.
        output: A directory that does not exist yet.

    Raises:
        SavedModelError: If the directory exists or can't be written.
    """
    target = pathlib.Path(output)
    check_output(target)
    model = _read(function.directory)
    library = model.meta_graphs[0].graph_def.library.function
    definitions = {definition.signature.name: definition for definition in library}
    added = _named(new, f"{function.definition}_planned", set(definitions))
    _call(definitions[function.definition], added[0], [tensor.shape for tensor in new.graph.inputs])
    library.extend(added)
    with new_directory.made(target, SavedModelError) as directory:
        shutil.copytree(
            function.directory, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_FILE, _FINGERPRINT)
        )
        (directory / _FILE).write_bytes(model.SerializeToString(deterministic=True))
        graphdef.write_fingerprint(str(directory))


def check_output(target: pathlib.Path) -> None:
    """Raises SavedModelError if a directory can't be made there."""
    new_directory.check(target, SavedModelError)


def _read(path: pathlib.Path) -> Any:
    if path.is_file():
        raise SavedModelError(
            f"expected a directory with a SavedModel, received the file '{path}'. A frozen graph has no variables that "
            "a step could train: save the model with tf.saved_model.save."
        )
    file = path / _FILE
    if not file.is_file():
        frozen = sorted(found.name for found in path.glob("*.pb")) if path.is_dir() else []
        advice = (
            f"There is {', '.join(frozen)}, which may be a frozen graph: it has no variables that a step could train. "
            if frozen
            else ""
        )
        raise SavedModelError(
            f"expected a directory with {_FILE}, received '{path}'. {advice}"
            "Save the model with tf.saved_model.save, and name that directory."
        )
    model = saved_model_pb2.SavedModel()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own error type depends on how it was built
        raise SavedModelError(f"expected a SavedModel, received '{file}', which is damaged: {error}.") from error
    if not model.meta_graphs or not model.meta_graphs[0].HasField("object_graph_def"):
        raise SavedModelError(
            f"expected a SavedModel of TensorFlow 2, received '{file}', which holds none. "
            "Save the model with tf.saved_model.save."
        )
    return model


def _definitions(model: Any) -> Mapping[str, Sequence[str]]:
    """The definitions of each function: of the root's attributes, and of signatures."""
    nodes = model.meta_graphs[0].object_graph_def.nodes
    found: dict[str, Sequence[str]] = {}
    for child in nodes[0].children:
        node = nodes[child.node_id]
        if node.WhichOneof("kind") == "function":
            found[child.local_name] = list(node.function.concrete_functions)
        elif child.local_name == "signatures":
            for signature in node.children:
                wrapped = nodes[signature.node_id]
                if wrapped.WhichOneof("kind") == "bare_concrete_function":
                    found.setdefault(signature.local_name, [wrapped.bare_concrete_function.concrete_function_name])
    return found


def _named(new: Any, name: str, taken: set[str]) -> list[Any]:
    """The function's definition and those of what it calls, under names that are not taken."""
    definitions = [new.function_def, *graphdef.called_definitions(new.function_def)]
    names = {new.function_def.signature.name: _free_name(name, taken)}
    names |= {d.signature.name: _free_name(d.signature.name, taken) for d in definitions[1:]}
    copies = []
    for definition in definitions:
        copy = function_pb2.FunctionDef()
        copy.CopyFrom(definition)
        copy.signature.name = names[definition.signature.name]
        for node in copy.node_def:
            for attr in node.attr.values():
                for called in (attr.func, *attr.list.func):
                    if called.name in names:
                        called.name = names[called.name]
        copies.append(copy)
    return copies


def _call(definition: Any, planned: Any, shapes: Sequence[tf.TensorShape]) -> None:
    """Makes a definition call the planned one, on arguments of the planned shapes only.

    A call that is not dissolved has options of its own for TensorFlow's optimiser: whoever loads the copy need not know
    that its memory is planned already (`graphdef.without_memory_optimizer`).
    """
    planned.attr["_noinline"].b = True
    signature = definition.signature
    call = node_def_pb2.NodeDef(name="planned", op="StatefulPartitionedCall")
    checks = []
    for argument, shape in zip(signature.input_arg, shapes, strict=True):
        if argument.type == types_pb2.DT_RESOURCE:
            call.input.append(argument.name)
            continue
        check = node_def_pb2.NodeDef(name=f"EnsureShape/{argument.name}", op="EnsureShape", input=[argument.name])
        check.attr["T"].type = argument.type
        check.attr["shape"].shape.CopyFrom(shape.as_proto())
        checks.append(check)
        call.input.append(f"{check.name}:output:0")
    call.attr["Tin"].list.type.extend(argument.type for argument in signature.input_arg)
    call.attr["Tout"].list.type.extend(result.type for result in signature.output_arg)
    call.attr["f"].func.name = planned.signature.name
    call.attr["config"].s = b""
    call.attr["config_proto"].s = graphdef.planned_config()
    call.attr["executor_type"].s = b""
    definition.ClearField("node_def")
    definition.ClearField("ret")
    definition.ClearField("control_ret")
    definition.node_def.extend([*checks, call])
    for index, result in enumerate(signature.output_arg):
        definition.ret[result.name] = f"{call.name}:output:{index}"
    del signature.control_output[:]
    signature.control_output.append(call.name)
    definition.control_ret[call.name] = call.name


def _free_name(name: str, taken: set[str]) -> str:
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate

"""ONNX export: the forward function of a SavedModel as a file that onnxruntime runs, without graphswap's nodes.

A swap becomes what it copies, a repeated node its original, and control edges go: so a rewritten function gives the
graph that the plain one gives. That the file computes the same as TensorFlow is not assumed but tried.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from graphswap import graphdef, saved_model

NEWEST_OPSET = 18
"""tf2onnx 1.17 knows no newer one."""
TOLERANCE = 1e-5
"""How far results may differ, as a share of the largest of an output's values."""

_SEED = 0
_OPEN_SIZE = 2
_MOST_BYTES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        nodes: Number of nodes of its graph.
        inputs: Names of its inputs, in the order of the function's arguments.
        outputs: Names of its outputs.
        largest_difference: Between onnxruntime's results and TensorFlow's, as a share of the largest of an output's
            values.
    """

    path: pathlib.Path
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.nodes} nodes, from {', '.join(self.inputs)} to {', '.join(self.outputs)}; "
            f"onnxruntime differs from TensorFlow by {self.largest_difference:.1e}"
        )


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    function: str = "serving_default",
    *,
    arguments: Sequence[Any] | None = None,
    opset: int = NEWEST_OPSET,
) -> Exported:
    """Writes a forward function of a SavedModel as an ONNX file, once onnxruntime gives TensorFlow's results with it.

    Args:
        directory: The SavedModel.
        output: The file; there must be none yet. If anything fails, there is none afterwards either.
        function: Name of a signature, or of an attribute that is a `tf.function`.
        arguments: Arrays to try the file on. By default random ones: floats around 0, integers 0 and 1, and 2 where a
            size is open.
        opset: Version of ONNX's operators.

    Raises:
        ImportError: If tf2onnx, onnx or onnxruntime is missing.
        FileExistsError: If the file exists.
        FileNotFoundError: If its folder does not.
        SavedModelError: If there is no SavedModel, or no such function with one trace in it.
        ValueError: If the function changes variables, if ONNX has no counterpart of an op, or if the results differ.
    """
    if opset > NEWEST_OPSET:
        raise ValueError(f"opset: expected at most {NEWEST_OPSET}, received {opset}. tf2onnx knows no newer one.")
    path = pathlib.Path(output)
    _check_free(path)
    tf_loader, *_ = map(_extra, ("tf2onnx.tf_loader", "onnx", "onnxruntime"))
    found = saved_model.load(directory, function)
    _refuse_updates(found)
    _refuse_size(found)

    # TensorFlow's own freezing, by tf2onnx's name: variables become constants.
    flat = _flat(found)
    frozen = tf_loader.convert_variables_to_constants_v2(flat, lower_control_flow=False, aggressive_inlining=True)
    inputs = [tensor.op.name for tensor in frozen.inputs]
    outputs = dict(zip(_output_names(flat), frozen.outputs, strict=True))
    if not outputs:
        raise ValueError(
            f"'{function}': expected a function with results, received one without. Let it return tensors."
        )
    if arguments is None:
        arguments = [_random(function, tensor) for tensor in frozen.inputs]
    if len(arguments) != len(inputs):
        raise ValueError(
            f"arguments: expected {len(inputs)} ({', '.join(inputs)}), received {len(arguments)}. Give one for each."
        )
    definition = lowered(frozen.graph, outputs)
    content, nodes = _converted(function, definition, inputs, list(outputs), opset)
    expected = _run_tensorflow(found, definition, inputs, list(outputs), arguments)
    received = _run_onnx(function, content, dict(zip(inputs, arguments, strict=True)), list(outputs))
    largest = max(map(_difference, received, expected))
    if largest > TOLERANCE:
        raise ValueError(
            f"'{function}': expected onnxruntime's results to differ from TensorFlow's by at most {TOLERANCE:.0e} of "
            f"the largest value, received {largest:.1e}. Nothing was written. A function that draws random numbers "
            "can't be exported; if it draws none, try other arguments=... or another opset=..."
        )
    _write(path, content)
    return Exported(path, nodes, tuple(inputs), tuple(outputs), largest)


# --- lowering ---------------------------------------------------------------------------------------------------

_OUTPUT = "graphswap_output/"


def lowered(graph: tf.Graph, outputs: Mapping[str, tf.Tensor]) -> tf.compat.v1.GraphDef:
    """The definition of a graph without swaps, copies, repeated nodes and control edges.

    Args:
        graph: The graph, calls of functions dissolved.
        outputs: Its results by name. In the definition the nodes `graphswap_output/NAME` pass them on.
    """
    definition = tf.compat.v1.GraphDef()
    definition.library.CopyFrom(graph.as_graph_def().library)
    definition.versions.CopyFrom(graph.as_graph_def().versions)
    standing: dict[str, str] = {}  # tensor -> the tensor that stands for it
    known: dict[bytes, Any] = {}  # what an operation computes -> the first one that does
    for operation in graph.get_operations():
        source = _passed_on(operation)
        if source is not None:
            standing[operation.outputs[0].name] = standing[source.name]
            continue
        inputs = [_reference(standing[tensor.name]) for tensor in operation.inputs]
        node = tf.compat.v1.NodeDef(op=operation.type, input=inputs)
        for name, value in operation.node_def.attr.items():
            if not name.startswith("_"):
                node.attr[name].CopyFrom(value)
        first = operation
        if _is_repeatable(operation):
            first = known.setdefault(node.SerializeToString(deterministic=True), operation)
        standing.update((o.name, t.name) for o, t in zip(operation.outputs, first.outputs, strict=True))
        if first is operation:
            node.name = operation.name
            definition.node.append(node)
    for name, tensor in outputs.items():
        node = definition.node.add(name=f"{_OUTPUT}{name}", op="Identity", input=[_reference(standing[tensor.name])])
        node.attr["T"].type = tensor.dtype.as_datatype_enum
    return definition


def _is_repeatable(operation: Any) -> bool:
    """Whether two operations that look alike may become one. Each loop fills lists (variants) of its own."""
    return (
        operation.type != "Placeholder"
        and not operation.op_def.is_stateful
        and all(tensor.dtype != tf.variant for tensor in operation.outputs)
    )


def _reference(tensor_name: str) -> str:
    """What a definition calls a tensor. Grappler knows a first output only without its number."""
    return tensor_name.removesuffix(":0")


def _passed_on(operation: Any) -> tf.Tensor | None:
    """The tensor whose value an operation only passes on: as a copy, or as the end of a swap (see `tiers`)."""
    if operation.type in ("Identity", "_CopyFromGpuToHost", "_CopyFromHostToGpu"):
        return operation.inputs[0]
    if operation.type == "ParseTensor":
        writer = operation.inputs[0].op
        while writer.type in ("Identity", "ReadFile", "StringJoin", "Substr"):
            writer = writer.inputs[0].op
        return writer.inputs[0] if writer.type == "SerializeTensor" else None
    if operation.type == "Reshape" and operation.inputs[0].op.type == "InplaceUpdate":
        piece = _passed_on(operation.inputs[0].op.inputs[2].op)
        if piece is not None and piece.op.type == "Slice" and piece.op.inputs[0].op.type == "Reshape":
            return piece.op.inputs[0].op.inputs[0]
    return None


# --- conversion -------------------------------------------------------------------------------------------------


def _converted(
    name: str, definition: Any, inputs: Sequence[str], outputs: Sequence[str], opset: int
) -> tuple[bytes, int]:
    """The content of the file, and the number of its graph's nodes."""
    onnx, tf_loader, tfonnx, optimizer = map(
        _extra, ("onnx", "tf2onnx.tf_loader", "tf2onnx.tfonnx", "tf2onnx.optimizer")
    )
    arguments, results = _ends(inputs, outputs)
    try:
        with tf.Graph().as_default():
            optimized = tf_loader.tf_optimize(arguments, results, definition)
        with tf.Graph().as_default() as graph:
            tf.graph_util.import_graph_def(optimized, name="")
            converted = tfonnx.process_tf_graph(
                graph,
                continue_on_error=True,  # so that all ops it does not know are found
                opset=opset,
                input_names=arguments,
                output_names=results,
                custom_op_handlers={"Erfc": (_erfc, [])},
                tensors_to_rename=dict(zip([*arguments, *results], [*inputs, *outputs], strict=True)),
            )
        model = optimizer.optimize_graph(converted).make_model("written by graphswap")
    except Exception as error:  # it raises what it likes for what it can't convert
        raise _refused(name, "tf2onnx", error) from error
    unknown = _unknown_ops(model)
    if unknown:
        raise ValueError(
            f"'{name}': expected ops that ONNX has, received {', '.join(unknown)}. Nothing was written. "
            "Leave these ops out of the function that is exported."
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise _refused(name, "onnx.checker", error) from error
    return model.SerializeToString(), len(model.graph.node)


def _erfc(graph: Any, node: Any, *_: Any) -> None:
    """Adds what tf2onnx lacks for Keras's gelu: erfc(x) = 1 - erf(x)."""
    dtype = np.dtype(_extra("tf2onnx.utils").map_onnx_to_numpy_type(graph.get_dtype(node.output[0])))
    one = graph.make_const(f"{node.name}/one", np.ones((), dtype))
    node.type = "Erf"
    graph.insert_new_node_on_output("Sub", node.output[0], inputs=[one.output[0], node.output[0]])


def _ends(inputs: Sequence[str], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tensors of a lowered definition that are its arguments and results."""
    return [f"{name}:0" for name in inputs], [f"{_OUTPUT}{name}:0" for name in outputs]


def _unknown_ops(model: Any) -> list[str]:
    """Ops that ONNX does not have: tf2onnx leaves those of TensorFlow where it knows no counterpart."""
    has = _extra("onnx.defs").has
    versions = {entry.domain: entry.version for entry in model.opset_import}
    return sorted(
        {
            node.op_type
            for node in _nodes(model.graph)
            if not has(node.op_type, max_inclusive_version=versions.get(node.domain, 1), domain=node.domain)
        }
    )


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the graphs in their attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _refused(name: str, who: str, error: Exception) -> ValueError:
    return ValueError(
        f"'{name}': expected a function that {who} takes, received one of which it says: "
        f"{saved_model.first_line(error)}. Nothing was written. Try another opset=..., or export a part of the model."
    )


# --- the function -----------------------------------------------------------------------------------------------


def _flat(function: saved_model.Function) -> Any:
    """The function with the bodies of all that it calls in place of the calls, those of planned functions included."""

    def inlined(*arguments: tf.Tensor) -> Any:
        graph: Any = tf.compat.v1.get_default_graph()
        for variable in function.concrete.variables:  # or else freezing would not find them
            graph.watch_variable(variable)
        return graphdef.call_inline(function, arguments, {})

    return tf.function(inlined, autograph=False).get_concrete_function(*function.arguments)


def _refuse_updates(function: saved_model.Function) -> None:
    update = function.update()
    if update is None:
        return
    owner = function.owner
    attributes = {name: getattr(owner, name) for name in dir(owner) if not name.startswith("_")}
    traces = {
        name: value.concrete_functions for name, value in attributes.items() if hasattr(value, "concrete_functions")
    }
    traces |= {name: [concrete] for name, concrete in owner.signatures.items()}
    others = sorted(name for name, concretes in traces.items() if not any(map(saved_model.update, concretes)))
    advice = f"Export {' or '.join(others)}." if others else "Save the forward function as well, and export that."
    raise ValueError(
        f"'{function.name}': expected a forward function, received one that changes variables ({update}). ONNX has no "
        f"variables to update, and tf2onnx would write an empty graph without a word. {advice}"
    )


def _refuse_size(function: saved_model.Function) -> None:
    nbytes = sum(math.prod(variable.shape) * variable.dtype.size for variable in function.concrete.variables)
    if nbytes > _MOST_BYTES:
        raise ValueError(
            f"'{function.name}': expected variables of at most {_MOST_BYTES} bytes, received {nbytes}. An ONNX file "
            "holds no more. Export a part of the model."
        )


def _output_names(traced: Any) -> list[str]:
    """The keys of the results, or numbers."""
    results = traced.structured_outputs
    if isinstance(results, Mapping) and len(results) == len(traced.outputs):
        return sorted(results)
    return [f"output_{index}" for index in range(len(traced.outputs))]


# --- files and packages -----------------------------------------------------------------------------------------


def _check_free(path: pathlib.Path) -> None:
    if path.exists():
        raise FileExistsError(
            f"output: expected a new file, received '{path}', which exists. Remove it, or name another."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"output: expected a file in a folder that exists, received '{path}'. Make '{path.parent}' first."
        )


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes the file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _extra(name: str) -> Any:
    """A module of a package that only the export needs."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"exporting to ONNX needs {package}, which is not installed. Run `pip install graphswap[onnx]`."
        ) from error


# --- trying it out ----------------------------------------------------------------------------------------------


def _random(name: str, tensor: tf.Tensor) -> np.ndarray:
    """A random array for an argument, the same each time."""
    dtype = tensor.dtype
    if tensor.shape.rank is None or not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise ValueError(
            f"'{name}': expected arguments of known rank that are floats, integers or booleans, received "
            f"'{tensor.op.name}': {dtype.name} {tensor.shape}. Give arguments=... to try the file on."
        )
    random = np.random.default_rng(_SEED)
    shape = [_OPEN_SIZE if size is None else size for size in tensor.shape]
    values = random.standard_normal(shape) if dtype.is_floating else random.integers(0, 2, shape)
    return np.asarray(values, dtype.as_numpy_dtype)


def _run_tensorflow(
    function: saved_model.Function,
    definition: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    arguments: Sequence[Any],
) -> list[Any]:
    """The results of the function as it was saved, flat.

    If it swaps to files, those of the lowered definition: the files may be those of a training that still runs.
    """
    writes_files = any(node.op == "WriteFile" for node in function.nodes())
    run = _as_function(definition, inputs, outputs) if writes_files else function
    try:
        tensors = [tf.constant(array, spec.dtype) for array, spec in zip(arguments, function.arguments, strict=True)]
        return tf.nest.flatten(run(*tensors))
    except tf.errors.OpError as error:
        reason = re.sub(r"{{.*?}} *", "", error.message.splitlines()[0])
        raise ValueError(
            f"'{function.name}': expected arguments that TensorFlow can run it on, received some that it can't: "
            f"{reason}. Give others as arguments=..."
        ) from error


def _as_function(definition: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """The definition as something that TensorFlow runs."""
    wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    return wrapped.prune(
        *([wrapped.graph.get_tensor_by_name(name) for name in names] for names in _ends(inputs, outputs))
    )


def _run_onnx(name: str, content: bytes, arguments: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
    """The results of the file that is to be written."""
    onnxruntime = _extra("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        used = {argument.name for argument in session.get_inputs()}
        feed = {argument: np.asarray(array) for argument, array in arguments.items() if argument in used}
        return session.run(list(outputs), feed)
    except Exception as error:  # its errors have no class in common
        raise _refused(name, "onnxruntime", error) from error


def _difference(received: Any, expected: Any) -> float:
    """The largest difference as a share of the largest value; infinite if there is no comparing them."""
    received, expected = np.asarray(received, np.float64), np.asarray(expected, np.float64)
    if received.shape != expected.shape:
        return math.inf
    alike = (received == expected) | (np.isnan(received) & np.isnan(expected))
    if alike.all():
        return 0.0
    scale = np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0) or 1.0
    share = float(np.max(np.abs(received[~alike] - expected[~alike])) / scale)
    return math.inf if math.isnan(share) else share

"""A Graph as TensorFlow's bridge to XLA understands it, before and after XLA compiles it."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.python.eager import context as context_lib
from tensorflow.python.eager.polymorphic_function import concrete_function as concrete_function_lib

from graphswap import ir, tiers
from graphswap.graphdef.exporting import build_function
from graphswap.graphdef.traced import FuncGraph, UnsupportedGraphError


def hlo(func_graph: FuncGraph, graph: ir.Graph) -> Any:
    """What TensorFlow's bridge to XLA makes of the graph.

    Args:
        func_graph: The function that the graph was imported from.
        graph: The graph, without swaps.

    Returns:
        An HloModuleProto. Its parameters are `graph.inputs`, of a variable its value; its results are `graph.outputs`
        and then the new values of variables; `input_output_alias` says whose they are.

    Raises:
        UnsupportedGraphError: If XLA can't compile an op.
    """
    device = tf.config.list_logical_devices("CPU")[0].name
    function = build_function(func_graph, graph, tiers.Tiers())
    return hlo_pb2.HloModuleProto.FromString(_compiler_ir(func_graph, function, graph, device, "hlo_serialized"))


def compiled_hlo(
    func_graph: FuncGraph, function: concrete_function_lib.ConcreteFunction, graph: ir.Graph, device: str
) -> Any:
    """What XLA compiles the graph to, for one of TensorFlow's devices. Nothing runs.

    Args:
        func_graph: The function that the graph was imported from.
        function: What `build_function` made of the graph.
        graph: The graph, without swaps.
        device: "CPU:0" or "GPU:0".

    Returns:
        An HloProto: the module and its buffer assignment.

    Raises:
        UnsupportedGraphError: If XLA can't compile an op.
    """
    device = f"/job:localhost/replica:0/task:0/device:{device}"
    stage = "optimized_hlo_proto_serialized"
    return hlo_pb2.HloProto.FromString(_compiler_ir(func_graph, function, graph, device, stage))


def _compiler_ir(
    func_graph: FuncGraph, function: concrete_function_lib.ConcreteFunction, graph: ir.Graph, device: str, stage: str
) -> bytes:
    captures = [external for external, _ in func_graph.captures]
    count = len(graph.inputs) - len(captures)
    arguments = zip(graph.inputs[:count], func_graph.inputs[:count], strict=True)
    specs = [tf.TensorSpec(graph.value(name).shape, tensor.dtype) for name, tensor in arguments]
    try:
        with tf.init_scope():
            return context_lib.context().get_compiler_ir(
                device_name=device,
                platform_name=None,
                function_name=function.name,
                flat_args=specs,
                captured_inputs=captures,
                stage=stage,
            )
    except tf.errors.ResourceExhaustedError:
        raise
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise UnsupportedGraphError(_not_compiled(graph.name, str(error))) from error


def _not_compiled(name: str, message: str) -> str:
    """What XLA's refusal of a step means, in one line."""
    node = re.search(r"\{\{node ([^}]+)\}\}", message)
    where = f" at node '{node[1]}'" if node else ""
    missing = re.search(r"No registered '(\w+)' OpKernel", message)
    if missing:
        dtype = " for strings" if "DT_STRING" in message else ""
        return (
            f"'{name}': expected ops that XLA has kernels for, received '{missing[1]}'{dtype}{where}. "
            "Leave it out of the step, or do its work before the step, such as in the dataset."
        )
    if "fixed tensor list size" in message:
        return (
            f"'{name}': expected loops whose trips XLA can count, received one{where} that piles up a list of unknown "
            "length. Give tf.while_loop maximum_iterations=..., or use keras.layers.RNN(unroll=True)."
        )
    line = message.splitlines()[0].removeprefix("Failed getting HLO text: ").strip("'").rstrip(".")
    return f"'{name}': expected a step that XLA compiles, received one of which it says{where}: {line}."

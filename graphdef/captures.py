"""What a traced function captures: variables, by name, type and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import tensorflow as tf
from tensorflow.python.ops import handle_data_util, resource_variable_ops

from graphswap import ir, placement
from graphswap.graphdef.traced import FuncGraph, UnsupportedGraphError, source_of


def capture_names(func_graph: FuncGraph) -> dict[str, str]:
    """Placeholder of a capture -> a name for it: that of its variable, or its number among the captures.

    TensorFlow calls it by a count of what the process has made so far.
    """
    alive = [variable for reference in func_graph._weak_variables if (variable := reference()) is not None]
    variables = {id(variable.handle): str(variable.name).partition(":")[0] for variable in alive}
    taken = {operation.name for operation in func_graph.get_operations()}
    names: dict[str, str] = {}
    for index, (external, internal) in enumerate(func_graph.captures):
        name = wanted = variables.get(id(external), f"capture_{index}")
        suffix = 0
        while name in taken:
            suffix += 1
            name = f"{wanted}_{suffix}"
        taken.add(name)
        names[internal.op.name] = name
    return names


def variable_bytes(handle: Any) -> int:
    """Bytes of the value of a variable; 0 where its shape is not known."""
    entry = variable_type(handle)
    shape = None if entry is None else tf.TensorShape(entry.shape)
    if entry is None or shape is None or not shape.is_fully_defined():
        return 0
    return (shape.num_elements() or 0) * ir.ITEM_BYTES.get(tf.dtypes.as_dtype(entry.dtype).name, 0)


def captured_values(func_graph: FuncGraph) -> list[tf.Tensor]:
    """What the function captures, of variables their values as they are now.

    Raises:
        UnsupportedGraphError: If it captures something else.
    """
    values = []
    for number, (external, internal) in enumerate(func_graph.captures):
        entry = variable_type(internal) if internal.dtype == tf.resource else None
        if entry is not None:
            external = tf.raw_ops.ReadVariableOp(resource=external, dtype=tf.dtypes.as_dtype(entry.dtype))
        elif internal.dtype.name not in ir.ITEM_BYTES:
            raise UnsupportedGraphError(
                f"'{func_graph.name}': expected variables and arrays among what it captures, received number {number}, "
                f"a {internal.dtype.name}. Leave tables, datasets and strings out of the step."
            )
        values.append(external)
    return values


def variables(func_graph: FuncGraph) -> list[placement.Variable]:
    """The variables that the function captures."""
    assigned = {
        source_of(operation.inputs[0]).name
        for operation in func_graph.get_operations()
        if operation.type == "AssignVariableOp"
    }
    found = []
    for external, internal in func_graph.captures:
        entry = variable_type(internal) if internal.dtype == tf.resource and hasattr(external, "numpy") else None
        if entry is not None:
            dtype = tf.dtypes.as_dtype(entry.dtype)
            found.append(placement.Variable(external, dtype, internal.op.name in assigned))
    return found


ResourceVariable: TypeAlias = resource_variable_ops.ResourceVariable


def watch(variable: ResourceVariable) -> None:
    """Tells gradient tapes and the function being traced that the variable is read."""
    resource_variable_ops.variable_accessed(variable)


def captured_variables(func_graph: FuncGraph) -> dict[str, ResourceVariable]:
    """The variables that the function captures, by the names that `import_function` gives them."""
    names = capture_names(func_graph)
    alive = [variable for reference in func_graph._weak_variables if (variable := reference()) is not None]
    by_handle = {id(variable.handle): variable for variable in alive}
    return {
        names[internal.op.name]: by_handle[id(external)]
        for external, internal in func_graph.captures
        if id(external) in by_handle
    }


def capture(func_graph: FuncGraph, handles: Sequence[tf.Tensor]) -> None:
    """Lets a function that is traced completely capture more resources, behind what else it captures when traced."""
    with func_graph.as_default():
        for handle in handles:
            func_graph.capture(handle)
    late = {id(tensor) for tensor in func_graph.deferred_internal_captures}  # which come last when it is called
    func_graph.inputs = sorted(func_graph.inputs, key=lambda tensor: id(tensor) in late)


def variable_type(handle: Any) -> Any:
    """Shape and type of the value behind a handle, eager or symbolic; None where TensorFlow does not know them."""
    is_symbolic = not hasattr(handle, "numpy")
    data = handle_data_util.get_resource_handle_data(handle) if is_symbolic else handle._handle_data
    return data.shape_and_type[0] if data is not None and data.is_set and data.shape_and_type else None

"""Calls and branches dissolved in the function that is traced: their operations stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import tensorflow as tf
from tensorflow.python.ops import handle_data_util

from graphswap.graphdef.traced import (
    CALLS,
    OPAQUE,
    FuncGraph,
    body_names,
    body_of,
    edges_of,
    only_reads,
    reference_to,
    remove_operations,
    topological,
)
from graphswap.graphdef.tracing import PLANNED


def has_calls(func_graph: FuncGraph) -> bool:
    """Whether the function calls others that `call_inline` would dissolve."""
    return any(_callee(func_graph, operation) is not None for operation in func_graph.get_operations())


def call_inline(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Traces `step` and adds its operations to the graph being built, nested function calls dissolved.

    Calling it would leave one opaque node for every nested tf.function.
    """
    outer: Any = tf.compat.v1.get_default_graph()

    def planned(*args: Any, **kwargs: Any) -> Any:
        setattr(tf.compat.v1.get_default_graph(), PLANNED, True)
        return step(*args, **kwargs)

    traced = tf.function(planned, autograph=False).get_concrete_function(*args, **kwargs)
    arguments = [leaf for leaf in tf.nest.flatten((args, kwargs), expand_composites=True) if tf.is_tensor(leaf)]
    captures = _captured(outer, traced)
    tensors = _copy_operations(traced.graph, outer, [*arguments, *captures], [], "")[0]

    def counterpart(leaf: Any) -> Any:
        return tensors[reference_to(leaf)] if tf.is_tensor(leaf) else leaf

    return tf.nest.map_structure(counterpart, traced.structured_outputs, expand_composites=True)


def call_concrete(concrete: Any, arguments: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Adds the operations of a concrete function to the graph being built, under their own names.

    Args:
        concrete: The function.
        arguments: Its arguments, flat.

    Returns:
        Its results, flat.
    """
    outer: Any = tf.compat.v1.get_default_graph()
    tensors = _copy_operations(concrete.graph, outer, [*arguments, *_captured(outer, concrete)], [], "")[0]
    return [tensors[reference_to(tensor)] for tensor in concrete.graph.outputs]


def decidable_branches(func_graph: FuncGraph) -> Callable[[], tuple[bool, ...]] | None:
    """A function that tells which branches the step will take, where its variables alone decide on that.

    Such as whether this step of several that accumulate gradients updates the weights. Only branches that assign
    variables are asked for, in the order of the trace; None if there are none.
    """
    conditions = [operation.inputs[0] for operation in _decidable(func_graph)]
    if not conditions:
        return None
    externals = {internal.op.name: external for external, internal in func_graph.captures}

    def decide() -> list[tf.Tensor]:
        outer: Any = tf.compat.v1.get_default_graph()
        made: dict[str, tf.Tensor] = {}

        def copied(tensor: tf.Tensor) -> tf.Tensor:
            operation = tensor.op
            if reference_to(tensor) not in made and operation.type == "Placeholder":
                made[reference_to(tensor)] = outer.capture(externals[operation.name])
            elif reference_to(tensor) not in made:
                inputs = [copied(read) for read in operation.inputs]
                dtypes = [result.dtype for result in operation.outputs]
                attrs = dict(operation.node_def.attr)
                twin = outer.create_op(operation.type, inputs, dtypes, attrs=attrs, compute_device=False)
                made.update(zip(map(reference_to, operation.outputs), twin.outputs, strict=True))
            return made[reference_to(tensor)]

        return [copied(condition) for condition in conditions]

    with tf.init_scope():
        function = tf.function(decide, autograph=False).get_concrete_function()
    return lambda: tuple(bool(condition) for condition in function())


def take_branches(func_graph: FuncGraph, taken: Sequence[bool]) -> None:
    """Puts the operations of the branches that will be taken in the place of `decidable_branches`, in place."""
    for operation, is_true in zip(_decidable(func_graph), taken, strict=True):
        body = body_of(func_graph, operation.get_attr("then_branch" if is_true else "else_branch").name)
        controls = list(operation.control_inputs)
        prefix = f"{operation.name}/"
        tensors, ends = _copy_operations(cast(FuncGraph, body), func_graph, operation.inputs[1:], controls, prefix)
        results = [tensors[reference_to(result)] for result in cast(FuncGraph, body).outputs]
        for tensor, result in zip(operation.outputs, results, strict=True):
            for reader in tensor.consumers():
                for index, read in enumerate(reader.inputs):
                    if read is tensor:
                        reader._update_input(index, result)
        stand_ins = dict(zip(map(reference_to, operation.outputs), results, strict=True))
        func_graph.outputs = [stand_ins.get(reference_to(tensor), tensor) for tensor in func_graph.outputs]
        for waiting in operation._control_outputs:
            waits = [control for control in waiting.control_inputs if control is not operation]
            waiting._remove_all_control_inputs()
            waiting._add_control_inputs(list(dict.fromkeys([*waits, *ends])))
        func_graph.control_outputs = list(dict.fromkeys([*func_graph.control_outputs, *ends]))
        remove_operations(func_graph, {operation})


def _decidable(func_graph: FuncGraph) -> list[Any]:
    captured = {internal.op.name for _, internal in func_graph.captures}

    def is_known(operation: Any) -> bool:
        """Whether the step's variables decide on its results, as they are before the step."""
        pending, seen = [operation], {operation}
        while pending:
            operation = pending.pop()
            is_read = operation.type == "ReadVariableOp"
            if (
                (operation.type == "Placeholder" and operation.name not in captured)
                or (is_read and operation.control_inputs)  # perhaps after an update
                or (operation.op_def.is_stateful and not is_read)
                or operation.type in OPAQUE
            ):
                return False
            found = {tensor.op for tensor in operation.inputs} - seen
            seen |= found
            pending += found
        return True

    return [
        operation
        for operation in func_graph.get_operations()
        if operation.type == "If"
        and all(body_of(func_graph, name) is not None for name in body_names(operation))
        and not only_reads(func_graph, operation)
        and is_known(operation.inputs[0].op)
    ]


def _captured(outer: Any, concrete: Any) -> list[tf.Tensor]:
    """What a concrete function captures, captured by the graph being built, too."""
    for variable in concrete.variables:
        outer.watch_variable(variable)
    return [outer.capture(external) for external in concrete.captured_inputs]


def _copy_operations(
    body: FuncGraph, outer: Any, arguments: Sequence[tf.Tensor], controls: Sequence[Any], prefix: str
) -> tuple[dict[str, tf.Tensor], list[Any]]:
    """Copies a function's body into `outer`.

    Args:
        body: The function.
        outer: The graph to add to.
        arguments: What the function is called with.
        controls: What the call runs after.
        prefix: For the names of the copies.

    Returns:
        The tensors of the copies by reference in `body`, and the operations whose end is the call's end.
    """
    tensors = {reference_to(inner): given for inner, given in zip(body.inputs, arguments, strict=True)}
    done: dict[str, list[Any]] = {
        inner.op.name: [given.op] for inner, given in zip(body.inputs, arguments, strict=True)
    }
    for function in body._functions.values():
        outer._add_function_recursive(function)
    for node in topological(list(map(edges_of, body.get_operations()))):
        if node.name in done:
            continue
        operation = body.get_operation_by_name(node.name)
        inputs = [tensors[reference_to(tensor)] for tensor in operation.inputs]
        waits = [end for control in operation.control_inputs for end in done[control.name]]
        if operation.op_def.is_stateful:
            waits += controls
        callee = _callee(body, operation)
        if callee is not None:
            results, done[node.name] = _copy_operations(callee, outer, inputs, waits, f"{prefix}{node.name}/")
            for tensor, result in zip(operation.outputs, callee.outputs, strict=True):
                tensors[reference_to(tensor)] = results[reference_to(result)]
            continue
        attrs = {name: value for name, value in operation.node_def.attr.items() if name != "_class"}
        with outer.as_default(), tf.control_dependencies(None), tf.control_dependencies(waits):
            copied = outer.create_op(
                operation.type,
                inputs,
                [tensor.dtype for tensor in operation.outputs],
                name=f"{prefix}{node.name}",
                attrs=attrs,
                op_def=operation.op_def,
                compute_device=False,
            )
        if operation.device:
            copied._set_device(operation.device)
        done[node.name] = [copied]
        for tensor, counterpart in zip(copied.outputs, operation.outputs, strict=True):
            tensor.set_shape(counterpart.shape)
            if tensor.dtype == tf.resource:
                handle_data_util.copy_handle_data(counterpart, tensor)
            tensors[reference_to(counterpart)] = tensor
    ends = [end for operation in body.control_outputs for end in done[operation.name]]
    return tensors, ends or list(controls)


def _callee(func_graph: FuncGraph, operation: Any) -> FuncGraph | None:
    """The body that a call runs, if it can be dissolved: XLA-compiled functions can't."""
    if operation.type not in CALLS:
        return None
    if any(name in operation.node_def.attr and operation.node_def.attr[name].b for name in _KEPT_WHOLE):
        return None
    return body_of(func_graph, operation.get_attr("f").name)


_KEPT_WHOLE = ("_XlaMustCompile", "_noinline")

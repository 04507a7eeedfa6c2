"""Calls and branches dissolved in the function that is traced: their operations stand in their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import handle_data_util

from graphswap import ir
from graphswap.graphdef.traced import (
    CALLS,
    OPAQUE,
    REPLACED,
    FuncGraph,
    body_names,
    body_of,
    edges_of,
    has_static_inputs,
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
        _replace(func_graph, operation, results, ends)


def join_branches(func_graph: FuncGraph) -> None:
    """Puts the operations of both branches in the place of conditionals that update variables, in place.

    Such as an update that is left out where a gradient is not finite, of which a value of the step decides. Both
    branches run, and a variable that is assigned keeps its old value where the other branch was to be taken ("if-
    conversion": Allen, Kennedy, Porterfield, Warren, "Conversion of Control Dependence to Data Dependence", POPL'83).
    So what branches read is planned like anything else. Only branches are joined that may run whatever is decided:
    their ops can't fail, and change nothing but variables.

    If a branch sums over several workers, it is taken where all of them would take it, or else the other one. As it
    is, a step in which they differ would wait for ever.

    Known weakness: the branch that is not taken costs its time.
    """
    keys = itertools.count(_VOTE_KEYS)
    for operation in [found for found in func_graph.get_operations() if found.type == "If"]:
        if only_reads(func_graph, operation) or not _can_join(func_graph, operation):
            continue
        known = func_graph.get_operations()
        before = known[known.index(operation) - 1].name
        with func_graph.as_default(), tf.control_dependencies(None):
            decides = tf.identity(operation.inputs[0])
        inputs, controls = [decides, *operation.inputs[1:]], list(operation.control_inputs)
        results, ends = _copy_both(operation, func_graph, func_graph, inputs, controls, operation.name)
        added = func_graph.get_operations()[len(known) :]
        sums = [one for one in added if one.type == ir.ALL_REDUCE]
        if len({one.device for one in sums}) == 1:  # of several devices the step itself decides for all
            decides.op._update_input(0, _agreed(func_graph, operation, sums[0], next(keys)))
            added = func_graph.get_operations()[len(known) :]
        places = dict.fromkeys((one.name for one in added), before)
        setattr(func_graph, REPLACED, {**getattr(func_graph, REPLACED, {}), **places})
        _replace(func_graph, operation, results, ends)


def _replace(func_graph: FuncGraph, operation: Any, results: Sequence[tf.Tensor], ends: Sequence[Any]) -> None:
    """Takes an operation out; its readers get the results, and what waited for it waits for the ends."""
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


def _can_join(func_graph: FuncGraph, operation: Any) -> bool:
    """Whether both branches may run: none of their operations can fail, or change anything but variables."""
    bodies = [body_of(func_graph, name) for name in body_names(operation)]
    return (
        operation.inputs[0].dtype == tf.bool
        and operation.inputs[0].shape.rank == 0
        and all(tensor.dtype.name in ir.ITEM_BYTES for tensor in operation.outputs)
        and all(body is not None and _may_run(body) for body in bodies)
        and all(
            body is not None and result.shape.is_fully_defined() and result.shape == tensor.shape
            for body in bodies
            for result, tensor in zip(body.outputs if body else (), operation.outputs, strict=True)
        )
    )


def _may_run(body: FuncGraph) -> bool:
    for operation in body.get_operations():
        callee = _callee(body, operation)
        if operation.type in _CONDITIONALS:
            may_run = _can_join(body, operation)
        elif operation.type in _ASSIGNMENTS:
            handle, value = operation.inputs
            may_run = value.shape.is_fully_defined() and _variable_shape(handle) == value.shape
        elif operation.type in _FLOAT_ONLY:
            divisor = tf.get_static_value(operation.inputs[1])
            may_run = operation.outputs[0].dtype.is_floating or (divisor is not None and bool(np.all(divisor > 0)))
        else:
            may_run = operation.type in _TOTAL if callee is None else _may_run(callee)
        if not may_run or not has_static_inputs(operation):
            return False
    return True


def _agreed(func_graph: FuncGraph, operation: Any, like: Any, instance_key: int) -> tf.Tensor:
    """Adds whether all workers would take the branch of a conditional that has a sum over them; as its condition."""
    condition = operation.inputs[0]
    sums_if_true = like.name.startswith(f"{operation.name}/then_branch/")
    with func_graph.as_default(), tf.device(like.device), tf.control_dependencies(None):
        least = tf.raw_ops.CollectiveReduceV2(
            input=tf.cast(condition if sums_if_true else tf.logical_not(condition), tf.float32),
            group_size=like.inputs[1],
            group_key=like.inputs[2],
            instance_key=instance_key,
            ordering_token=[],
            merge_op="Min",
            final_op="Id",
            communication_hint=like.get_attr("communication_hint"),
            timeout_seconds=like.get_attr("timeout_seconds"),
            name=f"{operation.name}/agreed",
        )
        return tf.equal(least, 1.0 if sums_if_true else 0.0)


def _variable_shape(handle: tf.Tensor) -> tf.TensorShape | None:
    data = handle_data_util.get_resource_handle_data(handle)
    return tf.TensorShape(data.shape_and_type[0].shape) if data.is_set and data.shape_and_type else None


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
    body: FuncGraph,
    outer: Any,
    arguments: Sequence[tf.Tensor],
    controls: Sequence[Any],
    prefix: str,
    condition: tf.Tensor | None = None,
) -> tuple[dict[str, tf.Tensor], list[Any]]:
    """Copies a function's body into `outer`.

    Args:
        body: The function.
        outer: The graph to add to.
        arguments: What the function is called with.
        controls: What the call runs after.
        prefix: For the names of the copies.
        condition: If given, the body is one that may run, and assigns variables only where this is true.

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
            name = f"{prefix}{node.name}/"
            inner, done[node.name] = _copy_operations(callee, outer, inputs, waits, name, condition)
            for tensor, result in zip(operation.outputs, callee.outputs, strict=True):
                tensors[reference_to(tensor)] = inner[reference_to(result)]
            continue
        if condition is not None and operation.type in _CONDITIONALS:
            name = f"{prefix}{node.name}"
            results, done[node.name] = _copy_both(operation, body, outer, inputs, waits, name, condition)
            tensors.update(zip(map(reference_to, operation.outputs), results, strict=True))
            continue
        if condition is not None and operation.type in _ASSIGNMENTS:
            done[node.name] = [_assign_where(condition, operation, outer, inputs, waits, f"{prefix}{node.name}")]
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


def _copy_both(
    operation: Any,
    body: FuncGraph,
    outer: Any,
    inputs: Sequence[tf.Tensor],
    controls: Sequence[Any],
    name: str,
    condition: tf.Tensor | None = None,
) -> tuple[list[tf.Tensor], list[Any]]:
    """Copies both branches of a conditional in `body`; they assign variables only where `condition` is true, too.

    Returns:
        Its results, and the operations whose end is its end.
    """
    decides, *given = inputs
    with outer.as_default(), tf.control_dependencies(None):
        taken = {"then_branch": decides, "else_branch": tf.logical_not(decides)}
        if condition is not None:
            taken = {kind: tf.logical_and(condition, is_taken) for kind, is_taken in taken.items()}
    made, ends = [], list(controls)
    for kind, is_taken in taken.items():
        branch = cast(FuncGraph, body_of(body, operation.get_attr(kind).name))
        # One after the other: what the second one assigns may be what the first one did.
        tensors, ends = _copy_operations(branch, outer, given, ends, f"{name}/{kind}/", is_taken)
        made.append([tensors[reference_to(result)] for result in branch.outputs])
    with outer.as_default(), tf.control_dependencies(None):
        return [tf.raw_ops.Select(condition=decides, x=x, y=y) for x, y in zip(*made, strict=True)], ends


def _assign_where(
    condition: tf.Tensor, operation: Any, outer: Any, inputs: Sequence[tf.Tensor], waits: Sequence[Any], name: str
) -> Any:
    """Adds what an operation assigns to a variable, but its old value where the condition is not true."""
    handle, given = inputs
    with outer.as_default(), tf.device(operation.device or None), tf.control_dependencies(None):
        with tf.control_dependencies(waits):
            old = tf.raw_ops.ReadVariableOp(resource=handle, dtype=given.dtype, name=f"{name}/old")
        old.set_shape(given.shape)
        combine = _ASSIGNMENTS[operation.type]
        if combine is not None:
            given = combine(x=old, y=given, name=f"{name}/combined")
        value = tf.raw_ops.Select(condition=condition, x=given, y=old, name=f"{name}/value")
        with tf.control_dependencies(waits):
            return tf.raw_ops.AssignVariableOp(resource=handle, value=value, name=name)


def _callee(func_graph: FuncGraph, operation: Any) -> FuncGraph | None:
    """The body that a call runs, if it can be dissolved: XLA-compiled functions can't."""
    if operation.type not in CALLS:
        return None
    if any(name in operation.node_def.attr and operation.node_def.attr[name].b for name in _KEPT_WHOLE):
        return None
    return body_of(func_graph, operation.get_attr("f").name)


_KEPT_WHOLE = ("_XlaMustCompile", "_noinline")

_ASSIGNMENTS = {
    "AssignVariableOp": None,
    "AssignAddVariableOp": tf.raw_ops.AddV2,
    "AssignSubVariableOp": tf.raw_ops.Sub,
}
"""Ops that assign a variable, with what makes the new value of the old one and what is given."""
_CONDITIONALS = frozenset({"If", "StatelessIf"})
_VOTE_KEYS = 1 << 28
"""Instance keys of what workers agree on begin here, the same in all traces. TensorFlow counts its own from 1."""
_FLOAT_ONLY = frozenset({"Div", "FloorDiv", "FloorMod", "Mod", "Pow", "RealDiv", "TruncateDiv", "TruncateMod"})
"""Ops that fail where whole numbers are divided by zero, or raised to a negative power."""
_TOTAL = frozenset(
    "Abs Add AddN AddV2 All Any BatchMatMulV2 BroadcastTo Cast CollectiveReduceV2 ConcatV2 Const DivNoNan Equal Erf "
    "Exp ExpandDims Expm1 Fill Greater GreaterEqual Identity IdentityN Inv IsFinite IsInf IsNan L2Loss Less LessEqual "
    "Log Log1p LogicalAnd LogicalNot LogicalOr MatMul Max Maximum Mean Min Minimum Mul MulNoNan Neg NoOp NotEqual "
    "OnesLike Pack Placeholder Prod ReadVariableOp Reciprocal Relu Reshape Rsqrt Select SelectV2 Shape ShapeN Sigmoid "
    "Sign Size Slice Softplus Split SplitV Sqrt Square SquaredDifference Squeeze StopGradient StridedSlice Sub Sum "
    "Tanh Tile Transpose UnsortedSegmentSum VariableShape Xdivy ZerosLike".split()
)
"""Ops that have a result for all that they may read, where the trace knows the shapes."""

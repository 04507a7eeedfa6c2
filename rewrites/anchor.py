"""Lets nodes wait by data for what the plan means them to wait for: XLA drops control edges.

XLA computes equal nodes once, and its scheduler for CPUs is breadth first: whatever has its inputs runs at
once, a repeated node at its first run's side, and a weight's layout is changed when the step begins. An
`ir.ANCHOR` is its first input, bit for bit, and can't be computed before the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from graphswap import ir, liveness
from graphswap.plan import Plan

Waits = dict[tuple[str, str], tuple[str, ...]]
"""(Node, value that it reads) -> the tokens: what must be there before it may read the value."""

_FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})
_LEAST_TOKEN_BYTES = 64
_LEAST_BYTES = 4096
"""Of what is worth an anchor."""
_ASSIGNS = liveness.ASSIGNS | liveness.UPDATES
_VIEWS = frozenset("Cast ExpandDims Identity Reshape Squeeze Transpose".split())
_OF_UPDATES = (
    _ASSIGNS
    | _VIEWS
    | frozenset(
        "Abs Add AddN AddV2 All Any BroadcastTo Div DivNoNan Equal Exp Fill Greater GreaterEqual IsFinite "
        "Less LessEqual Log LogicalAnd LogicalNot LogicalOr Max Maximum Mean Min Minimum Mul MulNoNan Neg "
        "NoOp NotEqual OnesLike Pow Prod ReadVariableOp RealDiv Reciprocal Rsqrt Select SelectV2 Sign Sqrt "
        "Square SquaredDifference Sub Sum ZerosLike".split()
    )
)
"""Ops that may stand between the gradients and the variables."""
_REDUCTIONS = frozenset("All Any Max Mean Min Prod Sum".split())
_RESIDENT = ir.RESIDENT_OPS | {"ReadVariableOp"}
_CONVOLUTIONS = frozenset(
    f"{kind}{what}"
    for kind, what in (
        *(("Conv2D", what) for what in ("", "BackpropInput", "BackpropFilter")),
        *(("Conv3D", what) for what in ("", "BackpropInputV2", "BackpropFilterV2")),
        *(("DepthwiseConv2dNative", what) for what in ("", "BackpropInput", "BackpropFilter")),
    )
)
_PRODUCTS = frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "MatMul"})
_BEGUN_EARLY = frozenset({"MaxPoolGrad"})
"""Ops half of whose work XLA does before their last input is there."""
_CONSTANT_OPS = frozenset("Const OnesLike Rank Shape ShapeN Size ZerosLike".split())
"""Ops whose values XLA knows when it compiles, whatever they read."""


def anchor(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with anchors, its updates of variables last.

    * A repeated node waits for the newest value that the node it stands before reads.
    * A convolution reads its older operands when the newest is there: XLA copies operands into other layouts,
      and holds the copies from when they can be made.
    * A gradient is used when all other readers of its variable have run: else XLA copies the variable first, to
      write the new value in its place.
    * A gradient of pooling runs in a branch of its own: else XLA looks for the maxima, and makes the zeros that it
      adds to, as soon as the forward pass is there.

    Args:
        graph: The step, its nodes repeated as the plan says.
        plan: Is not read: what has to wait shows in the graph.
    """
    graph = _updates_last(_enclosed(graph))
    tokens = _Tokens(graph)
    waits = _of_operands(graph, tokens) | _of_repeats(graph, tokens)
    return _with_anchors(graph, waits | _of_gradients(graph, tokens))


class _Tokens:
    """Which values may be waited for.

    A token is made in the step, of arguments or variables: what XLA knows when it compiles holds nothing back.
    """

    def __init__(self, graph: ir.Graph):
        self._graph = graph
        self._varying: set[str] = set()
        self._usable: set[str] = set()
        for node in graph.nodes:
            if node.op in _CONSTANT_OPS:
                continue
            if not node.inputs or node.stateful or not self._varying.isdisjoint(map(ir.producer, node.inputs)):
                self._varying.add(node.name)
                if node.op not in ir.RESIDENT_OPS and node.op not in liveness.ALIASES:
                    self._usable.update(ref for ref in node.refs() if self._is_large(graph.value(ref)))

    @staticmethod
    def _is_large(value: ir.Value) -> bool:
        return value.dtype in _FLOATS and value.is_resolved and value.nbytes >= _LEAST_TOKEN_BYTES

    def newest(self, references: Iterable[str], of_first_runs: bool = False) -> str | None:
        """The one of the values that is made last; None if none can be waited for."""
        usable = [
            reference
            for reference in references
            if reference in self._usable and not (of_first_runs and self._graph.by_name[ir.producer(reference)].like)
        ]
        return max(usable, key=self.position, default=None)

    def can_hold(self, reference: str) -> bool:
        """Whether a value may wait: shapes, axes and other numbers that XLA has to know may not."""
        return self._graph.value(reference).dtype in _FLOATS and ir.producer(reference) in self._varying

    def position(self, reference: str) -> int:
        return self._graph.position[ir.producer(reference)]


def _of_repeats(graph: ir.Graph, tokens: _Tokens) -> Waits:
    waits: Waits = {}
    last: str | None = None  # the newest token so far
    group: list[ir.Node] = []
    for node in graph.nodes:
        if node.like:
            group.append(node)
            continue
        token = tokens.newest(node.inputs, of_first_runs=True)
        waiting: set[str] = set()
        for repeated in group:
            is_old = token is None or tokens.position(token) <= graph.position.get(repeated.like, -1)
            found: Waits = {}
            if waiting.isdisjoint(map(ir.producer, repeated.inputs)):  # else what it reads waits already
                found = _of_repeat(graph, tokens, repeated, last if is_old else token)
                waits.update(found)
            if found or not waiting.isdisjoint(map(ir.producer, repeated.inputs)):
                waiting.add(repeated.name)
        group = []
        last = tokens.newest(node.refs()) or last
    return waits


def _of_repeat(graph: ir.Graph, tokens: _Tokens, node: ir.Node, token: str | None) -> Waits:
    held = [reference for reference in dict.fromkeys(node.inputs) if tokens.can_hold(reference) and reference != token]
    if token is None or not held:
        return {}
    if node.op in _PRODUCTS:  # an operand's anchor is a copy of it: the smallest will do
        held = sorted(held, key=lambda reference: graph.value(reference).nbytes)[:1]
    return {(node.name, reference): (token,) for reference in held}


def _of_operands(graph: ir.Graph, tokens: _Tokens) -> Waits:
    waits: Waits = {}
    for node in graph.nodes:
        if node.op in _CONVOLUTIONS and (token := tokens.newest(node.inputs)) is not None:
            for reference in node.inputs:
                value = graph.value(reference)
                if reference != token and value.dtype in _FLOATS and value.nbytes >= _LEAST_BYTES:
                    waits[node.name, reference] = (token,)
    return waits


def _of_gradients(graph: ir.Graph, tokens: _Tokens) -> Waits:
    updates = _only_for_updates(graph)
    readers = _readers(graph, updates)
    bits = {name: 1 << number for number, name in enumerate(sorted(set().union(*readers.values())))}
    before: dict[str, int] = {}  # node -> bits of the readers that it needs
    for node in graph.nodes:
        mask = bits.get(node.name, 0)
        for reference in node.inputs:
            mask |= before[ir.producer(reference)]
        before[node.name] = mask
    waits: Waits = {}
    for node in graph.nodes:
        if node.op not in _ASSIGNS or node.name not in updates:
            continue
        gradient = _gradient(graph, node.inputs[1], updates)
        if gradient is None:
            continue
        needed = before[ir.producer(gradient)]
        later = [name for name in readers.get(node.inputs[0], ()) if not needed & bits[name]]
        found = [token for name in later if (token := tokens.newest(graph.by_name[name].refs())) is not None]
        for consumer in graph.consumers[gradient] if found else ():
            if consumer in updates:
                waits[consumer, gradient] = tuple(dict.fromkeys((*waits.get((consumer, gradient), ()), *found)))
    return waits


def _only_for_updates(graph: ir.Graph) -> set[str]:
    """Nodes from which arithmetic leads to nothing but variables, and copies of results that wait for these.

    A repeated node may be ordered behind an update, and does not use it.
    """
    used_by: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in {*map(ir.producer, node.inputs), *(() if node.like else node.control_inputs)}:
            used_by.setdefault(name, []).append(node.name)
    results = {name for name in map(ir.producer, graph.outputs) if graph.by_name[name].op != "Identity"}
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op in _OF_UPDATES and node.name not in results and found.issuperset(used_by.get(node.name, ())):
            found.add(node.name)
    return found


def _readers(graph: ir.Graph, updates: set[str]) -> Mapping[str, list[str]]:
    """Variable -> the nodes that read its value for other things than updates."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "ReadVariableOp" or node.outputs[0].nbytes < _LEAST_BYTES:
            continue
        pending = list(graph.consumers.get(node.name, ()))
        while pending:
            reader = graph.by_name[pending.pop()]
            if reader.op in _VIEWS:
                pending += graph.consumers.get(reader.name, ())
            elif reader.name not in updates:
                found.setdefault(node.inputs[0], []).append(reader.name)
    return found


def _gradient(graph: ir.Graph, assigned: str, updates: set[str]) -> str | None:
    """The newest value of the variable's shape that arithmetic makes the assigned one of, element by element.

    Reductions lead to all gradients where their norm is limited.
    """
    elements = _elements(graph.value(assigned))
    newest: str | None = None
    pending, seen = [assigned], {assigned}
    while pending:
        reference = pending.pop()
        node = graph.by_name[ir.producer(reference)]
        if node.op in _REDUCTIONS:
            continue
        if node.name in updates:
            pending += [read for read in dict.fromkeys(node.inputs) if read not in seen]
            seen.update(node.inputs)
        elif node.op not in _RESIDENT and _elements(graph.value(reference)) == elements:
            newest = max(newest or reference, reference, key=lambda r: graph.position[ir.producer(r)])
    return newest


def _elements(value: ir.Value) -> int:
    return value.nbytes // ir.ITEM_BYTES.get(value.dtype, 1)


def _updates_last(graph: ir.Graph) -> ir.Graph:
    """The graph with its updates behind everything that they could be made to wait for."""
    updates = _only_for_updates(graph)
    first = tuple(
        dataclasses.replace(node, control_inputs=tuple(name for name in node.control_inputs if name not in updates))
        for node in graph.nodes
        if node.name not in updates
    )
    return graph.replace(nodes=(*first, *(node for node in graph.nodes if node.name in updates)))


def _enclosed(graph: ir.Graph) -> ir.Graph:
    enclosed = (("is_enclosed", True),)
    return graph.replace(
        nodes=tuple(
            dataclasses.replace(node, attrs=enclosed) if node.op in _BEGUN_EARLY else node for node in graph.nodes
        )
    )


def _with_anchors(graph: ir.Graph, waits: Waits) -> ir.Graph:
    taken = set(graph.by_name)
    made: dict[tuple[str, tuple[str, ...]], str] = {}
    nodes: list[ir.Node] = []
    for node in graph.nodes:
        inputs = []
        for reference in node.inputs:
            tokens = waits.get((node.name, reference))
            if tokens is None:
                inputs.append(reference)
                continue
            if (reference, tokens) not in made:
                name = ir.fresh_name(f"{node.name}/anchor", taken)
                made[reference, tokens] = name
                nodes.append(ir.Node(name, ir.ANCHOR, (reference, *tokens), outputs=(graph.value(reference),)))
            inputs.append(made[reference, tokens])
        nodes.append(dataclasses.replace(node, inputs=tuple(inputs)) if tuple(inputs) != node.inputs else node)
    return graph.replace(nodes=tuple(nodes))

"""Divides variables among workers: each updates its part, and what the others need of it is gathered."""

from __future__ import annotations

import dataclasses

from graphswap import allocator, ir, shards
from graphswap.collectives import instance_key
from graphswap.plan import Plan, PlanError
from graphswap.variables import values

_KEYS = 1 << 29
"""Instance keys of gathered values begin here, and are as many, below those of blocks. TensorFlow counts from 1."""


def shard(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Shard` decisions carried out, whatever else the plan says.

    The variable's own node stays, and holds no bytes. A handle of this worker's part, "v/shard", comes behind the other
    arguments, but before those that are captured anew with each call. What is computed of parts alone, element by
    element, keeps its name and is flat; a `SHARD` takes a part of what else it reads, an `ALL_GATHER` makes a value
    whole that something else reads. It waits for all collectives before it in the graph, and those behind it wait for
    it: all workers meet in the same order, whatever else their plans say.

    Raises:
        PlanError: If a variable can't be divided; see `shards.divisible`.
    """
    if not plan.shards:
        return graph
    can_be = shards.divisible(graph, [decision.variable for decision in plan.shards])
    for decision in plan.shards:
        if decision.variable not in can_be:
            raise PlanError(
                f"{decision} does not fit graph '{graph.name}': expected a variable of more than 64 KiB that is only "
                "read to be updated, element by element."
            )
    return _Sharder(graph, [decision.variable for decision in plan.shards]).graph()


class _Sharder:
    def __init__(self, graph: ir.Graph, variables: list[str]):
        self.source = graph
        self.workers = shards.workers(graph)
        self.region = shards.region(graph, variables)
        self.values = values(graph)
        self.taken = set(graph.by_name)
        self.handles = {name: ir.fresh_name(f"{name}/shard", self.taken) for name in variables}
        self.part: dict[str, str] = {}  # whole value -> its SHARD
        self.whole: dict[str, str] = {}  # value of which there are parts -> its ALL_GATHER
        self.keys: set[int] = set()
        self.collectives: list[str] = []  # since the last ALL_GATHER, which is the first of them
        self.nodes: list[ir.Node] = []

    def graph(self) -> ir.Graph:
        source = self.source
        for variable, handle in self.handles.items():
            value = self._part_of(self.values[variable])
            attrs = (("held_bytes", (allocator.rounded(value.nbytes),)), ("shard_of", variable))
            self.nodes.append(ir.Node(handle, "Placeholder", outputs=(ir.Value("resource"),), attrs=attrs))
        for node in source.nodes:
            if node.name in self.handles:
                node = dataclasses.replace(node, attrs=tuple(attr for attr in node.attrs if attr[0] != "held_bytes"))
            elif node.name in self.region:
                node = self._divided(node)
            else:
                node = self._undivided(node)
            self.nodes.append(node)
        outputs = tuple(self._whole(reference, source.by_name[ir.producer(reference)]) for reference in source.outputs)
        late = tuple(name for name in source.inputs if dict(source.by_name[name].attrs).get(ir.IS_DEFERRED))
        inputs = (*source.inputs[: len(source.inputs) - len(late)], *self.handles.values(), *late)
        return source.replace(nodes=tuple(self.nodes), inputs=inputs, outputs=outputs)

    def _divided(self, node: ir.Node) -> ir.Node:
        inputs = tuple(self._part(reference, node) for reference in node.inputs)
        outputs = tuple(map(self._part_of, node.outputs))
        attrs = tuple(sorted((*node.attrs, ("is_divided", True))))
        return dataclasses.replace(node, inputs=inputs, outputs=outputs, attrs=attrs)

    def _undivided(self, node: ir.Node) -> ir.Node:
        inputs = tuple(self._whole(reference, node) for reference in node.inputs)
        controls = node.control_inputs
        if _is_collective(node):
            first = self.collectives[:1] if self.whole else []
            controls = tuple(dict.fromkeys((*controls, *first)))
            self.collectives.append(node.name)
        if (inputs, controls) == (node.inputs, node.control_inputs):
            return node
        return dataclasses.replace(node, inputs=inputs, control_inputs=controls)

    def _part(self, reference: str, reader: ir.Node) -> str:
        """This worker's part of a value, or a handle of it."""
        value = self.source.value(reference)
        if reference in self.handles:
            return self.handles[reference]
        if ir.producer(reference) in self.region or value.shape == ():
            return reference
        if reference not in self.part:
            name = ir.fresh_name(f"{reference.replace(':', '_')}/shard", self.taken)
            attrs = (("length", shards.length(value)), ("workers", self.workers))
            node = ir.Node(
                name, ir.SHARD, (reference,), outputs=(self._part_of(value),), attrs=attrs, device=reader.device
            )
            self.nodes.append(node)
            self.part[reference] = name
        return self.part[reference]

    def _whole(self, reference: str, reader: ir.Node) -> str:
        """A value of which there may be parts, whole."""
        if ir.producer(reference) not in self.region:
            return reference
        if reference not in self.whole:
            name = ir.fresh_name(f"{reference.replace(':', '_')}/gather", self.taken)
            value = self.source.value(reference)
            total = next(node for node in self.source.nodes if node.op == ir.ALL_REDUCE)
            node = ir.Node(
                name,
                ir.ALL_GATHER,
                inputs=(reference, *total.inputs[1:3], *total.inputs[4:]),
                control_inputs=tuple(self.collectives),
                outputs=(value,),
                device=reader.device,
                stateful=True,
                attrs=(("instance_key", self._key(value)), ("sum", total.name), ("workers", self.workers)),
            )
            self.nodes.append(node)
            self.whole[reference] = name
            self.collectives = [name]
        return self.whole[reference]

    def _part_of(self, value: ir.Value) -> ir.Value:
        if value.shape == ():
            return value
        return dataclasses.replace(value, shape=(shards.part_length(value, self.workers),))

    def _key(self, value: ir.Value) -> int:
        """Equal in all workers and all traces for what is gathered at the same place, and in one step for no two."""
        return instance_key(f"{len(self.whole)} {value}", _KEYS, self.keys)


def _is_collective(node: ir.Node) -> bool:
    return node.op.startswith("Collective")

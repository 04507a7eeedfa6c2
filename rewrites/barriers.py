"""Holds a plan's order, swaps and repeats by data, for XLA, which knows no control edges."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphswap import cost_model, ir, liveness
from graphswap.plan import Plan

HOST, DEVICE = "pinned_host", "device"
"""Kinds of memory, as PJRT calls them."""


def barriers(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with every swap as two placements, and with barriers for what the plan's nodes wait for.

    XLA drops a placement that it can undo, puts a copy off until its value is read, merges a repeated node with the
    first one, and leaves gradients of weights, with all that they are made of, for the end of the step. A barrier
    passes its inputs on once all of them are there, and nothing is merged or moved across it:

    * Before a product runs, what it reads passes one together with what was made since the last product and is not
      needed for this one, such as a weight's new value; and with far copies that the plan waits for here.
    * Where the plan starts the copy back, the far copy passes one together with what the last product made.
    * What repeated nodes read passes one together with what their reader waits for, often a gradient.

    Products (of matrices, convolutions) stand for their neighbours: XLA fuses what lies between them, and would have to
    write to memory what passes a barrier there.
    """
    del plan  # the other passes have carried it out
    lowering = _Lowering(graph)
    for is_repeated, run in itertools.groupby(enumerate(graph.nodes), lambda item: bool(item[1].like)):
        places, nodes = zip(*run, strict=True)
        if is_repeated:
            lowering.repeat(nodes, graph.nodes[places[-1] + 1 :][:1])
            continue
        for node in nodes:
            lowering.add(node)
    return graph.replace(nodes=tuple(lowering.nodes))


class _Lowering:
    """The new graph as far as it has come.

    XLA takes out of a barrier what nobody reads behind it, unless somebody else reads it in front of it. So what is
    only waited for passes as it was made, which has readers, and not as another barrier has passed it on.
    """

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}  # of the new graph
        self.taken = set(graph.by_name)
        self.reads = {node.inputs[0]: node for node in reversed(graph.nodes) if node.op == "ReadVariableOp"}
        self.moving = _moving(graph)
        self.passed: dict[str, str] = {}  # value -> what the last barrier that it passed made of it
        self.far: dict[str, str] = {}  # SwapOut -> what the last barrier that the far copy passed made of it
        self.pending: list[str] = []  # SwapOuts that the next product waits for
        self.product = ""  # the last one
        self.made: list[str] = []  # the last product, and updates since then

    def add(self, node: ir.Node) -> None:
        """Adds a node that is not a repeated one."""
        if node.op == ir.SWAP_OUT:
            self._append(node, op=ir.PLACE, outputs=(self.graph.value(node.inputs[0]),), attrs=_kind(HOST))
            self.far[node.name] = node.name
            return
        if node.op == ir.SWAP_IN:
            out = ir.producer(node.inputs[0])
            self._barrier([], [out], [self.product] if self.product else [])
            self.pending = [name for name in self.pending if name != out]
            self._append(node, inputs=(self.far[out],), op=ir.PLACE, attrs=_kind(DEVICE))
            return
        self.pending += [name for name in node.control_inputs if name in self.far]
        if cost_model.flops(self.graph, node):
            waiting, others = self._latest(node.inputs), self._not_needed(node)
            if waiting and (self.pending or others):
                self.passed |= self._barrier([waiting], self.pending, others)
                self.pending = []
            self.product, self.made = node.name, [node.name]
        elif node.op in liveness.ASSIGNS or (node.op in liveness.UPDATES and node.inputs[0] in self.reads):
            self.made.append(node.name)
        self._append(node, inputs=tuple(map(self._now, node.inputs)))

    def repeat(self, nodes: Sequence[ir.Node], readers: Sequence[ir.Node]) -> None:
        """Adds repeated nodes, and before them a barrier; `readers` are what they are repeated for."""
        made = {reference for node in nodes for reference in node.refs()}
        first = [node for node in nodes if made.isdisjoint(node.inputs)]  # the others can't run before these
        read = list(dict.fromkeys(reference for node in first for reference in self._held_up(node.inputs)))
        others = [reference for node in readers for reference in node.inputs if reference not in made]
        token = self._latest(others)
        tokens = [token] if token and token not in read else []
        passed = self._barrier([*read, *tokens], [], [self.product] if self.product and not token else [])
        self.passed |= {token: passed[token] for token in tokens}
        for node in nodes:
            self._append(node, inputs=tuple(passed.get(r, self._now(r)) for r in node.inputs))

    def _barrier(self, values: Sequence[str], outs: Sequence[str], others: Sequence[str]) -> Mapping[str, str]:
        """Adds a barrier, if there is anything to pass it.

        Args:
            values: What will be read behind it.
            outs: SwapOuts whose far copies pass it.
            others: What is only waited for.

        Returns:
            The values behind it.
        """
        inputs = (*map(self._now, values), *(self.far[out] for out in outs), *others)
        if not inputs:
            return {}
        name, outputs = ir.fresh_name("barrier", self.taken), tuple(self.values[reference] for reference in inputs)
        passed = self._append(ir.Node(name, ir.BARRIER, inputs, outputs=outputs)).refs()
        self.far.update(zip(outs, passed[len(values) :], strict=False))
        return dict(zip(values, passed, strict=False))

    def _append(self, node: ir.Node, **changes: Any) -> ir.Node:
        new = dataclasses.replace(node, **changes)
        self.nodes.append(new)
        self.values.update(zip(new.refs(), new.outputs, strict=True))
        return new

    def _now(self, reference: str) -> str:
        return self.passed.get(reference, reference)

    def _result(self, node: ir.Node) -> str:
        """What a product made, or the new value of the variable that an update changed."""
        if node.op in liveness.ASSIGNS:
            return self._now(node.inputs[1])
        if node.op not in liveness.UPDATES:
            return node.name
        read = self.reads[node.inputs[0]]
        name = ir.fresh_name(f"{node.name}/read", self.taken)
        return self._append(read, name=name, control_inputs=(node.name,), like=read.name).name

    def _not_needed(self, node: ir.Node) -> list[str]:
        """Of what was made since the last product what a node does not need, less what the rest of it needs."""
        needed: set[str] = set()
        start = self.graph.position[self.product] if self.product else 0
        found = []
        for name in (node.name, *reversed(self.made)):
            if name not in needed and name != node.name:
                found.append(self._result(self.graph.by_name[name]))
            pending = [name]
            while pending:
                name = pending.pop()
                if name not in needed and self.graph.position[name] >= start:
                    needed.add(name)
                    pending += map(ir.producer, self.graph.by_name[name].inputs)
        return found

    def _latest(self, references: Iterable[str]) -> str:
        """Of the values that the step computes the one that is made last, "" if there are none."""
        return max(filter(self._is_computed, references), key=self._position, default="")

    def _position(self, reference: str) -> int:
        return self.graph.position[ir.producer(reference)]

    def _held_up(self, references: Sequence[str]) -> list[str]:
        """What has to pass a barrier so that a node that reads these can't run before it.

        Constants never do: XLA has to know shapes and axes.
        """
        arrays = [r for r in references if self._is_array(r) and self.graph.by_name[ir.producer(r)].op != "Const"]
        return list(filter(self._is_computed, arrays)) or arrays

    def _is_computed(self, reference: str) -> bool:
        return self._is_array(reference) and ir.producer(reference) in self.moving

    def _is_array(self, reference: str) -> bool:
        return self.graph.value(reference).dtype in ir.ITEM_BYTES


def _moving(graph: ir.Graph) -> set[str]:
    """Nodes that compute something of the step's arguments, and not of variables and constants alone."""
    arguments = {name for name in graph.inputs if graph.value(name).dtype != "resource"}
    moving = set(arguments)
    for node in graph.nodes:
        if not moving.isdisjoint(map(ir.producer, node.inputs)):
            moving.add(node.name)
    return moving - arguments


def _kind(memory_kind: str) -> tuple[tuple[str, ir.Attr], ...]:
    return (("memory_kind", memory_kind),)

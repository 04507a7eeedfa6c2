"""Moves variables to a far tier: fetched where they are used, stored when they have a new value."""

from __future__ import annotations

import dataclasses

from graphswap import ir, liveness
from graphswap.plan import Place, Plan, PlanError
from graphswap.rewrites.far_update import far_update
from graphswap.variables import unplaceable, values

_SUMS = {"AssignAddVariableOp": "AddV2", "AssignSubVariableOp": "Sub"}
_GATHER = "GatherV2"
_FORMS = liveness.ALIASES.keys() | {"Cast", "Transpose"}
"""Ops that make of a value the same in another form."""


def place(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Place` decisions carried out, whatever else the plan says.

    The variable's own node stays, and holds no bytes. If it is used, handles of its far value and of memory for the
    next one come behind the other arguments, "v/store" and "v/spare". A `FETCH` stands before the first reader. What
    reads the variable after its update reads the new value; a `STORE` stands where the last update did, after all that
    read the fetched value, or a cast or reshape of it: what is repeated later would fetch the new one. Where the host
    computes, what gathers rows reads a `VIEW`, and `far_update` takes over updates.

    Raises:
        PlanError: If a variable can't be placed; see `variables.unplaceable`.
    """
    if not plan.places:
        return graph
    declined = unplaceable(graph)
    for decision in plan.places:
        node = graph.by_name.get(decision.variable)
        if node is None or node.op != "Placeholder" or node.outputs[0].dtype != "resource":
            raise PlanError(f"{decision} does not fit graph '{graph.name}': it has no such variable.")
        if decision.variable in declined:
            raise PlanError(f"{decision} does not fit graph '{graph.name}': {declined[decision.variable]}.")
    return far_update(_Placer(graph, plan.places).graph(), plan)


class _Placer:
    def __init__(self, graph: ir.Graph, places: tuple[Place, ...]):
        self.source = graph
        self.tiers = {decision.variable: decision.tier for decision in places}
        self.computed_there = {decision.variable for decision in places if decision.computes_there}
        self.values = values(graph)
        self.taken = set(graph.by_name)
        self.handles: dict[str, tuple[str, ...]] = {}
        self.current: dict[str, str] = {}  # variable -> its value, as it is now
        self.readers: dict[str, list[str]] = {}  # FETCH -> what reads it, or it in another form
        self.fetch_of: dict[str, str] = {}  # FETCH, or what has its value in another form -> the FETCH
        self.views: dict[str, str] = {}  # variable -> its VIEW
        self.fetches: dict[str, str] = {}  # variable -> its FETCH
        self.gathered: dict[str, str] = {}  # read of a variable -> what its gathers read instead
        self.stand_in: dict[str, str] = {}  # reference to what is gone -> reference to what is read instead
        self.waited: dict[str, tuple[str, ...]] = {}  # node that is gone -> what to wait for instead
        self.nodes: list[ir.Node] = []

    def graph(self) -> ir.Graph:
        source = self.source
        last: dict[str, str] = {}
        for node in source.nodes:
            if node.op in liveness.ASSIGNS | liveness.UPDATES and node.inputs[0] in self.tiers:
                last[node.inputs[0]] = node.name
        arguments = []
        for variable in [variable for variable in self.tiers if variable in self.values]:
            names = tuple(ir.fresh_name(f"{variable}/{what}", self.taken) for what in ("store", "spare"))
            self.handles[variable] = names
            arguments += names
            there = (("computes_there", True),) if variable in self.computed_there else ()
            far = (*there, ("store_of", variable), ("tier", self.tiers[variable]))
            for name, attrs in zip(names, (far, ()), strict=True):
                self._add(ir.Node(name, "Placeholder", outputs=(ir.Value("resource"),), attrs=attrs))
        for node in source.nodes:
            variable = node.inputs[0] if node.inputs and node.inputs[0] in self.tiers else ""
            if node.name in self.tiers:
                held = tuple((name, value) for name, value in node.attrs if name != "held_bytes")
                self._add(dataclasses.replace(node, attrs=held))
            elif node.op == "ReadVariableOp" and variable:
                self._replace_read(node, variable)
            elif node.op in liveness.ASSIGNS | liveness.UPDATES and variable:
                self._update(node, variable, is_last=last[variable] == node.name)
            else:
                self._keep(node, variable)
        waits = (self.waited.get(name, (name,)) for name in source.control_outputs)
        stores = (node.name for node in self.nodes if node.op == ir.STORE)
        return source.replace(
            nodes=tuple(self.nodes),
            inputs=(*source.inputs, *arguments),
            outputs=tuple(self._read(reference) for reference in source.outputs),
            control_outputs=tuple(sorted({*(name for names in waits for name in names), *stores})),
        )

    def _read(self, reference: str) -> str:
        return self.stand_in.get(reference, reference)

    def _controls(self, node: ir.Node) -> tuple[str, ...]:
        return tuple(dict.fromkeys(w for name in node.control_inputs for w in self.waited.get(name, (name,))))

    def _replace_read(self, node: ir.Node, variable: str) -> None:
        readers = [self.source.by_name[name] for name in self.source.consumers.get(node.name, ())]
        gathers = [reader for reader in readers if reader.op == _GATHER and reader.inputs[0] == node.name]
        self.waited[node.name] = ()
        if gathers and self._can_view(variable):
            self.gathered[node.name] = self._view(variable)
        if len(gathers) < len(readers) or node.name not in self.gathered or node.name in self.source.outputs:
            self.stand_in[node.name] = self._value(variable)

    def _can_view(self, variable: str) -> bool:
        """Whether the host computes with the variable, which has not been updated yet."""
        is_old = variable not in self.current or self.current[variable] in self.readers
        return is_old and variable in self.computed_there

    def _view(self, variable: str) -> str:
        if variable not in self.views:
            name = ir.fresh_name(f"{variable}/view", self.taken)
            attrs = (("held_bytes", (0,)), *self._attrs(variable))
            outputs = (self.values[variable],)
            self._add(ir.Node(name, ir.VIEW, self.handles[variable][:1], outputs=outputs, attrs=attrs))
            self.views[variable] = name
        return self.views[variable]

    def _keep(self, node: ir.Node, variable: str) -> None:
        inputs = tuple(self._read(reference) for reference in node.inputs)
        if node.op == _GATHER and node.inputs[0] in self.gathered:
            inputs = (self.gathered[node.inputs[0]], *inputs[1:])
        if variable:  # a gather: of its rows, or of the whole variable, which is there for the time
            value = self._view(variable) if self._can_view(variable) else self._value(variable)
            inputs = (value, *inputs[1:])
            node = dataclasses.replace(node, op=_GATHER, stateful=False, attrs=(_INSERTED,))
        controls = self._controls(node)
        if (inputs, controls) != (node.inputs, node.control_inputs):
            node = dataclasses.replace(node, inputs=inputs, control_inputs=controls)
        self._add(node)

    def _value(self, variable: str) -> str:
        """The variable's value now, which is fetched if it has not been yet."""
        if variable not in self.current:
            name = ir.fresh_name(f"{variable}/fetch", self.taken)
            outputs, attrs = (self.values[variable],), self._attrs(variable)
            self._add(ir.Node(name, ir.FETCH, self.handles[variable][:1], outputs=outputs, attrs=attrs))
            self.current[variable] = self.fetches[variable] = name
            self.readers[name] = []
            self.fetch_of[name] = name
        return self.current[variable]

    def _update(self, node: ir.Node, variable: str, is_last: bool) -> None:
        given = self._read(node.inputs[1])
        if node.op in _SUMS:
            value = self.values[variable]
            name = ir.fresh_name(f"{node.name}/value", self.taken)
            inputs = (self._value(variable), given)
            self._add(ir.Node(name, _SUMS[node.op], inputs, outputs=(value,), attrs=(_INSERTED,)))
            given = name
        self.current[variable] = given
        self.waited[node.name] = ()
        if is_last:
            name = ir.fresh_name(f"{node.name}/store", self.taken)
            old = [first[variable] for first in (self.views, self.fetches) if variable in first]
            readers = self.readers.get(self.fetches.get(variable, ""), ())
            readers = [reader for reader in readers if reader != ir.producer(given)]
            controls = tuple(dict.fromkeys((*self._controls(node), *old, *readers)))
            inputs, attrs = (given, *self.handles[variable]), self._attrs(variable)
            self._add(ir.Node(name, ir.STORE, inputs, controls, stateful=True, attrs=attrs))
            self.waited[node.name] = (name,)

    def _attrs(self, variable: str) -> tuple[tuple[str, ir.Attr], ...]:
        return (("tier", self.tiers[variable]), ("variable", variable))

    def _add(self, node: ir.Node) -> None:
        self.nodes.append(node)
        for reference in dict.fromkeys(node.inputs):
            fetch = self.fetch_of.get(reference)
            if fetch is not None:
                self.readers[fetch].append(node.name)
                if node.op in _FORMS and node.inputs[0] == reference:
                    self.fetch_of[node.name] = fetch


_INSERTED = ("is_inserted", True)
"""Of a node that is not in TensorFlow's graph, and no repeat of one that is."""

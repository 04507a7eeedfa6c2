"""Computes new values of variables in far tiers where they lie, as far as they come of ops on single elements."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping

from graphswap import ir, liveness
from graphswap.elementwise import DTYPES, Instruction, Program, computes
from graphswap.plan import Plan

_WRITES = liveness.ASSIGNS | liveness.UPDATES


def far_update(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns a graph of `rewrites.place` with an `UPDATE` in the place of what leads from `FETCH`es to `STORE`s.

    That is done for the variables whose `Place` decisions say so. What a step computes element by element of a variable
    and of what meets it, such as its slots and its gradient, is one `UPDATE`, if it ends in an update and waits for
    nothing that is computed of it elsewhere, such as a norm. A variable that is not fetched then never comes to the
    device. Values that others read, such as what a weight changes by that is there, are the `UPDATE`'s outputs.

    Known weakness: where the norm of something is needed that is computed of a variable, what follows is not found.
    """
    variables = {decision.variable for decision in plan.places if decision.computes_there}
    if not variables:
        return graph
    members = _members(graph, variables)
    while members:
        fuser = _Fuser(graph, variables, members)
        fused, waiting_for_itself = _sorted(fuser.graph())
        if not waiting_for_itself:
            return fused
        members = {name for name in fuser.members if fuser.update_of[name] not in waiting_for_itself}
    return graph


def _members(graph: ir.Graph, variables: Collection[str]) -> set[str]:
    """The nodes that are computed far away: what comes of a variable there and leads to an update."""
    fetched = {node.name for node in graph.nodes if _is_far(graph, node, ir.FETCH, variables)}
    passed_over: set[str] = set()
    while True:
        found = _forward(graph, fetched, passed_over)
        leading = _leading_to_updates(graph, found, variables)
        if leading == found:
            return _with_operands(graph, found)
        passed_over |= found - leading


def _is_far(graph: ir.Graph, node: ir.Node, op: str, variables: Collection[str]) -> bool:
    """Whether the node is a FETCH or STORE of one of the variables, of values that programs compute with."""
    if node.op != op or dict(node.attrs).get("variable") not in variables:
        return False
    value = node.outputs[0] if op == ir.FETCH else graph.value(node.inputs[0])
    return value.dtype in DTYPES and bool(value.shape)


def _forward(graph: ir.Graph, fetched: set[str], passed_over: Collection[str]) -> set[str]:
    """What can be computed of variables alone and of what does not depend on them."""
    found: set[str] = set()
    depending: set[str] = set()  # other nodes that wait for those
    for node in graph.nodes:
        before = {*map(ir.producer, node.inputs), *node.control_inputs}
        is_near = not (found.isdisjoint(before) and fetched.isdisjoint(before))
        if not depending.isdisjoint(before):
            depending.add(node.name)
        elif is_near and node.name not in passed_over and computes(graph, node):
            found.add(node.name)
        elif not found.isdisjoint(before):
            depending.add(node.name)
    return found


def _leading_to_updates(graph: ir.Graph, found: Collection[str], variables: Collection[str]) -> set[str]:
    """Those of the nodes that end in updates of variables, by others of them."""
    leading: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in found:
            readers = [graph.by_name[name] for name in graph.consumers.get(node.name, ())]
            if any(reader.name in leading or _is_update_by(graph, reader, node, variables) for reader in readers):
                leading.add(node.name)
    return leading


def _is_update_by(graph: ir.Graph, reader: ir.Node, node: ir.Node, variables: Collection[str]) -> bool:
    if reader.op in _WRITES:
        return reader.inputs[1] == node.name
    return _is_far(graph, reader, ir.STORE, variables) and reader.inputs[0] == node.name


def _with_operands(graph: ir.Graph, found: set[str]) -> set[str]:
    """The nodes, and those that make something for them alone, of one array: such as a scaled gradient."""
    waited, kept = liveness.waited_for(graph), {*map(ir.producer, graph.outputs)}
    members = set(found)
    for node in reversed(graph.nodes):
        readers = graph.consumers.get(node.name, ())
        if node.name in members or node.name in waited or node.name in kept or not computes(graph, node):
            continue
        arrays = {reference for reference in node.inputs if graph.value(reference).shape}
        if len(arrays) == 1 and readers and members.issuperset(readers):
            members.add(node.name)
    return members


class _Fuser:
    """Joins members that meet, and the STOREs of what they make."""

    def __init__(self, graph: ir.Graph, variables: Collection[str], members: Collection[str]):
        self.source = graph
        self.taken = set(graph.by_name)
        self.results = {*graph.outputs}
        self.spare = dict(itertools.pairwise(graph.inputs))  # of each handle
        self.update_of: dict[str, str] = {}  # member or STORE -> its UPDATE
        self.parent = {name: name for name in members}
        self.stores: dict[str, ir.Node] = {}  # variable -> the STORE that a member ends in
        self.far: dict[str, str] = {}  # FETCH -> its variable
        stored = {
            str(dict(node.attrs)["variable"]) for node in graph.nodes if _is_far(graph, node, ir.STORE, variables)
        }
        for node in graph.nodes:
            if _is_far(graph, node, ir.FETCH, variables):
                self.far[node.name] = str(dict(node.attrs)["variable"])
            elif _is_far(graph, node, ir.STORE, variables) and node.inputs[0] in members:
                self.stores[str(dict(node.attrs)["variable"])] = node
        first: dict[str, str] = {}  # variable -> a member that has to do with it
        for name in members:
            for reference in graph.by_name[name].inputs:
                if reference in members:
                    self._join(name, reference)
                elif reference in self.far:
                    self._join(name, first.setdefault(self.far[reference], name))
        for variable, store in self.stores.items():
            self._join(store.inputs[0], first.setdefault(variable, store.inputs[0]))
        # What another node stores must be read before that: such a value is taken from the device.
        self.far = {name: var for name, var in self.far.items() if var in self.stores or var not in stored}
        reading = {name for name in members if not self.far.keys().isdisjoint(graph.by_name[name].inputs)}
        far_groups = {self._root(name) for name in (*reading, *(store.inputs[0] for store in self.stores.values()))}
        self.members = {name for name in members if self._root(name) in far_groups}

    def _root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = name = self.parent[self.parent[name]]
        return name

    def _join(self, one: str, other: str) -> None:
        self.parent[self._root(one)] = self._root(other)

    def graph(self) -> ir.Graph:
        source = self.source
        groups: dict[str, list[ir.Node]] = {}
        for node in source.nodes:
            if node.name in self.members:
                groups.setdefault(self._root(node.name), []).append(node)
        stand_in: dict[str, str] = {}  # reference to what a member makes -> that of the UPDATE
        update_of = self.update_of
        updates: dict[str, ir.Node] = {}  # the last node of a group -> its UPDATE
        stored: dict[str, list[ir.Node]] = {}
        for store in self.stores.values():
            stored.setdefault(self._root(store.inputs[0]), []).append(store)
        for root, nodes in groups.items():
            stores = stored.get(root, [])
            update, results = self._update(nodes, stores)
            stand_in.update((name, ir.ref(update.name, index)) for index, name in enumerate(results))
            update_of.update((node.name, update.name) for node in (*nodes, *stores))
            updates[max((*nodes, *stores), key=lambda node: source.position[node.name]).name] = update
        done = []
        for node in source.nodes:
            kept = updates.get(node.name) if node.name in update_of else node
            if kept is not None:
                inputs = tuple(stand_in.get(reference, reference) for reference in kept.inputs)
                controls = _renamed(kept.control_inputs, update_of, kept.name)
                done.append(dataclasses.replace(kept, inputs=inputs, control_inputs=controls))
        outputs = tuple(stand_in.get(reference, reference) for reference in source.outputs)
        controls = tuple(sorted(_renamed(source.control_outputs, update_of, "")))
        return _without_unread(source.replace(nodes=tuple(done), outputs=outputs, control_outputs=controls))

    def _update(self, nodes: list[ir.Node], stores: list[ir.Node]) -> tuple[ir.Node, list[str]]:
        """The UPDATE of a group, and which of the group's values are its outputs."""
        source, names = self.source, {node.name for node in nodes}
        read = dict.fromkeys(r for node in nodes for r in node.inputs if r not in names)
        values = [reference for reference in read if reference not in self.far]
        fetches = {self.far[reference]: reference for reference in read if reference in self.far}
        written = {str(dict(store.attrs)["variable"]): store for store in stores}
        variables = [*dict.fromkeys((*fetches, *written))]
        handles = [self._handles(variable, fetches, written) for variable in variables]
        register = {reference: number for number, reference in enumerate(values)}
        register |= {fetches[v]: len(values) + number for number, v in enumerate(variables) if v in fetches}
        given = len(values) + len(variables)
        instructions = []
        for number, node in enumerate(nodes, start=given):
            instructions.append(Instruction(node.op, tuple(register[reference] for reference in node.inputs)))
            register[node.name] = number
        inside = names | {store.name for store in stores}
        results = [n for n in names if not inside.issuperset(source.consumers.get(n, ())) or n in self.results]
        results.sort(key=source.position.__getitem__)
        made = [*results, *(store.inputs[0] for store in written.values())]
        program = Program(given, tuple(instructions), tuple(register[name] for name in made))
        value = nodes[0].outputs[0]
        attrs: dict[str, ir.Attr] = {
            "dtype": value.dtype,
            "program": str(program),
            "shape": tuple(size or 0 for size in value.shape or ()),
            "stored": tuple(variables.index(variable) for variable in written),
            "values": len(values),
        }
        node = ir.Node(
            name=ir.fresh_name(f"{(*written, *variables)[0]}/update", self.taken),
            op=ir.UPDATE,
            inputs=(*values, *(handle for pair in handles for handle in pair)),
            control_inputs=tuple(dict.fromkeys(c for n in (*nodes, *stores) for c in n.control_inputs)),
            outputs=(value,) * len(results),
            device=nodes[0].device,
            stateful=True,
            attrs=tuple(sorted(attrs.items())),
        )
        return node, results

    def _handles(self, variable: str, fetches: Mapping[str, str], written: Mapping[str, ir.Node]) -> tuple[str, ...]:
        if variable in written:
            return written[variable].inputs[1:]
        handle = self.source.by_name[fetches[variable]].inputs[0]
        return handle, self.spare[handle]


def _renamed(names: Iterable[str], update_of: Mapping[str, str], own: str) -> tuple[str, ...]:
    """The nodes, UPDATEs in the place of what they have taken over, less the node itself."""
    return tuple(dict.fromkeys(name for n in names if (name := update_of.get(n, n)) != own))


def _without_unread(graph: ir.Graph) -> ir.Graph:
    """The graph less the FETCHes that nobody reads, though an UPDATE may wait for them."""
    read = {*graph.consumers, *graph.outputs}
    unread = {node.name for node in graph.nodes if node.op == ir.FETCH and node.name not in read}
    if not unread:
        return graph
    nodes = [
        dataclasses.replace(node, control_inputs=tuple(name for name in node.control_inputs if name not in unread))
        for node in graph.nodes
        if node.name not in unread
    ]
    return graph.replace(nodes=tuple(nodes))


def _sorted(graph: ir.Graph) -> tuple[ir.Graph, set[str]]:
    """The graph with its nodes in an order that respects what they read, near their own; and those that have none."""
    position = graph.position
    needed = [{*map(ir.producer, node.inputs), *node.control_inputs} for node in graph.nodes]
    followers: dict[str, list[str]] = {}
    for node, names in zip(graph.nodes, needed, strict=True):
        for name in names:
            followers.setdefault(name, []).append(node.name)
    waiting = {node.name: len(names) for node, names in zip(graph.nodes, needed, strict=True)}
    ready = [position[name] for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[ir.Node] = []
    while ready:
        node = graph.nodes[heapq.heappop(ready)]
        order.append(node)
        for follower in followers.get(node.name, ()):
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, position[follower])
    left = {name for name, count in waiting.items() if count}
    ends = [name for name in left if left.isdisjoint(followers.get(name, ()))]
    while ends:  # only what others wait for can wait for itself
        left.discard(name := ends.pop())
        before = needed[position[name]] & left
        ends += [other for other in before if left.isdisjoint(followers[other])]
    return graph.replace(nodes=tuple(order)), left

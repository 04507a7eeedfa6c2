"""Sums gradients over all replicas block by block, beside compute, where TensorFlow would sum all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from graphswap import ir, liveness
from graphswap.collectives import Packed, instance_key, packed
from graphswap.plan import Exchange, Plan, PlanError

_KEYS = 1 << 30
"""Instance keys of blocks begin here, and are as many. TensorFlow counts its own from 1."""


def exchange(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Returns the graph with the plan's `Exchange` decisions carried out, whatever else the plan says.

    A block is joined, if it is of several values, by a node that reads nothing else; an EXCHANGE sums it, an AWAIT
    waits for the sum, and it is split again for those that read the sums. An EXCHANGE waits for the one before. A sum
    that stays as it is, such as that of a batch's statistics, waits for the last EXCHANGE that does not need it, and
    for the sum before it that does so, too: all replicas start them in the same order, whatever else their plans say.

    A block's instance key is made of what it sums and of nothing that differs between replicas or between two traces
    of a step. Sums of the same key are of the same values, of one step or of two.

    Raises:
        PlanError: If the decisions do not name each value of a sum once, or name others; or if a number is negative.
    """
    if not plan.exchanges:
        return graph
    sums = packed(graph)
    owner = {value: one for one in sums for value in one.values}
    named = [value for decision in plan.exchanges for value in decision.values]
    for decision in plan.exchanges:
        owners = {owner[value].name for value in decision.values if value in owner}
        if len(owners) != 1 or not owner.keys() >= set(decision.values):
            raise _misfit(decision, graph, "expected values that TensorFlow sums at once.")
        if decision.ahead < 0:
            raise _misfit(decision, graph, "expected a number of later blocks from 0 on.")
    wanted = [value for name in dict.fromkeys(owner[value] for value in named) for value in name.values]
    if sorted(named) != sorted(wanted):
        odd = sorted(set(wanted) ^ set(named) or set(named))[0]
        raise _misfit(plan.exchanges[0], graph, f"expected every value of a sum in one block; look at '{odd}'.")
    return _Exchanger(graph, plan.exchanges, owner).graph()


def _misfit(decision: Exchange, graph: ir.Graph, why: str) -> PlanError:
    return PlanError(f"{decision} does not fit graph '{graph.name}': {why}")


class _Exchanger:
    def __init__(self, graph: ir.Graph, decisions: tuple[Exchange, ...], owner: Mapping[str, Packed]):
        self.source = graph
        self.decisions = decisions
        self.owner = owner
        self.gone = {owner[decision.values[0]] for decision in decisions}
        self.number = {name: number for number, name in enumerate(dict.fromkeys(one.name for one in owner.values()))}
        self.taken = set(graph.by_name)
        self.root_of = liveness.roots(graph)
        self.readers = _readers(graph, self.root_of)
        self.keys: set[int] = set()
        self.stand_in: dict[str, str] = {}  # reference to what is gone -> reference to what is read instead
        self.awaits: dict[str, list[str]] = {}  # sum that is gone -> what to wait for instead
        self.nodes: list[ir.Node] = []

    def graph(self) -> ir.Graph:
        source = self.source
        gone = {name for one in self.gone for name in (one.name, one.join, one.parts)}
        gone |= {sizes for one in self.gone if one.parts and (sizes := self._sizes_of(one))}
        earliest = self._earliest()
        blocks = self._blocks(gone)
        last: dict[int, str] = {}  # number of a block -> the last sum that stays and is needed for it
        for node in source.nodes:
            if node.name in gone:
                continue
            inputs = tuple(self.stand_in.get(reference, reference) for reference in node.inputs)
            if node.op == ir.ALL_REDUCE:
                before = earliest.get(node.name, len(blocks))
                controls = [name for name in node.control_inputs if name not in self.awaits]
                controls += [*blocks[:before][-1:], *([last[before]] if before in last else [])]
                last[before] = node.name
            else:
                controls = [wait for name in node.control_inputs for wait in self.awaits.get(name, (name,))]
            controls = tuple(dict.fromkeys(controls))
            if (inputs, controls) != (node.inputs, node.control_inputs):
                node = dataclasses.replace(node, inputs=inputs, control_inputs=controls)
            self.nodes.append(node)
        waits = dict.fromkeys(wait for name in source.control_outputs for wait in self.awaits.get(name, (name,)))
        return source.replace(
            nodes=_sorted(self.nodes),
            outputs=tuple(self.stand_in.get(reference, reference) for reference in source.outputs),
            control_outputs=tuple(waits),
        )

    def _blocks(self, gone: set[str]) -> list[str]:
        """Adds all blocks. Returns their EXCHANGE nodes."""
        blocks: list[str] = []
        launches: list[str] = []  # what runs right before each of them
        for number, decision in enumerate(self.decisions):
            one = self.owner[decision.values[0]]
            summing = self.source.by_name[one.name]
            source, is_joined = decision.values[0], len(decision.values) > 1
            name = ir.fresh_name(f"{one.name}/block_{number}", self.taken)
            if is_joined:
                join = self.source.by_name[one.join]
                source = ir.fresh_name(f"{name}/join", self.taken)
                value = dataclasses.replace(join.outputs[0], shape=(sum(map(self._length, decision.values)),))
                inputs = (*decision.values, join.inputs[-1])
                self._add(join, name=source, inputs=inputs, outputs=(value,), attrs=(_INSERTED,), control_inputs=())
            value = self.nodes[-1].outputs[0] if is_joined else self.source.value(source)
            workers: Any = dict(summing.attrs)["workers"]
            arriving = ir.Value("uint8", (value.nbytes - value.nbytes // workers,))
            attrs: dict[str, ir.Attr] = {"held_pieces": (1, workers - 1), "instance_key": self._key(decision, one)}
            attrs |= {"is_joined": is_joined, "sum": one.name, "workers": workers}
            controls = [control for control in summing.control_inputs if not self._is_sum(control)]
            self._add(
                summing,
                name=name,
                op=ir.EXCHANGE,
                inputs=(source, *summing.inputs[1:3], *summing.inputs[4:]),
                control_inputs=tuple(dict.fromkeys((*controls, *blocks[-1:]))),
                outputs=(value, arriving),
                attrs=tuple(sorted(attrs.items())),
            )
            blocks.append(name)
            launches.append(ir.producer(source))
        for number, (decision, name) in enumerate(zip(self.decisions, blocks, strict=True)):
            launch = launches[min(number + decision.ahead, len(launches) - 1)]
            self._add_await(decision, name, launch, gone)
        return blocks

    def _add_await(self, decision: Exchange, name: str, launch: str, gone: set[str]) -> None:
        """Adds what waits for a block, and what splits it.

        Args:
            decision: The block.
            name: Of its EXCHANGE.
            launch: What runs right before the last EXCHANGE that starts before this one is waited for.
            gone: Names of nodes that will not be in the graph.
        """
        one = self.owner[decision.values[0]]
        summing, value = self.source.by_name[one.name], next(n.outputs[0] for n in self.nodes if n.name == name)
        # A buffer that others read, too, is none to sum in, and stays until the block is done.
        shared = [v for v in decision.values if len(decision.values) == 1 and self.readers[self.root_of[v]] - gone]
        wait = ir.fresh_name(f"{name}/await", self.taken)
        self.awaits.setdefault(one.name, []).append(wait)
        self._add(
            summing,
            name=wait,
            op=ir.AWAIT,
            inputs=(name, ir.ref(name, 1), *shared),
            control_inputs=(launch,),
            outputs=(value,),
            attrs=(("ahead", decision.ahead),),
        )
        if not one.parts:
            self.stand_in[one.name] = wait
            return
        split = self.source.by_name[one.parts]
        references = dict(zip(one.values, split.refs(), strict=True))
        if len(decision.values) == 1:
            self.stand_in[references[decision.values[0]]] = wait
            return
        parts = ir.fresh_name(f"{name}/parts", self.taken)
        inputs, outputs = (wait, split.inputs[2]), tuple(map(self.source.value, decision.values))
        node = self._add(split, name=parts, inputs=inputs, control_inputs=(), outputs=outputs, attrs=(_INSERTED,))
        self.stand_in.update(zip((references[value] for value in decision.values), node.refs(), strict=True))

    def _earliest(self) -> Mapping[str, int]:
        """Number of the first block that a node is needed for; those that none needs are missing."""
        found: dict[str, int] = {}
        for number, decision in enumerate(self.decisions):
            summing = self.source.by_name[self.owner[decision.values[0]].name]
            waits = [control for control in summing.control_inputs if not self._is_sum(control)]
            for name in (*map(ir.producer, decision.values), *waits):
                found[name] = min(number, found.get(name, number))
        sums = {one.name for one in self.gone}
        for node in reversed(self.source.nodes):
            if node.name in found and node.name not in sums:
                for name in (*map(ir.producer, node.inputs), *node.control_inputs):
                    found[name] = min(found[node.name], found.get(name, found[node.name]))
        return found

    def _key(self, decision: Exchange, one: Packed) -> int:
        """Equal in all replicas and all traces for equal blocks, and in one step for no two."""
        places = [(one.values.index(value), str(self.source.value(value))) for value in decision.values]
        what = f"{self.number[one.name]} {len(one.values)} {places}"
        return instance_key(what, _KEYS, self.keys)

    def _is_sum(self, name: str) -> bool:
        return self.source.by_name[name].op == ir.ALL_REDUCE

    def _sizes_of(self, one: Packed) -> str:
        """The constant with the lengths of the parts, if nothing else reads it."""
        sizes = self.source.by_name[one.parts].inputs[1]
        return sizes if self.source.consumers[sizes] == (one.parts,) and sizes not in self.source.outputs else ""

    def _length(self, value: str) -> int:
        (length,) = self.source.value(value).shape or (0,)
        return int(length or 0)

    def _add(self, like: ir.Node, **changes: object) -> ir.Node:
        node = dataclasses.replace(like, **changes)  # pyright: ignore[reportArgumentType]
        self.nodes.append(node)
        return node


def _readers(graph: ir.Graph, root_of: Mapping[str, str]) -> Mapping[str, set[str]]:
    """Buffer -> the nodes that read it and do more than name it anew."""
    found: dict[str, set[str]] = {root: set() for root in root_of.values()}
    for node in graph.nodes:
        named = {root_of[reference] for reference in node.refs()}
        for reference in node.inputs:
            if root_of[reference] not in named:
                found[root_of[reference]].add(node.name)
    return found


def _sorted(nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
    """The nodes, each after what it reads and waits for."""
    by_name = {node.name: node for node in nodes}
    done: dict[str, ir.Node] = {}
    for root in by_name:
        pending, waiting = [root], set[str]()
        while pending:
            node = by_name[pending[-1]]
            missing = [n for n in (*map(ir.producer, node.inputs), *node.control_inputs) if n not in done]
            if not missing:
                done[pending.pop()] = node
                continue
            if not {node.name, *waiting}.isdisjoint(missing):
                raise PlanError(
                    f"expected blocks that are waited for before what needs them runs, received some for which "
                    f"'{node.name}' would wait for itself. Let fewer blocks start before one is waited for."
                )
            waiting.add(node.name)
            pending += reversed(missing)
    return tuple(done.values())


_INSERTED = ("is_inserted", True)
"""Of a node that is not in TensorFlow's graph, and no repeat of one that is."""

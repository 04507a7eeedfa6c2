"""The replicas of a step that one process trains on several devices: alike, they carry out one plan.

TensorFlow traces all replicas into one graph. `split` finds which of its nodes are the same node of different replicas.
The first replica's part, with what belongs to no replica, is a step for one device, which can be planned as any other.
What a plan makes of it, `Parts.merged` does to all parts: each gets inserted nodes, an order and a device of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from graphswap import ir, liveness
from graphswap.cost_model import Profile


class UnlikeReplicas(ValueError):
    """The devices' parts of a step are not alike. The message names the first node that is in one of them alone."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A step of several replicas.

    Attributes:
        whole: The step.
        first: What runs on the first replica's device and what belongs to no replica. In the place of a value of
            another replica it reads a `RECEIVE` of the first one's.
        twins: For each further replica, name of a node of the first one to its node.
        devices: Of all replicas, as the nodes spell them.
    """

    whole: ir.Graph
    first: ir.Graph
    twins: tuple[Mapping[str, str], ...]
    devices: tuple[str, ...]

    def merged(self, rewritten: ir.Graph) -> ir.Graph:
        """What becomes of the whole step if all replicas do what the first one does.

        Args:
            rewritten: `first`, rewritten under a plan.

        Returns:
            The whole step, replicas in step; the same object for `first` itself.
        """
        return self.whole if rewritten is self.first else _Merger(self, rewritten).graph()

    def of_first(self, profile: Profile, graph: ir.Graph) -> Profile:
        """Costs of the first replica's nodes, as measured while all replicas ran on one CPU.

        They share its cores: a node takes as long as all replicas' do together.

        Args:
            profile: Of the nodes of a step that was `merged`.
            graph: The first replica's part of it: `first`, or what a pass has made of that.
        """

        def of_all(name: str) -> list[str]:
            return [name, *(twins.get(name, _added(name, number)) for number, twins in enumerate(self.twins, 1))]

        alike = {name: of_all(name) for name in graph.by_name}
        seconds = {name: sum(profile.seconds.get(one, 0.0) for one in ones) for name, ones in alike.items()}
        workspace = {
            name: max((profile.workspace[one] for one in ones if one in profile.workspace), key=lambda one: one.nbytes)
            for name, ones in alike.items()
            if not profile.workspace.keys().isdisjoint(ones)
        }
        return dataclasses.replace(profile, seconds=seconds, workspace=workspace)

    @functools.cached_property
    def owners(self) -> Mapping[str, tuple[int, str]]:
        """Node of a further replica to the number of its replica, from 1, and the first replica's node."""
        return {twin: (number, name) for number, twins in enumerate(self.twins, 1) for name, twin in twins.items()}


def used_devices(graph: ir.Graph, kind: str) -> tuple[str, ...]:
    """The devices of a kind that the step's nodes name, by their numbers.

    Args:
        graph: The step.
        kind: "CPU" or "GPU".
    """
    found = {short(node.device): node.device for node in graph.nodes}
    named = sorted((int(name.split(":")[1]), device) for name, device in found.items() if name.startswith(f"{kind}:"))
    return tuple(device for _, device in named)


def _added(name: str, number: int) -> str:
    """What a node that a pass has added is called in another replica."""
    return f"{name}/replica_{number}"


def short(device: str) -> str:
    """The end of a device's full name: "GPU:1"."""
    return device.rpartition("device:")[2]


def split(graph: ir.Graph, devices: Sequence[str]) -> Parts:
    """Finds the replicas' parts of a step.

    Nodes are the same node of two replicas if they have the same op and dtypes, the further replica's takes no more
    bytes (its share of a batch may be smaller), and what they read are the same nodes again, or is one value. Of
    several that are equally alike, the first one that was traced is taken. What the first device runs beside its part
    belongs to no replica, such as a sum of all replicas' values that is computed there.

    Args:
        graph: The whole step.
        devices: Of the replicas, as the nodes spell them.

    Raises:
        UnlikeReplicas: If a further device runs a node that the first one does not, or reads values of another's.
    """
    twins = tuple(_Matcher(graph, devices[0], device).twins() for device in devices[1:])
    for number, found in enumerate(twins, 1):
        lone = next((name for name in graph.position if (name in found) != (name in twins[0])), None)
        if lone is not None:
            raise _unlike(
                graph.by_name[lone], devices, f"which the parts of {devices[1]} and {devices[number]} differ in"
            )
    parts = Parts(graph, graph, twins, tuple(devices))
    return dataclasses.replace(parts, first=_first(parts))


class _Matcher:
    """Pairs the nodes of two devices."""

    def __init__(self, graph: ir.Graph, first: str, other: str):
        self.graph = graph
        self.devices = short(first), short(other)
        self.pairs: dict[str, str] = {}  # node of the other replica -> of the first one
        self.taken: set[str] = set()
        self.candidates: dict[tuple[str, int], list[ir.Node]] = collections.defaultdict(list)
        for node in graph.nodes:
            if short(node.device) == self.devices[0] and node.op not in ir.RESIDENT_OPS:
                self.candidates[node.op, len(node.inputs)].append(node)

    def twins(self) -> Mapping[str, str]:
        """Name of a node of the first replica to that of the other one."""
        for node in self.graph.nodes:
            if short(node.device) == self.devices[1] and node.op not in ir.RESIDENT_OPS:
                self._pair(node)
        return {name: twin for twin, name in self.pairs.items()}

    def _pair(self, node: ir.Node) -> None:
        alike = self.candidates[node.op, len(node.inputs)]
        for index, candidate in enumerate(alike):
            found: dict[str, str] = {}
            if self._are_twins(candidate, node, found):
                del alike[index]
                self.pairs.update(found)
                self.taken.update(found.values())
                return
        raise _unlike(node, self.devices, f"to which no node of {self.devices[0]} is alike")

    def _are_twins(self, one: ir.Node, other: ir.Node, found: dict[str, str]) -> bool:
        """Whether two nodes are the same node of two replicas; then adds them and what only they show to be alike."""
        if found.get(other.name, self.pairs.get(other.name)) == one.name:
            return True
        if other.name in found or other.name in self.pairs or one.name in self.taken or one.name in found.values():
            return False
        if (one.op, one.stateful, len(one.inputs)) != (other.op, other.stateful, len(other.inputs)):
            return False
        if [value.dtype for value in one.outputs] != [value.dtype for value in other.outputs]:
            return False
        if any(b > a for a, b in zip(liveness.output_bytes(one), liveness.output_bytes(other), strict=True)):
            return False
        found[other.name] = one.name
        return all(self._read_alike(a, b, found) for a, b in zip(one.inputs, other.inputs, strict=True))

    def _read_alike(self, one: str, other: str, found: dict[str, str]) -> bool:
        if one == other:
            return True
        (name, index), (twin, number) = ir.split_ref(one), ir.split_ref(other)
        if index != number or name == twin:
            return False
        a, b = self.graph.by_name[name], self.graph.by_name[twin]
        if not (self._floats(a) and self._floats(b)):
            return found.get(twin, self.pairs.get(twin)) == name
        return self._are_twins(a, b, found)

    def _floats(self, node: ir.Node) -> bool:
        """Whether what reads a node tells whose it is: it has no replica's device, or was there before the step."""
        return short(node.device) not in self.devices or node.op in ir.RESIDENT_OPS


def _unlike(node: ir.Node, devices: Sequence[str], what: str) -> UnlikeReplicas:
    names = ", ".join(map(short, devices))
    return UnlikeReplicas(
        f"expected replicas that run the same nodes, on {names}, received node '{node.name}' ({node.op}), {what}. Let "
        "a replica's part not hang on which replica it is"
    )


def _first(parts: Parts) -> ir.Graph:
    """The graph of the first replica and of what belongs to none."""
    whole, owners, device = parts.whole, parts.owners, parts.devices[0]
    own = parts.twins[0].keys()
    position = whole.position
    received: dict[str, dict[str, ir.Node]] = collections.defaultdict(dict)  # node of the first one -> by reference
    taken = set(position)
    for node in whole.nodes:
        for reference in node.inputs:
            name, index = ir.split_ref(reference)
            number, source = owners.get(name, (0, name))
            if not number and not (name in own and node.name in owners):
                continue
            if node.name in own or owners.get(node.name, (number, ""))[0] != number:
                raise _unlike(node, parts.devices, f"which reads '{reference}' of another replica")
            if node.name not in owners and position[source] > position[node.name]:
                raise _unlike(node, parts.devices, f"which reads '{reference}' before '{source}' is there")
            if node.name not in owners and reference not in received[source]:
                value = whole.value(ir.ref(source, index))
                received[source][reference] = ir.Node(
                    ir.fresh_name(f"{source}/from_{number}{f'_{index}' if index else ''}", taken),
                    ir.RECEIVE,
                    (ir.ref(source, index),),
                    outputs=(value,),
                    device=device,
                    stateful=True,
                    attrs=(("only_reads", True), ("replica", number)),
                )
    stand_in = {reference: node.name for nodes in received.values() for reference, node in nodes.items()}
    nodes: list[ir.Node] = []
    for node in whole.nodes:
        if node.name in owners:
            continue
        alike = [whole.by_name[found[node.name]] for found in parts.twins if node.name in own]
        waits = (owners.get(name, (0, name))[1] for one in (node, *alike) for name in one.control_inputs)
        controls = tuple(name for name in dict.fromkeys(waits) if name != node.name)
        late = next((name for name in controls if position[name] > position[node.name]), None)
        if late is not None:
            raise _unlike(node, parts.devices, f"which waits for what another replica has as '{late}'")
        changes: dict[str, object] = {}
        if node.name in own and not node.device and node.op not in ir.RESIDENT_OPS:
            changes["device"] = device
        elif node.name not in own and not node.stateful and node.op not in ir.RESIDENT_OPS:
            # No replica's: it runs once, whatever the replicas repeat.
            changes |= {"stateful": True, "attrs": tuple(sorted((*node.attrs, ("only_reads", True))))}
        inputs = tuple(stand_in.get(reference, reference) for reference in node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs, control_inputs=controls, **changes))
        nodes += received[node.name].values()

    def own_ref(reference: str) -> str:
        name, index = ir.split_ref(reference)
        return ir.ref(owners.get(name, (0, name))[1], index)

    return ir.verify(
        whole.replace(
            nodes=tuple(nodes),
            inputs=tuple(name for name in whole.inputs if name not in owners),
            outputs=tuple(dict.fromkeys(map(own_ref, whole.outputs))),
            control_outputs=tuple(dict.fromkeys(map(own_ref, whole.control_outputs))),
        )
    )


_NAMING_ATTRS = ("beside", "sum")
"""Attributes whose value is the name of another node."""


class _Merger:
    def __init__(self, parts: Parts, rewritten: ir.Graph):
        self.parts = parts
        self.rewritten = rewritten
        self.names: list[dict[str, str]] = [{}, *map(dict, parts.twins)]  # by replica
        self.origins = ir.origin(rewritten)
        self.common = {name for name in rewritten.by_name if self._is_common(name)}
        self.stand_ins: dict[str, tuple[str, ...]] = {}  # RECEIVE node -> what to wait for in its place
        for node in rewritten.nodes:
            if node.op == ir.RECEIVE:
                self.stand_ins[node.name] = (*self._waits(node), ir.producer(node.inputs[0]))

    def graph(self) -> ir.Graph:
        whole, rewritten = self.parts.whole, self.rewritten
        taken = {*whole.by_name, *rewritten.by_name}
        nodes: list[ir.Node] = []
        for node in rewritten.nodes:
            if node.op == ir.RECEIVE:
                continue
            nodes.append(self._of(node, 0))
            if node.name in self.common:
                continue
            for number in range(1, len(self.parts.devices)):
                names = self.names[number]
                if node.name not in names:
                    names[node.name] = ir.fresh_name(_added(node.name, number), taken)
                nodes.append(self._of(node, number))
        last = dict(zip(self.parts.first.outputs, rewritten.outputs, strict=True))
        outputs = []
        for reference in whole.outputs:
            name, index = ir.split_ref(reference)
            number, source = self.parts.owners.get(name, (0, name))
            outputs.append(self._ref(last[ir.ref(source, index)], number))
        ends = [
            self.names[number].get(name, name)
            for name in rewritten.control_outputs
            for number in range(1 if name in self.common else len(self.parts.devices))
        ]
        return ir.verify(whole.replace(nodes=tuple(nodes), outputs=tuple(outputs), control_outputs=tuple(ends)))

    def _is_common(self, name: str) -> bool:
        """Whether a node belongs to no replica: it is one of the step's, or moves what such a one makes or reads."""
        source = ir.producer(self.origins.get(name, name))
        if source in self.parts.whole.by_name:
            return source not in self.parts.twins[0]
        return source in self.rewritten.by_name and self.rewritten.by_name[source].op == ir.RECEIVE

    def _of(self, node: ir.Node, number: int) -> ir.Node:
        """What a node is in a replica."""
        names, devices = self.names[number], self.parts.devices
        name = names.get(node.name, node.name)
        original = self.parts.whole.by_name.get(name)
        # What belongs to no replica has its place in the order of each.
        everyone = self.names if node.name in self.common else [names]
        waits = [one.get(wait, wait) for wait in self._waits(node) for one in everyone]
        device = devices[number] if number else node.device
        attrs = tuple((key, names.get(str(v), v) if key in _NAMING_ATTRS else v) for key, v in node.attrs)
        outputs = tuple(self._value(r, value, number) for r, value in zip(node.refs(), node.outputs, strict=True))
        if node.op == ir.SWAP_OUT:
            outputs = node.outputs
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            moved = self._value(node.name, ir.Value("variant"), number)
            attrs = tuple((key, moved.nbytes or value if key == "nbytes" else value) for key, value in attrs)
        stateful = node.stateful
        if original is not None:
            waits += self._waits_of_whole(original, self._waits(node))
            device, stateful = original.device, original.stateful
            attrs = tuple(sorted((*original.attrs, *(attr for attr in attrs if attr[0] in _NAMING_ATTRS))))
        return dataclasses.replace(
            node,
            name=name,
            inputs=tuple(self._ref(reference, number) for reference in node.inputs),
            control_inputs=tuple(wait for wait in dict.fromkeys(waits) if wait != name),
            device=device,
            stateful=stateful,
            attrs=attrs,
            outputs=outputs,
            like=names.get(node.like, node.like),
        )

    def _ref(self, reference: str, number: int) -> str:
        """A reference of the first replica's, in a replica: its own value, the one received, or no replica's."""
        name, index = ir.split_ref(reference)
        node = self.rewritten.by_name[name]
        if node.op == ir.RECEIVE:
            sender = dict(node.attrs)["replica"]
            assert isinstance(sender, int)
            return self._ref(node.inputs[0], sender)
        return ir.ref(self.names[number].get(name, name), index)

    def _waits(self, node: ir.Node) -> tuple[str, ...]:
        """The nodes of the first replica, and common ones, that a node waits for."""
        waits = (wait for name in node.control_inputs for wait in self.stand_ins.get(name, (name,)))
        return tuple(dict.fromkeys(waits))

    def _waits_of_whole(self, node: ir.Node, waits: Sequence[str]) -> list[str]:
        """What a node of the whole step waited for, in any replica: of what is gone, what stands for it there.

        Args:
            node: The node as it was.
            waits: What it waits for of the first replica now.
        """
        found = []
        for name in node.control_inputs:
            number, source = self.parts.owners.get(name, (0, name))
            is_there = source in self.rewritten.by_name
            found += [name] if is_there else [self.names[number].get(wait, wait) for wait in waits]
        return found

    def _value(self, reference: str, known: ir.Value, number: int) -> ir.Value:
        """The type of a value in a replica, whose share of a batch may be smaller; `known` of what is in none."""
        name, index = ir.split_ref(self.origins.get(reference, reference))
        original = self.parts.whole.by_name.get(self.names[number].get(name, name))
        return known if original is None else original.outputs[index]

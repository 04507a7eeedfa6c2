"""Leaves what runs on parameter servers to them, and keeps of a step what one of its workers does.

Variables live on the servers, and so do their updates. The worker reads a variable where it needs it, as often as a
plan says so, and sends what the servers read.
"""

from __future__ import annotations

import dataclasses

from graphswap import ir
from graphswap.variables import SMALL_BYTES

PS_TIER = "ps"
"""Of what a worker reads from a parameter server, or sends there."""
_JOB = "/job:ps/"


def host_update(graph: ir.Graph) -> ir.Graph:
    """Returns the worker's part of the graph; the same object if nothing runs on a parameter server.

    In the place of a server's read of a variable a `FETCH` stands before the worker's first reader: it takes device
    memory from there on, and may be repeated. Its attribute `source` is the read, `home` the server. Values of up to
    64 KiB come at the start of the step and stay: each is a Placeholder with the same attributes. A `STORE` stands
    after each of the worker's nodes that servers read: its value is on the device until it has left for them. Its
    attribute `value` is what they read. The variables' own nodes stay, and hold no bytes.

    Raises:
        ir.GraphError: If the worker reads something of a server's that is not a variable's value.
    """
    if not any(is_remote(node) for node in graph.nodes):
        return graph
    return _Split(graph).graph()


def is_remote(node: ir.Node) -> bool:
    """Whether a node runs on a parameter server."""
    return _JOB in node.device


class _Split:
    def __init__(self, graph: ir.Graph):
        self.source = graph
        self.taken = set(graph.by_name)
        self.remote = {node.name for node in graph.nodes if is_remote(node)}
        self.after: dict[str, tuple[str, ...]] = {}  # a server's node -> the worker's nodes that it waits for
        self.writes: dict[str, int] = {}  # variable -> how often it was written so far
        self.versions: dict[str, tuple[str, int]] = {}  # a server's read -> variable, and writes before it
        self.arrived: dict[tuple[str, int], str] = {}  # such a version -> its value on the worker
        self.sent: dict[str, str] = {}  # the worker's value -> its STORE
        self.first: list[ir.Node] = []
        self.nodes: list[ir.Node] = []

    def graph(self) -> ir.Graph:
        for node in self.source.nodes:
            if node.name not in self.remote:
                self._keep(node)
            elif node.op == "Placeholder":
                held = tuple((name, value) for name, value in node.attrs if name != "held_bytes")
                self.first.append(dataclasses.replace(node, attrs=held, device=""))
                self.after[node.name] = ()
            else:
                self._leave(node)
        names = (name for end in self.source.control_outputs for name in self.after.get(end, (end,)))
        return self.source.replace(
            nodes=(*self.first, *self.nodes),
            outputs=tuple(r for r in self.source.outputs if ir.producer(r) not in self.remote),
            control_outputs=tuple(sorted({*names, *self.sent.values()})),
        )

    def _keep(self, node: ir.Node) -> None:
        inputs = tuple(self._value(r, node) if ir.producer(r) in self.remote else r for r in node.inputs)
        self.nodes.append(dataclasses.replace(node, inputs=inputs, control_inputs=self._controls(node)))

    def _controls(self, node: ir.Node) -> tuple[str, ...]:
        return tuple(dict.fromkeys(w for name in node.control_inputs for w in self.after.get(name, (name,))))

    def _leave(self, node: ir.Node) -> None:
        """Notes what a server's node waits for, and sends what it reads."""
        waits = list(self._controls(node))
        for reference in node.inputs:
            name = ir.producer(reference)
            if name in self.remote:
                waits += self.after[name]
            elif self.source.by_name[name].op not in ir.RESIDENT_OPS:
                waits.append(self._send(reference, node))
        self.after[node.name] = tuple(dict.fromkeys(waits))
        variable = node.inputs[0] if node.inputs else ""
        if node.op == "ReadVariableOp":
            self.versions[node.name] = variable, self.writes.get(variable, 0)
        elif variable and self.source.value(variable).dtype == "resource":
            self.writes[variable] = self.writes.get(variable, 0) + 1

    def _send(self, reference: str, reader: ir.Node) -> str:
        if reference not in self.sent:
            name = ir.fresh_name(f"{reference.replace(':', '_')}/send", self.taken)
            attrs = (("home", reader.device), ("tier", PS_TIER), ("value", reference))
            self.nodes.append(ir.Node(name, ir.STORE, (reference,), stateful=True, attrs=attrs))
            self.sent[reference] = name
        return self.sent[reference]

    def _value(self, reference: str, reader: ir.Node) -> str:
        """The value of a server's on the worker."""
        read = self.source.by_name[ir.producer(reference)]
        if read.op == "Placeholder":
            return reference  # a handle
        if read.name not in self.versions:
            raise ir.GraphError(
                f"graph {self.source.name}: expected workers to read variables of parameter servers, received node "
                f"'{reader.name}' ({reader.op}), which reads '{read.name}' ({read.op}) on '{read.device}'. Let the "
                "server's results be results of the step, or compute them on the worker."
            )
        version = self.versions[read.name]
        if version not in self.arrived:
            variable, waits = version[0], self.after[read.name]
            attrs = (("home", read.device), ("source", read.name), ("tier", PS_TIER))
            if read.outputs[0].nbytes <= SMALL_BYTES and not waits:
                name = ir.fresh_name(f"{variable}/arrived", self.taken)
                attrs = (("handle", variable), *attrs)
                self.first.append(ir.Node(name, "Placeholder", outputs=read.outputs, attrs=attrs))
            else:
                name = ir.fresh_name(f"{variable}/fetch", self.taken)
                self.nodes.append(ir.Node(name, ir.FETCH, (variable,), waits, read.outputs, attrs=attrs))
            self.arrived[version] = name
        return self.arrived[version]

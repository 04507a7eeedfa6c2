"""Random training steps, and comparisons of graphs."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from hypothesis import strategies as st

from graphswap import ir, parser
from graphswap.collectives import packed
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile
from graphswap.plan import Exchange, Plan, Prefetch, Recompute, Swap, WriteBack
from graphswap.strategies.auto import Auto
from graphswap.strategies.base import Strategy
from graphswap.strategies.checkmate import Checkmate
from graphswap.strategies.joint import Joint

_WIDTHS = (8, 40, 64)
_MEBIBYTE = ir.Value("float32", (512, 512))


def assert_graph_text(graph: ir.Graph, text: str) -> None:
    """Compares a graph with a text, whose white space and comments do not matter, line by line."""
    assert str(graph).splitlines() == str(parser.parse(text)).splitlines()


def chain(layers: int) -> ir.Graph:
    """Matrix products f1, f2 ... and b of the last, ... b2, b1, which reads f1; every value takes a MiB."""
    nodes = [ir.Node(name, "Placeholder", outputs=(_MEBIBYTE,)) for name in ("w", "x")]

    def multiply(name: str, other: str) -> None:
        nodes.append(ir.Node(name, "MatMul", (nodes[-1].name, other), outputs=(_MEBIBYTE,)))

    for layer in range(1, layers + 1):
        multiply(f"f{layer}", "w")
    for layer in reversed(range(1, layers + 1)):
        multiply(f"b{layer}", f"f{layer}" if layer < layers else "w")
    return ir.verify(ir.Graph("chain", tuple(nodes), ("w", "x"), ("b1",)))


def seconds_per_node(seconds: float, link: Link, **device: Any) -> CostModel:
    """A cost model under which all nodes take the same time."""
    spec = DeviceSpec(launch_seconds=seconds, links={"host": link, "disk": link}, **device)
    return CostModel(spec, Profile("", {}, {}))


def brief(strategy: Strategy) -> Strategy:
    """The strategy; those that search, which could go on for long on each of many graphs, stop after a while."""
    if isinstance(strategy, (Auto, Checkmate, Joint)):
        return dataclasses.replace(strategy, planning_seconds=0.4)
    return strategy


def random_graphs(max_layers: int = 8, batch: int = 8) -> st.SearchStrategy[ir.Graph]:
    """A hypothesis strategy for training steps."""
    return st.builds(random_graph, st.randoms(use_true_random=False), st.integers(1, max_layers), st.just(batch))


def random_graph(rng: random.Random, layers: int = 8, batch: int = 8) -> ir.Graph:
    """A step of gradient descent on a chain of random layers, with skips.

    Layers are matrix products, activations, sums with an earlier value, dropout (a stateful op),
    normalisations (several outputs, and workspace) and ops that alias. The shapes agree.
    """
    return _Step(rng).build(layers, batch)


def replicated(graph: ir.Graph, workers: int) -> ir.Graph:
    """The step of one of several replicas, which sum all gradients at once, as TensorFlow packs them."""
    gradients = [node for node in graph.nodes if node.name.startswith("grad_w_")]
    if not gradients:
        return graph
    late = {node.name for node in gradients}
    for node in graph.nodes:
        if not late.isdisjoint((*map(ir.producer, node.inputs), *node.control_inputs)):
            late.add(node.name)
    late -= {node.name for node in gradients}
    lengths = [node.outputs[0].nbytes // 4 for node in gradients]
    flat = [ir.Value("float32", (length,)) for length in lengths]
    packed, index = ir.Value("float32", (sum(lengths),)), ir.Value("int32")
    names = [f"flat_{node.name}" for node in gradients]
    constants = ("axis", "group_size", "group_key", "sizes")
    sum_inputs = ("joined", "group_size", "group_key", "key", "token")
    pack = [
        *(ir.Node(name, "Const", outputs=(index,)) for name in constants),
        ir.Node("key", "Placeholder", outputs=(index,)),
        ir.Node("token", "Placeholder", outputs=(ir.Value("resource"),)),
        *(ir.Node(n, "Reshape", (g.name,), outputs=(v,)) for n, g, v in zip(names, gradients, flat, strict=True)),
        ir.Node("joined", "ConcatV2", (*names, "axis"), outputs=(packed,)),
        ir.Node("sum", ir.ALL_REDUCE, sum_inputs, outputs=(packed,), stateful=True, attrs=(("workers", workers),)),
        ir.Node("split", "SplitV", ("sum", "sizes", "axis"), outputs=tuple(flat)),
    ]
    for number, node in enumerate(gradients):
        pack.append(ir.Node(f"summed_{node.name}", "Reshape", (ir.ref("split", number),), outputs=node.outputs))
    stand_in = {node.name: f"summed_{node.name}" for node in gradients}
    updates = [
        dataclasses.replace(node, inputs=tuple(stand_in.get(reference, reference) for reference in node.inputs))
        for node in graph.nodes
        if node.name in late
    ]
    early = [node for node in graph.nodes if node.name not in late]
    return ir.verify(graph.replace(nodes=(*early, *pack, *updates), inputs=(*graph.inputs, "key", "token")))


def random_exchanges(rng: random.Random, graph: ir.Graph) -> Plan:
    """A plan of any valid blocks of what `replicated` sums."""
    values = [value for one in packed(graph) for value in one.values]
    rng.shuffle(values)
    found: list[Exchange] = []
    while values:
        count = rng.randint(1, len(values))
        found.append(Exchange(tuple(values[:count]), rng.randint(0, 3)))
        del values[:count]
    return Plan(decisions=tuple(found))


def random_swap(rng: random.Random, graph: ir.Graph, names: tuple[str, ...]) -> Swap:
    """Any valid swap, however useless, of a graph in this order."""
    early = [(at, graph.by_name[name]) for at, name in enumerate(names[:-1])]
    movable = [(at, node) for at, node in early if node.op not in (ir.EXCHANGE, ir.VIEW)]
    values = [(at, ref) for at, node in movable for ref, v in zip(node.refs(), node.outputs, strict=True) if v.nbytes]
    born, value = rng.choice(values)
    out, use = sorted(rng.sample(range(born, len(names)), 2))
    freed, start = rng.randint(out + 1, use), rng.randint(out, use - 1)
    tier = rng.choice(["host", "disk"])
    return Swap(value, names[out], names[freed], names[start], names[use], tier)


def random_recompute(rng: random.Random, graph: ir.Graph, names: tuple[str, ...]) -> Recompute:
    """Any valid recompute, likewise."""
    before = rng.randrange(len(names))
    nodes = [graph.by_name[name] for name in names[:before]]
    stored = {handle for handle, store in graph.stores.items() if store in names[:before]}
    pure = [n.name for n in nodes if not n.stateful and n.op not in ir.RESIDENT_OPS and stored.isdisjoint(n.inputs)]
    return Recompute(tuple(name for name in pure if rng.random() < 0.3), names[before])


def random_prefetches(rng: random.Random, graph: ir.Graph, names: tuple[str, ...], plan: Plan) -> list[Prefetch]:
    """Any valid prefetches of what a plan's step fetches."""
    place = {name: at for at, name in enumerate(names)}
    fetches = [node for node in graph.nodes if node.op == ir.FETCH]
    runs = [(node.name, node.name) for node in fetches]
    fetched = {node.name for node in fetches}
    runs += [(name, repeat.before) for repeat in plan.recomputes for name in repeat.nodes if name in fetched]
    found = []
    for name, before in (run for run in dict.fromkeys(runs) if runs.count(run) == 1):
        node = graph.by_name[name]
        first = max(place[other] for other in (*map(ir.producer, node.inputs), *node.control_inputs))
        if any(graph.by_name[other].op == ir.STORE for other in node.control_inputs):
            continue
        if rng.random() < 0.7:
            found.append(Prefetch(name, names[rng.randint(first, place[before] - 1)], before))
    return found


def random_write_backs(rng: random.Random, graph: ir.Graph, names: tuple[str, ...]) -> list[WriteBack]:
    """Any valid ones, likewise."""
    place = {name: at for at, name in enumerate(names)}
    found = []
    for node in graph.nodes:
        if node.op == ir.STORE and rng.random() < 0.7:
            found.append(WriteBack(node.name, rng.choice(["", *names[place[node.name] + 1 :]])))
    return found


class _Step:
    """A step that is being built: nodes, and what the backward pass has to know."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.nodes: list[ir.Node] = []
        self.updates: list[str] = []
        self.layer = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.gradients: dict[str, list[str]] = {}  # value -> its gradient's summands

    def build(self, layers: int, batch: int) -> ir.Graph:
        kinds = (self.product, self.activation, self.skip, self.dropout, self.normalisation, self.alias)
        value = self.add("x", "Placeholder", (), (batch, self.rng.choice(_WIDTHS)))
        values, backward = [value], []
        for layer in range(layers):
            self.layer = layer
            value, step_back = self.rng.choice(kinds)(value, values)
            values.append(value)
            backward.append(step_back)
        loss = self.add("loss", "L2Loss", (value,), ())
        self.gradients[value] = [value]
        for layer, step_back in reversed(list(enumerate(backward))):
            self.layer = layer
            step_back()
        arguments = tuple(node.name for node in self.nodes if node.op == "Placeholder")
        results = (loss, *self.rng.sample(values, self.rng.randint(0, 1)))
        return ir.verify(ir.Graph("random_step", tuple(self.nodes), arguments, results, tuple(self.updates)))

    def add(self, name, op, inputs, *shapes, stateful=False, after=(), attrs=()):
        outputs = tuple(ir.Value("float32", shape) for shape in shapes)
        self.nodes.append(ir.Node(name, op, inputs, after, outputs, stateful=stateful, attrs=attrs))
        self.shapes.update((ir.ref(name, index), shape) for index, shape in enumerate(shapes))
        return name

    def take_gradient(self, value):
        summands = self.gradients.pop(value)
        if len(summands) == 1:
            return summands[0]
        return self.add(f"sum_{self.layer}", "AddN", tuple(summands), self.shapes[value])

    def give_gradient(self, value, summand):
        self.gradients.setdefault(value, []).append(summand)

    def variable(self, name, shape):
        held = (("held_bytes", (4 * math.prod(shape) + 255 & -256,)),)
        self.nodes.append(ir.Node(name, "Placeholder", outputs=(ir.Value("resource"),), attrs=held))
        return self.add(f"read_{name}", "ReadVariableOp", (name,), shape, stateful=True)

    def assign(self, op, variable, value):
        name = f"update_{variable}"
        if self.rng.random() < 0.3:  # as for weight decay, before the update itself
            decayed = self.add(f"decayed_{variable}", "Neg", (f"read_{variable}",), self.shapes[f"read_{variable}"])
            decay = self.add(
                f"decay_{variable}",
                "AssignVariableOp",
                (variable, decayed),
                stateful=True,
                after=(f"read_{variable}",),
            )
            self.updates.append(name)
            self.add(name, op, (variable, value), stateful=True, after=(decay,))
            return
        self.updates.append(self.add(name, op, (variable, value), stateful=True, after=(f"read_{variable}",)))

    def product(self, x, _):
        layer, (rows, columns), width = self.layer, self.shapes[x], self.rng.choice(_WIDTHS)
        shape, has_momentum = (columns, width), self.rng.random() < 0.5
        read = self.variable(f"w_{layer}", shape)
        y = self.add(f"product_{layer}", "MatMul", (x, read), (rows, width))

        def backward():
            grad = self.take_gradient(y)
            step = self.add(f"grad_w_{layer}", "MatMul", (x, grad), shape)
            self.give_gradient(x, self.add(f"grad_x_{layer}", "MatMul", (grad, read), (rows, columns)))
            if has_momentum:
                old = self.variable(f"m_{layer}", shape)
                step = self.add(f"momentum_{layer}", "AddV2", (old, step), shape)
                self.assign("AssignVariableOp", f"m_{layer}", step)
            self.assign("AssignSubVariableOp", f"w_{layer}", step)

        return y, backward

    def activation(self, x, _):
        layer, shape, op = self.layer, self.shapes[x], self.rng.choice(("Relu", "Tanh"))
        y = self.add(f"activation_{layer}", op, (x,), shape)

        def backward():
            inputs = (self.take_gradient(y), y) if op == "Relu" else (y, self.take_gradient(y))
            self.give_gradient(x, self.add(f"grad_activation_{layer}", f"{op}Grad", inputs, shape))

        return y, backward

    def skip(self, x, values):
        other = self.rng.choice([value for value in values if self.shapes[value] == self.shapes[x]])
        y = self.add(f"skip_{self.layer}", "AddV2", (x, other), self.shapes[x])

        def backward():
            grad = self.take_gradient(y)
            self.give_gradient(x, grad)
            self.give_gradient(other, grad)

        return y, backward

    def dropout(self, x, _):
        layer, shape = self.layer, self.shapes[x]
        mask = self.add(f"mask_{layer}", "RandomUniform", (), shape, stateful=True)
        y = self.add(f"dropout_{layer}", "Mul", (x, mask), shape)

        def backward():
            self.give_gradient(x, self.add(f"grad_dropout_{layer}", "Mul", (self.take_gradient(y), mask), shape))

        return y, backward

    def normalisation(self, x, _):
        layer, shape = self.layer, self.shapes[x]
        y = self.add(f"norm_{layer}", "FusedBatchNormV3", (x,), shape, shape[1:], shape[1:])

        def backward():
            inputs = (self.take_gradient(y), x, ir.ref(y, 1), ir.ref(y, 2))
            outputs, attrs = (shape, shape[1:], shape[1:]), (("workspace_bytes", 1000),)
            grad = self.add(f"grad_norm_{layer}", "FusedBatchNormGradV3", inputs, *outputs, attrs=attrs)
            self.give_gradient(x, grad)

        return y, backward

    def alias(self, x, values):
        layer, shape, op = self.layer, self.shapes[x], self.rng.choice(("Identity", "Reshape", "IdentityN"))
        sources = (x, self.rng.choice(values)) if op == "IdentityN" else (x,)
        y = self.add(f"alias_{layer}", op, sources, *(self.shapes[source] for source in sources))

        def backward():
            self.give_gradient(x, self.add(f"grad_alias_{layer}", "Reshape", (self.take_gradient(y),), shape))

        return y, backward

"""A step as XLA sees it: what it fuses into its readers is in memory nowhere.

XLA computes an element-wise value inside the kernels that read it if all of them can do so, and keeps what the value is
made of instead. A plan that is made for the step as TensorFlow runs it keeps, swaps and repeats what is never there.

Known weaknesses: which values XLA fuses is taken from the ops, not from its own cost model, which weighs kernels and
differs between devices and versions; transposes and concatenations are taken to be in memory.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

from graphswap import ir, liveness
from graphswap.plan import Decision, Plan, Recompute, Swap

_VIEWS = frozenset({"ExpandDims", "Identity", "PreventGradient", "Reshape", "Squeeze", "StopGradient"})
"""Of `liveness.ALIASES` those that mean nothing to XLA."""
_COSTLY = frozenset("Erf Erfc Exp Expm1 Log Log1p Pow Sigmoid Tanh".split())
"""Are computed once, even if several kernels read them."""
_ELEMENTWISE = _COSTLY | frozenset(
    "Abs Add AddN AddV2 BiasAdd BroadcastTo Cast Div DivNoNan Equal Fill Greater GreaterEqual IsFinite Less LessEqual "
    "LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg NotEqual OnesLike RealDiv Reciprocal Relu Relu6 "
    "Relu6Grad ReluGrad Rsqrt RsqrtGrad Select SelectV2 SigmoidGrad Sign Sqrt SqrtGrad Square SquaredDifference Sub "
    "TanhGrad Tile ZerosLike".split()
)
_READERS = (
    _ELEMENTWISE | liveness.UPDATES | frozenset("All Any BiasAddGrad LogSoftmax Max Mean Min Prod Softmax Sum".split())
)
"""Ops that compute what they read on the way."""


@functools.lru_cache(maxsize=4)
def fused(graph: ir.Graph) -> ir.Graph:
    """The step without the nodes that XLA fuses into all of their readers, which read what these are made of.

    Nodes that stay keep their names and outputs. Inputs are listed in their old order, each once: what an op's input
    means by its place holds only for products, assignments and others that read nothing fused.

    Args:
        graph: The step.
    """
    gone = _fused_nodes(graph)
    made_of: dict[str, tuple[str, ...]] = {}
    nodes = []
    for node in graph.nodes:
        found = (made_of.get(ir.producer(reference), (reference,)) for reference in node.inputs)
        inputs, attrs = node.inputs, node.attrs
        if not gone.isdisjoint(map(ir.producer, inputs)):
            inputs = tuple(dict.fromkeys(reference for references in found for reference in references))
            if node.op in _ELEMENTWISE:  # element by element the kernel reads all before it writes
                attrs = (*attrs, (liveness.OVERWRITES_ANY, True))
        if node.name in gone:
            made_of[node.name] = inputs
        else:
            nodes.append(dataclasses.replace(node, inputs=inputs, attrs=attrs))
    return graph.replace(nodes=tuple(nodes))


def _fused_nodes(graph: ir.Graph) -> set[str]:
    kept = liveness.waited_for(graph).union(map(ir.producer, graph.outputs))
    gone: set[str] = set()
    for node in reversed(graph.nodes):
        if len(node.outputs) != 1 or node.name in kept or node.stateful or node.control_inputs:
            continue
        readers = [graph.by_name[name] for name in graph.consumers.get(node.name, ())]
        can_fuse = all(reader.op in _READERS or (reader.op in _VIEWS and reader.name in gone) for reader in readers)
        is_cheap = node.op in _VIEWS or (node.op in _ELEMENTWISE and not (node.op in _COSTLY and len(readers) > 1))
        if readers and can_fuse and is_cheap:
            gone.add(node.name)
    return gone


def expanded(plan: Plan, graph: ir.Graph) -> Plan:
    """The plan for the step itself that does what a plan for `fused` of it means.

    Fused nodes run right before their first reader. They are repeated with a reader that is repeated, and before one
    where they were made of what has come back since. Pairs are left out: XLA knows none. So is the bound, which is one
    of the fused step.

    Args:
        plan: For `fused(graph)`.
        graph: The step.
    """
    if plan.is_empty:
        return plan.replace(fingerprint=graph.fingerprint, certificate=None)
    return _Expansion(plan, graph).plan()


class _Expansion:
    """The plan as far as it has come, in the order of the step."""

    def __init__(self, given: Plan, graph: ir.Graph):
        self._given, self._graph = given, graph
        self._stays = fused(graph).by_name
        self._order: list[str] = []
        self._first: dict[str, str] = {}  # node -> the first of it and the fused nodes that are made for it
        self._versions: collections.Counter[str] = collections.Counter()  # node -> how often it has been made anew
        self._made: dict[str, tuple[int, ...]] = {}  # fused node -> the versions that it was made of
        self._recomputes: list[Recompute] = []

    def plan(self) -> Plan:
        repeats: Mapping[str, list[Recompute]] = collections.defaultdict(list)
        back: Mapping[str, list[str]] = collections.defaultdict(list)
        for decision in self._given.recomputes:
            repeats[decision.before].append(decision)
        for decision in self._given.swaps:
            back[decision.in_before].append(ir.producer(decision.value))
        for name in self._given.order or tuple(self._stays):
            self._versions.update(back[name])
            self._add(name, repeats[name])
        swaps: list[Decision] = [self._moved(swap) for swap in self._given.swaps]
        return self._given.replace(
            order=tuple(self._order),
            decisions=(*swaps, *self._recomputes),
            fingerprint=self._graph.fingerprint,
            certificate=None,
        )

    def _add(self, name: str, decisions: Sequence[Recompute]) -> None:
        """Adds a node that stays, behind what is repeated and fused for it."""
        repeated: list[str] = []
        for decision in decisions:
            for again in decision.nodes:
                repeated += [*self._anew(again, is_repeated=True), again]
                self._versions[again] += 1
        repeated += self._anew(name)
        new = [made for made in self._fused_for(name) if made not in self._made]
        for made in new:
            self._note(made)
        self._first[name] = (*new, name)[0]
        self._order += [*new, name]
        if repeated:
            reason = "; ".join(dict.fromkeys(decision.reason for decision in decisions if decision.reason))
            place = {made: number for number, made in enumerate(self._order)}
            nodes = tuple(sorted(set(repeated), key=place.__getitem__))
            self._recomputes.append(Recompute(nodes, self._first[name], reason))

    def _anew(self, name: str, is_repeated: bool = False) -> list[str]:
        """Fused nodes that a node reads, and that are to be repeated for it.

        What they were made of has been made anew; or the node is repeated itself, and would keep them in memory.
        """
        found = []
        for made in self._fused_for(name):
            if made in self._made and (is_repeated or self._made[made] != self._of(made)):
                found.append(made)
                self._versions[made] += 1
                self._note(made)
        return found

    def _fused_for(self, name: str) -> Iterable[str]:
        """The fused nodes that a node is made of, in an order in which they can run."""
        found: dict[str, None] = {}
        pending = [(name, False)]
        while pending:
            reader, is_done = pending.pop()
            if is_done:
                found[reader] = None
                continue
            if reader != name:
                pending.append((reader, True))
            sources = dict.fromkeys(map(ir.producer, self._graph.by_name[reader].inputs))
            pending += [(made, False) for made in reversed(sources) if made not in self._stays and made not in found]
        return found

    def _of(self, made: str) -> tuple[int, ...]:
        return tuple(self._versions[ir.producer(reference)] for reference in self._graph.by_name[made].inputs)

    def _note(self, made: str) -> None:
        self._made[made] = self._of(made)

    def _moved(self, swap: Swap) -> Swap:
        return dataclasses.replace(
            swap, freed_before=self._first[swap.freed_before], in_before=self._first[swap.in_before]
        )

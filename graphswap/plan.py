"""A Plan: what to swap, what to recompute, in which order to run. Data only: JSON, text, and a check.

Positions are named by nodes of the user's graph. Every value has one *current* copy at each position;
a decision replaces the current copy for all consumers from its position on, but the step's results stay
what the user's nodes made:

* `Swap`: SwapOut starts right after `out_after`; `freed_before` waits until the copy is complete, and the
  device bytes are free from there on; SwapIn starts right after `in_after`; `in_before` is the first
  consumer that reads the copy. A later Swap of the same value uses the far copy that is already there.
* `Recompute`: the nodes are repeated, in this order, right before `before`; they read current copies.
* `Prefetch`: a `FETCH` does not run where it stands, but starts right after an earlier node, beside compute; what reads
  its value waits for it.
* `WriteBack`: a `STORE` does not keep others from running; `freed_before` waits until it is complete, and the new
  value's device bytes are free from there on.
* `Place`: a variable lives in a far tier between steps. It is carried out first: the other decisions name nodes of the
  graph that `rewrites.place` makes, and the plan's fingerprint is that graph's.
* `Exchange`: values that the replicas sum together, as one block; carried out first, too. `rewrites.exchange` makes
  these blocks of what TensorFlow would sum at once.
* `Shard`: every worker keeps a part of a variable, and updates that; carried out first by `rewrites.shard`.
* `SideBySide`: `second`, which stands right after `first`, does not wait for it. Both ask for memory before either
  lets go of any.

Between two nodes of the order stand first the SwapOuts, the SwapIns and the FETCHes started by the earlier one, then
the repeated nodes of the later one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from graphswap import bound, ir

TIERS = ("host", "disk")


class PlanError(ValueError):
    """A plan that does not fit its graph, or a plan file that can't be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Swap:
    """Moves a value to the far tier over one gap between its uses.

    Attributes:
        value: Reference to the value.
        out_after: The node after which the copy to the far tier starts: the last one before the gap that uses the
            value, or an earlier one, back to its producer.
        freed_before: The node that waits for the copy to the far tier.
        in_after: The node after which the copy back starts.
        in_before: The first node after the gap that uses the value.
        tier: "host" or "disk".
        is_synchronous: Whether nothing else runs during the copies; where they take the cores that compute, the
            order of all requests for memory is then the same in every run.
        reason: Why, for people.
    """

    value: str
    out_after: str
    freed_before: str
    in_after: str
    in_before: str
    tier: str = "host"
    is_synchronous: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Recompute:
    """Runs nodes again right before a consumer, so that their values need not be kept until then.

    Attributes:
        nodes: The nodes to repeat, in execution order.
        before: The first consumer that reads the repeated values.
        reason: Why, for people.
    """

    nodes: tuple[str, ...]
    before: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Prefetch:
    """Starts a copy of a variable's value to the device before it is needed.

    Attributes:
        node: The `FETCH`.
        after: The node after which the copy starts.
        before: Which of its runs: the node right before which it is repeated, or itself for the first one.
        reason: Why, for people.
    """

    node: str
    after: str
    before: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class WriteBack:
    """Lets a variable's new value leave for its far tier beside compute.

    Attributes:
        node: The `STORE`.
        freed_before: The node that waits for the copy; "" if its bytes stay in use until the step's end, or until one
            that waits for it anyway.
        reason: Why, for people.
    """

    node: str
    freed_before: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class SideBySide:
    """Runs two neighbours at the same time, for devices on which one node alone leaves cores idle.

    Attributes:
        first: A node.
        second: The node right after it in the order; it reads nothing of the first.
        reason: Why, for people.
    """

    first: str
    second: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Keeps a variable in a far tier: it is fetched where it is used, and its new value is stored.

    Attributes:
        variable: Name of the node that stands for it.
        tier: "host" or "disk".
        computes_there: Whether the host computes with it there: it gathers its rows, and computes its new value as far
            as that comes of ops on single elements.
        reason: Why, for people.
    """

    variable: str
    tier: str = "host"
    computes_there: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Sums values over all replicas as one block, beside compute. Blocks start in the order of a plan's decisions.

    Attributes:
        values: References to the values, in the order in which they stand in the block.
        ahead: How many later blocks start before this one is waited for.
        reason: Why, for people.
    """

    values: tuple[str, ...]
    ahead: int = 1
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Divides a variable among the workers.

    Attributes:
        variable: Name of the node that stands for it.
        reason: Why, for people.
    """

    variable: str
    reason: str = ""


Decision = Swap | Recompute | Prefetch | WriteBack | SideBySide | Place | Exchange | Shard


@dataclasses.dataclass(frozen=True, slots=True)
class Declined:
    """A candidate that the strategy did not take, and why."""

    value: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Decisions for one graph.

    Attributes:
        order: Names of all nodes in the order to run them; empty keeps the graph's own.
        decisions: In no particular order.
        declined: Candidates left alone, each with a reason.
        strategy: Name of the strategy that made it.
        memory_budget: Bytes it was made for; None without a budget.
        fingerprint: `Graph.fingerprint` of the graph it was made for; "" fits any.
        certificate: A lower bound on the seconds of every plan like it; None if there is none. It says nothing of what
            the plan does, so plans that differ in it only are equal.
    """

    order: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    declined: tuple[Declined, ...] = ()
    strategy: str = ""
    memory_budget: int | None = None
    fingerprint: str = ""
    certificate: bound.Certificate | None = dataclasses.field(default=None, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether applying the plan changes nothing."""
        return not self.order and not self.decisions

    @property
    def swaps(self) -> tuple[Swap, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Swap))

    @property
    def recomputes(self) -> tuple[Recompute, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Recompute))

    @property
    def prefetches(self) -> tuple[Prefetch, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Prefetch))

    @property
    def write_backs(self) -> tuple[WriteBack, ...]:
        return tuple(d for d in self.decisions if isinstance(d, WriteBack))

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Place))

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Exchange))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(d for d in self.decisions if isinstance(d, Shard))

    @property
    def pairs(self) -> tuple[SideBySide, ...]:
        return tuple(d for d in self.decisions if isinstance(d, SideBySide))

    def one_by_one(self) -> Plan:
        """The plan without its pairs, in the same order."""
        return self.replace(decisions=tuple(d for d in self.decisions if not isinstance(d, SideBySide)))

    def in_turn(self) -> Plan:
        """The plan without its pairs, and with the copies of variables where they stand."""
        beside = SideBySide | Prefetch | WriteBack
        return self.replace(decisions=tuple(d for d in self.decisions if not isinstance(d, beside)))

    def replace(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        fields = {**vars(self)}
        fields["decisions"] = [{"kind": type(d).__name__, **_fields(d)} for d in self.decisions]
        fields["declined"] = [_fields(d) for d in self.declined]
        fields["certificate"] = self.certificate and self.certificate.fields()
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: If the text is no plan.
        """
        known: tuple[Any, ...] = (Swap, Recompute, Prefetch, WriteBack, SideBySide, Place, Exchange, Shard)
        kinds = {kind.__name__: kind for kind in known}
        try:
            fields = json.loads(text)
            decisions = []
            for entry in fields.pop("decisions"):
                kind = kinds[entry.pop("kind")]
                decisions.append(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}))
            certificate = fields.pop("certificate", None)
            return cls(
                order=tuple(fields.pop("order")),
                decisions=tuple(decisions),
                declined=tuple(Declined(**entry) for entry in fields.pop("declined")),
                certificate=certificate and bound.Certificate.from_fields(certificate),
                **fields,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"expected a plan as written by Plan.to_json, received something else: {error!r}."
            raise PlanError(message) from error

    def check(self, graph: ir.Graph) -> Plan:
        """Returns the plan if it fits the graph.

        Raises:
            PlanError: Naming the first decision that does not fit, and why.
        """
        if self.fingerprint and self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"this plan was made for the graph with fingerprint {self.fingerprint}, "
                f"but graph '{graph.name}' has {graph.fingerprint}. Plan again for this graph."
            )
        position = graph.position
        if self.order:
            if len(self.order) != len(graph.nodes) or set(self.order) != set(position):
                odd = sorted(set(self.order) ^ set(position))[:3]
                raise PlanError(f"the plan's order must name every node of '{graph.name}' once; look at {odd}.")
            position = {name: i for i, name in enumerate(self.order)}
        paired: set[str] = set()
        copied: set[tuple[str, str]] = set()  # runs of copies beside compute
        overlapping = {decision.node for decision in (*self.prefetches, *self.write_backs)}
        runs = collections.Counter((name, repeat.before) for repeat in self.recomputes for name in repeat.nodes)
        for decision in self.decisions:
            try:
                if isinstance(decision, Swap):
                    _check_swap(decision, graph, position)
                elif isinstance(decision, Recompute):
                    _check_recompute(decision, graph, position)
                elif isinstance(decision, Prefetch | WriteBack):
                    if isinstance(decision, Prefetch):
                        _check_prefetch(decision, graph, position, runs)
                    else:
                        _check_write_back(decision, graph, position)
                    run = decision.node, decision.before if isinstance(decision, Prefetch) else ""
                    if run in copied:
                        raise _Misfit("another decision is about the same copy.")
                    copied.add(run)
                elif isinstance(decision, Place):
                    _check_place(decision, graph)
                elif isinstance(decision, Exchange):
                    if decision.values not in graph.blocks.values():
                        raise _Misfit("it has no such block, which `rewrites.exchange` would have made.")
                elif isinstance(decision, Shard):
                    if decision.variable not in graph.shards:
                        raise _Misfit("it has the variable whole, which `rewrites.shard` would have divided.")
                else:
                    _check_pair(decision, graph, position)
                    if not paired.isdisjoint((decision.first, decision.second)):
                        raise _Misfit("a node is in two pairs.")
                    if not overlapping.isdisjoint((decision.first, decision.second)):
                        raise _Misfit("one of the two is a copy that runs beside compute anyway.")
                    paired.update((decision.first, decision.second))
            except _Misfit as misfit:
                raise PlanError(f"{decision} does not fit graph '{graph.name}': {misfit}") from None
        return self

    def __str__(self) -> str:
        budget = "none" if self.memory_budget is None else f"{self.memory_budget / 2**20:.1f}MiB"
        lines = [f"plan {self.strategy or '-'}, budget {budget}"]
        for decision in self.decisions:
            if isinstance(decision, Swap):
                lines.append(
                    f"  swap       {decision.value}  out after {decision.out_after}, "
                    f"in before {decision.in_before}, {decision.tier}{_because(decision.reason)}"
                )
            elif isinstance(decision, Recompute):
                lines.append(
                    f"  recompute  {', '.join(decision.nodes)}  before {decision.before}{_because(decision.reason)}"
                )
            elif isinstance(decision, Prefetch):
                run = "" if decision.before == decision.node else f", before {decision.before}"
                lines.append(f"  fetch      {decision.node}  after {decision.after}{run}{_because(decision.reason)}")
            elif isinstance(decision, WriteBack):
                gone = f"  gone before {decision.freed_before}" if decision.freed_before else ""
                lines.append(f"  store      {decision.node}  beside compute{gone}{_because(decision.reason)}")
            elif isinstance(decision, Exchange):
                values = ", ".join(decision.values)
                lines.append(f"  exchange   {values}  {decision.ahead} ahead{_because(decision.reason)}")
            elif isinstance(decision, Place):
                there = ", host computes" if decision.computes_there else ""
                lines.append(f"  place      {decision.variable}  {decision.tier}{there}{_because(decision.reason)}")
            elif isinstance(decision, Shard):
                lines.append(f"  shard      {decision.variable}{_because(decision.reason)}")
            else:
                lines.append(f"  together   {decision.first}, {decision.second}{_because(decision.reason)}")
        lines += [f"  keep       {d.value}  {d.reason}" for d in self.declined]
        return "\n".join(lines)


class _Misfit(Exception):
    """Why a decision does not fit."""


def _check_swap(swap: Swap, graph: ir.Graph, position: Mapping[str, int]) -> None:
    names = (ir.producer(swap.value), swap.out_after, swap.freed_before, swap.in_after, swap.in_before)
    _check_names(names, position)
    if swap.tier not in TIERS:
        raise _Misfit(f"expected a tier out of {TIERS}, received {swap.tier!r}.")
    if ir.split_ref(swap.value)[1] >= len(graph.by_name[ir.producer(swap.value)].outputs):
        raise _Misfit(f"there is no value '{swap.value}'.")
    if graph.by_name[ir.producer(swap.value)].op == ir.EXCHANGE:
        raise _Misfit(f"'{swap.value}' is on its way to the other replicas.")
    if graph.by_name[ir.producer(swap.value)].op == ir.VIEW:
        raise _Misfit(f"'{swap.value}' is in a far tier.")
    if not graph.value(swap.value).nbytes:
        raise _Misfit(f"'{swap.value}' ({graph.value(swap.value)}) holds no bytes that could move.")
    born, out, freed, start, use = (position[name] for name in names)
    if not (born <= out < freed <= use and out <= start < use):
        raise _Misfit("expected producer <= out_after < freed_before, in_after < in_before in execution order.")


def _check_recompute(recompute: Recompute, graph: ir.Graph, position: Mapping[str, int]) -> None:
    _check_names((*recompute.nodes, recompute.before), position)
    for name in recompute.nodes:
        node = graph.by_name[name]
        if node.stateful:
            raise _Misfit(f"'{name}' ({node.op}) is stateful and must not run twice.")
        if node.op in ir.RESIDENT_OPS:
            raise _Misfit(f"'{name}' ({node.op}) is in memory all the time.")
        if position[name] >= position[recompute.before]:
            raise _Misfit(f"'{name}' runs only after '{recompute.before}'.")
        stored = graph.stores.get(node.inputs[0]) if node.op in (ir.FETCH, ir.VIEW) else None
        if stored and position[stored] < position[recompute.before]:
            raise _Misfit(f"'{name}' would bring back what '{stored}' has stored.")
    if list(recompute.nodes) != sorted(set(recompute.nodes), key=position.__getitem__):
        raise _Misfit("expected the nodes in execution order, each once.")


def _check_prefetch(
    prefetch: Prefetch, graph: ir.Graph, position: Mapping[str, int], runs: Mapping[tuple[str, str], int]
) -> None:
    _check_names((prefetch.node, prefetch.after, prefetch.before), position)
    node = graph.by_name[prefetch.node]
    if node.op != ir.FETCH:
        raise _Misfit(f"'{node.name}' ({node.op}) is no {ir.FETCH}.")
    if any(graph.by_name[name].op == ir.STORE for name in node.control_inputs):
        raise _Misfit(f"'{node.name}' waits for a {ir.STORE}.")
    if prefetch.before != node.name and runs.get((node.name, prefetch.before)) != 1:
        raise _Misfit(f"the plan does not repeat '{node.name}' once before '{prefetch.before}'.")
    needed = max((position[name] for name in (*map(ir.producer, node.inputs), *node.control_inputs)), default=-1)
    if not needed <= position[prefetch.after] < position[prefetch.before]:
        raise _Misfit("expected what the copy needs <= after < before in execution order.")


def _check_write_back(write_back: WriteBack, graph: ir.Graph, position: Mapping[str, int]) -> None:
    _check_names((write_back.node, *([write_back.freed_before] if write_back.freed_before else [])), position)
    node = graph.by_name[write_back.node]
    if node.op != ir.STORE:
        raise _Misfit(f"'{node.name}' ({node.op}) is no {ir.STORE}.")
    if write_back.freed_before and position[write_back.freed_before] <= position[node.name]:
        raise _Misfit("expected node < freed_before in execution order.")


def _check_place(place: Place, graph: ir.Graph) -> None:
    if place.tier not in TIERS:
        raise _Misfit(f"expected a tier out of {TIERS}, received {place.tier!r}.")
    _check_names((place.variable,), graph.position)
    if any(nbytes for nbytes in dict(graph.by_name[place.variable].attrs).get("held_bytes", (0,))):  # pyright: ignore
        raise _Misfit(f"'{place.variable}' is on the device in this graph, which `rewrites.place` has not made.")


def _check_pair(pair: SideBySide, graph: ir.Graph, position: Mapping[str, int]) -> None:
    _check_names((pair.first, pair.second), position)
    second = graph.by_name[pair.second]
    if position[pair.second] != position[pair.first] + 1:
        raise _Misfit(f"expected '{pair.second}' right after '{pair.first}' in execution order.")
    if pair.first in (*map(ir.producer, second.inputs), *second.control_inputs):
        raise _Misfit(f"'{pair.second}' needs '{pair.first}'.")
    for node in (graph.by_name[pair.first], second):
        if node.stateful or node.op in ir.RESIDENT_OPS:
            raise _Misfit(f"'{node.name}' ({node.op}) is stateful, or in memory all the time.")


def _check_names(names: Iterable[str], position: Mapping[str, int]) -> None:
    for name in names:
        if name not in position:
            raise _Misfit(f"there is no node '{name}'.")


def _fields(data: Any) -> dict[str, Any]:
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}


def _because(reason: str) -> str:
    return f"  ({reason})" if reason else ""

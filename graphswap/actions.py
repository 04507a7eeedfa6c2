"""What a plan makes of a step: the nodes and copies in the order in which they run, each bound to what it reads.

A *version* is one copy of a value: the first one, one that was repeated, one in the far tier or one that came back.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from graphswap import allocator as allocator_lib
from graphswap import ir, liveness
from graphswap.cost_model import CostModel, Link, Workspace
from graphswap.plan import Plan, Prefetch, Swap

VARIABLE, ARGUMENT, CONSTANT = range(3)  # in the order in which they come to the device


class Output(NamedTuple):
    """Where an output lives: the first of `held`, `alias` and `overwrites` that applies, else in a new buffer.

    Attributes:
        reference: The value; of a repeated node, the first one's.
        nbytes: Device bytes.
        pieces: In how many equal buffers.
        held: The value before the step whose buffer it is; "" for a handle: who holds a handle does not
            keep the variable from being updated in place.
        alias: The input whose buffer it is.
        overwrites: Inputs that it may be written over if nobody else needs them.
    """

    reference: str
    nbytes: int
    pieces: int
    held: str | None
    alias: int | None
    overwrites: Sequence[int]


class Facts(NamedTuple):
    """What the simulation needs of a node, looked up once."""

    name: str
    seconds: float
    workspace: Workspace  # rounded as the allocator does
    outputs: Sequence[Output]
    resides: int | None  # VARIABLE, ARGUMENT or CONSTANT if the outputs are there before the step
    assigns: str  # the variable that gets another value, or ""
    in_place: bool  # whether it keeps its buffer if nobody reads it
    network_seconds: float  # on the network, after its own
    is_awaited: bool  # whether that runs beside compute, until a node reads the first output


class Action(NamedTuple):
    """A node to run on versions of values. A version is a number: one copy of a value."""

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    facts: Facts
    waits: Sequence[int] = ()  # copies in the far tier that must be complete; their sources may then go
    beside: str = ""  # the node that it runs side by side with, if that is the action before


class Copy(NamedTuple):
    """A copy from one tier to the other: makes a version of a version.

    Its kind is "swap_out", "swap_in", "fetch" or "store".
    """

    kind: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    value: str  # or the FETCH or STORE
    nbytes: int
    tier: str
    piece_bytes: int  # beside it on the device while it comes: a piece of it, or the workspace of a FETCH
    is_synchronous: bool  # whether nothing else runs meanwhile

    @property
    def leaves(self) -> bool:
        """Whether the value leaves the device."""
        return self.kind in ("swap_out", "store")

    @property
    def fetched(self) -> str:
        """The FETCH that it runs, or ""."""
        return self.value if self.kind == "fetch" else ""

    @property
    def lane(self) -> tuple[str, str]:
        """Copies of one lane run one after the other."""
        return self.tier, "out" if self.leaves else "in"

    def duration(self, link: Link) -> float:
        """Seconds on the link."""
        return link.out_seconds(self.nbytes) if self.leaves else link.in_seconds(self.nbytes)


def _piece_bytes(value: ir.Value) -> int:
    pieces = ir.swap_pieces(value)
    return value.nbytes // pieces if pieces > 1 else 0


class Plain(NamedTuple):
    """The step without a plan.

    Attributes:
        actions: By node.
        version: Of each value the first one.
        results: Versions that outlive the step.
        must_run: Nodes that run even if nobody reads what they make.
    """

    actions: Mapping[str, Action | Copy]
    version: Mapping[str, int]
    results: Sequence[int]
    must_run: frozenset[str]


@functools.lru_cache(maxsize=8)
def plain(graph: ir.Graph, cost_model: CostModel) -> Plain:
    """Looks up all that the simulation needs of a graph."""
    root_of, origin = liveness.roots(graph), ir.origin(graph)
    version = {reference: number for number, reference in enumerate(origin)}
    overlapping = {node.name for node in graph.nodes if ir.OVERLAPS in dict(node.attrs)}
    stores = [node.name for node in graph.nodes if node.op == ir.STORE and node.name in overlapping]
    version.update((name, number) for number, name in enumerate(stores, start=len(version)))  # what arrives out there
    departing = {
        node.name for node in graph.nodes if node.op == ir.SWAP_OUT and not dict(node.attrs).get("is_synchronous")
    }.union(stores)
    actions: dict[str, Action | Copy] = {}
    for node in graph.nodes:
        inputs = tuple(version[reference] for reference in node.inputs)
        outputs = tuple(version[reference] for reference in node.refs())
        if node.op in (ir.SWAP_OUT, ir.SWAP_IN):
            kind = "swap_out" if node.op == ir.SWAP_OUT else "swap_in"
            attrs: Any = dict(node.attrs)
            moved = graph.value(node.inputs[0]) if kind == "swap_out" else node.outputs[0]
            value, nbytes, tier = origin[node.name], attrs["nbytes"], attrs["tier"]
            synchronous = attrs.get("is_synchronous", False)
            actions[node.name] = Copy(kind, inputs, outputs, value, nbytes, tier, _piece_bytes(moved), synchronous)
        elif node.name in overlapping:
            run = Action("run", inputs, outputs or (version[node.name],), _facts(graph, node, cost_model, root_of))
            actions[node.name] = _copied_beside(graph, node, run)
        else:
            kind = "recompute" if node.like else "run"
            waits = [version[name] for name in node.control_inputs if name in departing]
            beside: Any = dict(node.attrs).get("beside", "")
            actions[node.name] = Action(kind, inputs, outputs, _facts(graph, node, cost_model, root_of), waits, beside)
    results = [version[reference] for reference in graph.outputs]
    return Plain(actions, version, results, frozenset(liveness.waited_for(graph)))


def _facts(graph: ir.Graph, node: ir.Node, cost_model: CostModel, root_of: Mapping[str, str]) -> Facts:
    resides = None
    if node.op in ir.RESIDENT_OPS:
        resides = VARIABLE if node.outputs[0].dtype == "resource" else CONSTANT if node.op == "Const" else ARGUMENT
    outputs = []
    sizes, pieces = liveness.output_bytes(node), liveness.output_pieces(node)
    for index, (value, nbytes, count) in enumerate(zip(node.outputs, sizes, pieces, strict=True)):
        reference = ir.ref(node.like or node.name, index)
        held = None
        if resides is not None:
            held = "" if value.dtype == "resource" else reference
        elif node.op == "ReadVariableOp":
            held = root_of[node.inputs[0]]
        overwrites = liveness.overwritten_by(graph, node, index)
        outputs.append(Output(reference, nbytes, count, held, liveness.alias_of(node, index), overwrites))
    in_place = node.op in liveness.UPDATES
    early, late = cost_model.workspace(graph, node)
    return Facts(
        name=node.like or node.name,
        seconds=cost_model.seconds(graph, node),
        workspace=Workspace(tuple(map(allocator_lib.rounded, early)), tuple(map(allocator_lib.rounded, late))),
        outputs=outputs,
        resides=resides,
        assigns=root_of[node.inputs[0]] if in_place or node.op in liveness.ASSIGNS else "",
        in_place=in_place,
        network_seconds=cost_model.network_seconds(graph, node),
        is_awaited=node.op == ir.EXCHANGE,
    )


def _copied_beside(graph: ir.Graph, node: ir.Node, run: Action) -> Copy:
    """The run of a FETCH or STORE as a copy beside compute."""
    facts, tier = run.facts, str(dict(node.attrs)["tier"])
    if node.op == ir.STORE:
        nbytes = graph.value(node.inputs[0]).nbytes
        return Copy("store", run.inputs[:1], run.outputs, facts.name, nbytes, tier, 0, False)
    nbytes = node.outputs[0].nbytes
    return Copy("fetch", run.inputs[:1], run.outputs, facts.name, nbytes, tier, facts.workspace.nbytes, False)


@dataclasses.dataclass(slots=True)
class _Transfer:
    """A Swap that is being carried out."""

    swap: Swap
    value: int  # first version
    out: int | None = None  # version in the far tier; None if it was there before
    back: int = -1  # version that came back


Entry = tuple[str, Action | Copy]
"""What runs, and the user's node that it is or that it is inserted next to: a copy after it, a repeat before."""


def expand(graph: ir.Graph, plan: Plan, plain: Plain, names: Iterable[str] | None = None) -> tuple[list[Entry], int]:
    """All that runs, in order, every input bound to the version it reads; and the number of versions.

    Args:
        graph: The user's graph.
        plan: What to do.
        plain: Of the graph.
        names: The nodes of interest, in their order: all that read or make what the plan touches, those next to
            which it inserts something, and the one after each repeated node. All nodes by default.
    """
    outs, fences, ins, switches = (collections.defaultdict[str, list[_Transfer]](list) for _ in range(4))
    repeats = collections.defaultdict[str, list[str]](list)
    for swap in plan.swaps:
        transfer = _Transfer(swap, plain.version[swap.value])
        outs[swap.out_after].append(transfer)
        fences[swap.freed_before].append(transfer)
        ins[swap.in_after].append(transfer)
        switches[swap.in_before].append(transfer)
    for recompute in plan.recomputes:
        repeats[recompute.before].extend(recompute.nodes)
    written_back = {write_back.node for write_back in plan.write_backs}
    gone = collections.defaultdict[str, list[str]](list)
    for write_back in plan.write_backs:
        for name in {write_back.freed_before, *graph.waiting.get(write_back.node, ())}:
            gone[name].append(write_back.node)
    ahead = {(prefetch.node, prefetch.before) for prefetch in plan.prefetches}
    fetches = collections.defaultdict[str, list[Prefetch]](list)
    for prefetch in plan.prefetches:
        fetches[prefetch.after].append(prefetch)

    first_of = {pair.second: pair.first for pair in plan.pairs}
    entries: list[Entry] = []
    current: dict[int, int] = {}  # first version -> the one that is read now, where that is another one
    handles: dict[int, int] = {}  # first version -> the one in the far tier
    versions = len(plain.version)

    def bound(name: str) -> Any:
        action = plain.actions[name]
        if current.keys().isdisjoint(action.inputs):
            return action
        kind, inputs, *others = action
        return action._make((kind, [current.get(version, version) for version in inputs], *others))

    def copy(name: str, kind: str, source: int, swap: Swap) -> int:
        nonlocal versions
        value = graph.value(swap.value)
        piece_bytes = _piece_bytes(value)
        moved = (swap.value, value.nbytes, swap.tier, piece_bytes, swap.is_synchronous)
        entries.append((name, Copy(kind, (source,), (versions,), *moved)))
        versions += 1
        return versions - 1

    arrived: dict[tuple[str, str], int] = {}  # of a FETCH that is repeated: its version for that run
    first_runs = {node for node, before in ahead if node == before}
    leaving: dict[str, int] = {}  # STORE -> the version that it makes in the far tier
    handed_on: list[int] = []  # what FETCHes that have started before, and STOREs, would wait for where they stand
    touched = {*switches, *repeats, *fences, *first_of, *outs, *ins, *fetches, *first_runs, *written_back, *gone}
    is_plain = touched.isdisjoint
    for name in names or plan.order or graph.position:
        if is_plain((name,)) and not handed_on:
            entries.append((name, bound(name)))
            continue
        for transfer in switches.get(name, ()):
            current[transfer.value] = transfer.back
        for repeated in repeats.get(name, ()):
            if (repeated, name) in ahead:
                current[plain.version[repeated]] = arrived[repeated, name]
                continue
            action = bound(repeated)
            if handed_on:
                action, handed_on = action._replace(waits=handed_on), []
            outputs = range(versions, versions + len(action.outputs))
            versions += len(outputs)
            current.update(zip(action.outputs, outputs, strict=True))
            entries.append((name, action._replace(kind="recompute", outputs=outputs)))
        fenced = [transfer for transfer in fences.get(name, ()) if not transfer.swap.is_synchronous]
        waits = handed_on + [transfer.out for transfer in fenced if transfer.out is not None]
        waits += [leaving[store] for store in gone.get(name, ())]
        if name in first_runs:
            handed_on = waits
        elif name in written_back:
            handed_on = waits
            leaving[name] = versions
            entries.append(
                (name, _copied_beside(graph, graph.by_name[name], bound(name)._replace(outputs=(versions,))))
            )
            versions += 1
        else:
            action = bound(name)
            if waits or name in first_of:
                action = action._replace(waits=waits or action.waits, beside=first_of.get(name, action.beside))
            entries.append((name, action))
            handed_on = []
        for transfer in outs.get(name, ()):
            value = transfer.value
            if value not in handles:
                transfer.out = handles[value] = copy(name, "swap_out", current.get(value, value), transfer.swap)
        for transfer in ins.get(name, ()):
            transfer.back = copy(name, "swap_in", handles[transfer.value], transfer.swap)
        for prefetch in fetches.get(name, ()):
            run: Any = plain.actions[prefetch.node]
            if prefetch.before != prefetch.node:
                run = run._replace(outputs=(versions,))
                arrived[prefetch.node, prefetch.before] = versions
                versions += 1
            entries.append((name, _copied_beside(graph, graph.by_name[prefetch.node], run)))
    return _without_unread(plan, plain, entries), versions


def _without_unread(plan: Plan, plain: Plain, entries: list[Entry]) -> list[Entry]:
    """The entries less the nodes that `rewrites.prune` takes out."""
    repeated = {name for decision in plan.recomputes for name in decision.nodes} - plain.must_run
    if not repeated:
        return entries
    readers = collections.Counter(itertools.chain(plain.results, *(action.inputs for _, action in entries)))
    kept: list[Entry] = []
    for name, action in reversed(entries):
        runs = action.facts.name if isinstance(action, Action) else action.fetched
        if runs in repeated and not any(map(readers.get, action.outputs)):
            readers.subtract(action.inputs)
            if isinstance(action, Action):
                _hand_on_waits(action, kept)
        else:
            kept.append((name, action))
    return kept[::-1]


def _hand_on_waits(action: Action, later: list[Entry]) -> None:
    """What the action would have waited for, the next one (at the end of `later`) waits for."""
    for place in reversed(range(len(later))):
        name, heir = later[place]
        if isinstance(heir, Action):
            later[place] = name, heir._replace(waits=[*action.waits, *heir.waits])
            return


def are_beside(first: Action | Copy, second: Action | Copy | None) -> bool:
    """Whether the two run side by side."""
    return (
        isinstance(first, Action)
        and isinstance(second, Action)
        and (first.kind, first.facts.name) == ("run", second.beside)
    )


def turn_pairs(entries: list[Entry], second_first: Container[str]) -> None:
    """Turns round the pairs whose second node is in `second_first`."""
    for place in range(len(entries) - 1):
        (name, first), (other, second) = entries[place : place + 2]
        if not (isinstance(first, Action) and isinstance(second, Action) and are_beside(first, second)):
            continue
        if second.facts.name in second_first:
            turned = first._replace(beside=second.facts.name)
            entries[place : place + 2] = (other, second._replace(beside="")), (name, turned)

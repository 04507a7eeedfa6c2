"""Which gradients the replicas sum together: blocks large enough for the network, small enough for the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from graphswap import ir, liveness, rewrites, strategies
from graphswap.collectives import Packed, packed
from graphswap.cost_model import CostModel
from graphswap.plan import Exchange, Plan, PlanError
from graphswap.strategies import budgets, gaps
from graphswap.strategies.base import InfeasibleBudgetError

_MOST_BLOCKS = 128
_SEGMENTS = (16, 8)
"""For greedy plans: blocks that fit by neither are taken not to fit."""
_NEGLIGIBLE = 0.005
"""Of a step: for less, no further collective is started."""
_TRIED, _FRUGAL = 12, 3
"""How many ways to exchange are planned at most, and how many of these are those that take the least memory."""
_KNOWN = 0.95
"""Of a budget: the rest is for workspace and lost chunks, which are not known before the step is measured."""


class _Way(NamedTuple):
    """A way to exchange, and about how long a step takes with it."""

    seconds: float
    exchanges: tuple[Exchange, ...]


def choose(graph: ir.Graph, cost_model: CostModel, memory_budget: int | None) -> tuple[Exchange, ...]:
    """Chooses the blocks in which the replicas sum their gradients.

    A gradient joins the block of the one that is there before it until the block has enough bytes. Blocks of half the
    sum, of a quarter ... are tried, and how many of them start before the first of them is waited for. A pipeline of
    compute and network says about how long a step takes with each of them. The fastest are tried in that order, the
    largest blocks first where others are hardly faster, then those that take the least memory; the first is taken with
    which a greedy plan keeps 95 % of the budget.

    Known weaknesses: blocks are of about equal size; costs are those of the cost model for the step as it was; what the
    plan adds to compute by itself is not foreseen.

    Args:
        graph: The step as TensorFlow has traced it.
        cost_model: Its costs.
        memory_budget: Bytes; 0 for as few as possible; None for any number.

    Returns:
        The decisions, in the order in which the blocks start; none if the step has no such sums, or sums that need each
        other. If none of those that are tried does so, the ones with the lowest memory bound.
    """
    sums = packed(graph)
    if not sums:
        return ()
    try:
        ways = sorted(_ways(graph, cost_model, sums), key=lambda way: way.seconds)
    except PlanError:  # a gradient needs what another sum leads to
        return ()
    if memory_budget is None:
        return _largest(ways)
    least: tuple[int, tuple[Exchange, ...]] | None = None
    frugal = sorted(ways, key=lambda way: _in_flight(graph, way.exchanges))
    for way in _tried(ways, frugal) if memory_budget else frugal[:2]:
        exchanged = rewrites.exchange(graph, Plan(decisions=way.exchanges))
        bound_bytes = budgets.least_peak(gaps.problem(exchanged, cost_model)).nbytes
        if least is None or bound_bytes < least[0]:
            least = bound_bytes, way.exchanges
        known = int(_KNOWN * memory_budget)
        if memory_budget and bound_bytes <= known and _fits(exchanged, cost_model, known):
            return way.exchanges
    assert least is not None
    return least[1]


def transferred(exchanges: Sequence[Exchange], old: ir.Graph, new: ir.Graph) -> tuple[Exchange, ...] | None:
    """The same blocks of another trace of a step, whose nodes may have other names; None if its sums are others.

    Args:
        exchanges: Of the old one.
        old: A trace, before its sums were exchanged.
        new: Another one.
    """
    ours, theirs = packed(old), packed(new)
    shapes = [
        [[graph.value(value) for value in one.values] for one in sums] for graph, sums in ((old, ours), (new, theirs))
    ]
    if shapes[0] != shapes[1]:
        return None
    pairs = zip(ours, theirs, strict=True)
    name = {value: other for one, two in pairs for value, other in zip(one.values, two.values, strict=True)}
    return tuple(Exchange(tuple(name[value] for value in one.values), one.ahead, one.reason) for one in exchanges)


def _largest(ways: Sequence[_Way]) -> tuple[Exchange, ...]:
    """Of the ways, sorted by seconds, that are as good as the first the one of the fewest blocks."""
    good = [way for way in ways if way.seconds <= ways[0].seconds * (1.0 + _NEGLIGIBLE)]
    return min(good, key=lambda way: len(way.exchanges)).exchanges


def _tried(ways: Sequence[_Way], frugal: Sequence[_Way]) -> list[_Way]:
    """The fastest ways, and after them those that take the least memory."""
    good = [way for way in ways if way.seconds <= ways[0].seconds * (1.0 + _NEGLIGIBLE)]
    fast = sorted(good, key=lambda way: len(way.exchanges)) + list(ways[len(good) :])
    return list(dict.fromkeys((*fast[: _TRIED - _FRUGAL], *frugal[:_FRUGAL])))


def _fits(graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> bool:
    try:
        strategies.Greedy(planning_seconds=0.0, segments=_SEGMENTS).plan(graph, cost_model, memory_budget)
    except InfeasibleBudgetError:
        return False
    return True


def _in_flight(graph: ir.Graph, exchanges: Sequence[Exchange]) -> int:
    """Bytes of the most blocks that may be on their way at the same time."""
    sizes = [sum(graph.value(value).nbytes for value in one.values) for one in exchanges]
    return max(sum(sizes[number : number + one.ahead + 1]) for number, one in enumerate(exchanges))


def _ways(graph: ir.Graph, cost_model: CostModel, sums: Sequence[Packed]) -> Iterator[_Way]:
    """Blocks of several sizes, and for each of them several numbers of blocks that start before one is waited for."""
    ready, seconds = _ready(graph, cost_model, sums)
    queues = [sorted(one.values, key=ready.__getitem__) for one in sums]
    queues.sort(key=lambda values: ready[values[0]])
    total = sum(graph.value(value).nbytes for values in queues for value in values)
    seen: set[tuple[tuple[str, ...], ...]] = set()
    count = 1
    while count <= _MOST_BLOCKS:
        found = [block for values in queues for block in _cut(graph, values, total / count)]
        found.sort(key=lambda block: ready[block[-1]])
        count *= 2
        if tuple(found) in seen:
            continue
        seen.add(tuple(found))
        launches = [ready[block[-1]] for block in found]
        lasting = [_seconds(graph, cost_model, sums, block) for block in found]
        for most in (len(found), 2, 1, 0):
            ahead = _ahead(launches, lasting, most)
            exchanges = tuple(Exchange(block, each) for block, each in zip(found, ahead, strict=True))
            yield _Way(_pipelined(launches, lasting, ahead, seconds), exchanges)


def _cut(graph: ir.Graph, values: Sequence[str], nbytes: float) -> Iterator[tuple[str, ...]]:
    """Consecutive values in blocks of at least so many bytes, but for the last one."""
    block: list[str] = []
    held = 0
    for value in values:
        block.append(value)
        held += graph.value(value).nbytes
        if held >= nbytes:
            yield tuple(block)
            block, held = [], 0
    if block:
        yield tuple(block)


def _ready(graph: ir.Graph, cost_model: CostModel, sums: Sequence[Packed]) -> tuple[dict[str, float], float]:
    """When each value is there in the strategies' order, and how long all nodes compute."""
    root_of = liveness.roots(graph)
    values = [value for one in sums for value in one.values]
    values.sort(key=lambda value: graph.position[ir.producer(root_of[value])])
    single = tuple(Exchange((value,), len(values)) for value in values)
    problem = gaps.problem(rewrites.exchange(graph, Plan(decisions=single)), cost_model)
    position, clock = problem.graph.position, problem.clock
    ready = {values[0]: float(clock[position[name]]) for name, values in problem.graph.blocks.items()}
    return ready, float(clock[-1])


def _seconds(graph: ir.Graph, cost_model: CostModel, sums: Sequence[Packed], block: Sequence[str]) -> float:
    """Seconds that a block is on the network."""
    (one,) = (one for one in sums if block[0] in one.values)
    node = graph.by_name[one.name]
    share = sum(graph.value(value).nbytes for value in block) / node.outputs[0].nbytes
    whole, empty = cost_model.network_seconds(graph, node), cost_model.network_latency_seconds(node)
    return empty + share * (whole - empty)


def _ahead(launches: Sequence[float], lasting: Sequence[float], most: int) -> list[int]:
    """How many later blocks have started once each is done, the one that starts then among them; at most `most`."""
    found, end = [], 0.0
    for number, (launch, seconds) in enumerate(zip(launches, lasting, strict=True)):
        end = max(end, launch) + seconds
        later = sum(other < end for other in launches[number + 1 :])
        found.append(min(later + 1, most))
    return found


def _pipelined(launches: Sequence[float], lasting: Sequence[float], ahead: Sequence[int], seconds: float) -> float:
    """How long a step takes that computes for so many seconds, and waits for blocks as told.

    Args:
        launches: When each block would start if nothing were waited for.
        lasting: Seconds of each on the network.
        ahead: Of each, how many later ones start before it is waited for.
        seconds: Of all nodes.
    """
    ends: list[float] = []
    delay = network = 0.0
    last = len(launches) - 1
    for number, launch in enumerate(launches):
        network = max(network, launch + delay) + lasting[number]
        ends.append(network)
        for other in range(number + 1):
            if min(other + ahead[other], last) == number:
                delay = max(delay, ends[other] - launch)
    return seconds + delay

"""Model data in chunks, activations by a fixed rule (PatrickStar, Fang et al., arXiv 2108.05818), a baseline.

Weights and optimizer state are packed, each in the order in which they were made, into chunks of one size, which is
searched for the least waste; chunks of optimizer state leave the device first. Within a step, what was fetched stays
until there is no room, and then goes what is needed again the latest. Activations are left alone, and where they
have no room they are checkpointed as in `chen`, whatever else is there: PatrickStar is run on top of that.

Known weaknesses: the variables of a chunk are fetched one by one here, which is kinder than all at once. Updates of
what is away are computed there where the device's cores are the host's, else on the device; PatrickStar has the host do
a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from graphswap import ir
from graphswap.cost_model import CostModel
from graphswap.plan import Plan
from graphswap.strategies.fetching import plan_fetched
from graphswap.variables import trips, values, worth_moving

_SIZES = 16
"""Chunk sizes that are tried, from that of the largest variable to four times as much."""


@dataclasses.dataclass(frozen=True)
class PatrickStar:
    """See the module's text."""

    def groups(self, graph: ir.Graph, movable: Collection[str]) -> Sequence[Sequence[str]]:
        """Implements `Placing.groups`: chunks."""
        position = {name: index for index, name in enumerate(graph.inputs)}
        names = sorted(worth_moving(graph, movable), key=lambda name: position.get(name, 0))
        if not names:
            return []
        cost, known = trips(graph), values(graph)
        size = _chunk_bytes([known[name].nbytes for name in names])
        state, weights = ([name for name in names if (cost[name] > 1) == is_weight] for is_weight in (False, True))
        return [*_packed(state, known, size), *_packed(weights, known, size)]

    def plan(self, graph: ir.Graph, cost_model: CostModel, memory_budget: int) -> Plan:
        """Implements `Strategy.plan`."""
        return plan_fetched(graph, cost_model, memory_budget, "patrickstar")


def _chunk_bytes(sizes: Sequence[int]) -> int:
    """The size of chunks of which the least is wasted when variables of these sizes are packed in this order."""
    largest = max(sizes)
    candidates = [largest + largest * 3 * step // _SIZES for step in range(_SIZES + 1)]

    def used(size: int) -> int:
        chunks, room = 0, 0
        for nbytes in sizes:
            if nbytes > room:
                chunks, room = chunks + 1, size
            room -= nbytes
        return chunks * size

    return min(candidates, key=used)


def _packed(names: Sequence[str], known: dict[str, ir.Value], size: int) -> list[list[str]]:
    chunks: list[list[str]] = []
    room = 0
    for name in names:
        if known[name].nbytes > room:
            chunks.append([])
            room = size
        chunks[-1].append(name)
        room -= known[name].nbytes
    return chunks

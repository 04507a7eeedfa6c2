"""Budgets that are worked out instead of given: the smallest that plans reach, the smallest that costs no time; bounds of both.

The free budget is found by halving the range between a certified bound and what the planned order needs as it is. The
bound is the program of `relaxation` with the budget as a column: the least budget at no extra time.

Known weaknesses: halving takes it that more budget never means a slower plan; the strategy is asked a few times only.
"""

from __future__ import annotations

import functools

from graphswap import footprint, ir
from graphswap.strategies import gaps


@functools.lru_cache(maxsize=4)
def least_peak(problem: gaps.Gaps) -> footprint.LeastPeak:
    """The memory bound: no plan that evicts over the problem's gaps has a lower peak."""
    evictable: dict[str, list[tuple[int, int]]] = {}
    for gap in problem.gaps:
        evictable.setdefault(problem.storages[gap.storage].root, []).append((gap.start, gap.end))
    return footprint.least_peak(problem.graph, problem.cost_model, _repeatable(problem), evictable)


def _repeatable(problem: gaps.Gaps) -> set[str]:
    """Nodes that recomputing a gap's storage may run again: its makers, and those of what they read."""
    pending = {storage for gap in problem.gaps for storage in (gap.storage,)}
    seen: set[int] = set()
    names: set[str] = set()
    while pending:
        storage = pending.pop()
        seen.add(storage)
        for value in problem.storages[storage].values:
            node = problem.graph.by_name[ir.producer(value)]
            if not problem.can_repeat(node):
                continue
            names.add(node.name)
            roots = {problem.root_of[reference] for reference in node.inputs}
            needed = {problem.storage_of[root] for root in roots if not problem.stays(root)}
            pending |= needed - seen
    return names

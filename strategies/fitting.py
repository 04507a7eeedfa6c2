"""From evictions that fit by the sum of their buffers to a plan that fits the device's allocator."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from graphswap.incremental import Outline
from graphswap.plan import Decision, Plan
from graphswap.simulator import NoRoom
from graphswap.strategies import base, budgets, gaps, timing

BOTH = ("swap", "recompute")
_TIGHTENING = 0.98
_TARGETS = 16
_REPAIRS = 40
_FEW_REPAIRS = 3
_FACTORS = (1.0, 2.0, 1.4, 0.7, 0.5, 0.35, 0.25)
"""Of the root of the number of storages: how many segments are tried."""


@dataclasses.dataclass(frozen=True)
class Evictions:
    """A state of the search.

    Attributes:
        evicted: Gap to the way it is evicted, as in `gaps.Gaps.decide`.
        anchors: Storages that recomputing may rely on.
        since: Gap to the position after which it is evicted, where that is not the gap's start.
        reuse: As in `gaps.Gaps.decide`.
        decisions: The same as decisions.
        outline: By the sum of buffers.
    """

    evicted: Mapping[int, str]
    anchors: Collection[int]
    since: Mapping[int, int]
    reuse: int
    decisions: tuple[Decision, ...]
    outline: Outline


def evictions(
    problem: gaps.Gaps,
    evicted: Mapping[int, str],
    anchors: Collection[int] = (),
    since: Mapping[int, int] | None = None,
    reuse: int = gaps.REUSE,
) -> Evictions:
    """Works out decisions and outline of a set of evictions; over a closed link nothing is swapped.

    Raises:
        gaps.CantRecompute: If a value can't be recomputed.
    """
    if problem.cost_model.link(problem.cost_model.far_tier).is_closed:
        evicted = {gap: way for gap, way in evicted.items() if way not in gaps.SWAPS}
    decisions = problem.decide(evicted, anchors, reuse, since)
    return Evictions(dict(evicted), anchors, since or {}, reuse, decisions, problem.outline(decisions))


def at_worst_swapped(
    problem: gaps.Gaps,
    evicted: Mapping[int, str],
    anchors: Collection[int] = (),
    since: Mapping[int, int] | None = None,
) -> Evictions:
    """As `evictions`; but if something can't be recomputed, as with what else is evicted, all is swapped."""
    try:
        return evictions(problem, evicted, anchors, since)
    except gaps.CantRecompute:
        return evictions(problem, dict.fromkeys(evicted, "swap"), anchors, since)


def checkpoint_segments(problem: gaps.Gaps) -> tuple[int, ...]:
    """Numbers of segments for `checkpointed`, that of Chen et al. first: the root of the number of storages."""
    root = math.sqrt(len(problem.long_gap))
    return tuple(dict.fromkeys(max(2, round(root * factor)) for factor in _FACTORS))


def checkpointed(problem: gaps.Gaps, segments: int) -> Evictions:
    """All that waits for the backward pass is recomputed but what lies at the borders of segments.

    The last segment is kept: the backward pass begins there, and would make it twice in a row.
    """
    checkpoints = problem.checkpoints(segments)
    last = max((problem.storages[storage].born for storage in checkpoints), default=len(problem.order))
    evicted = {
        gap: "recompute"
        for storage, gap in problem.saved.items()
        if storage not in checkpoints
        and problem.storages[storage].born < last
        and math.isfinite(problem.recompute_seconds(gap, {}, checkpoints))
    }
    return evictions(problem, evicted, checkpoints)


Attempt = Callable[[float], Evictions]
"""From a target in bytes to evictions, whose peak may still lie above the target."""


def fit(
    problem: gaps.Gaps,
    attempts: Sequence[Attempt],
    memory_budget: int,
    strategy: str,
    actions: Collection[str] = BOTH,
    planning_seconds: float = math.inf,
    gives_up: bool = False,
) -> Plan:
    """A plan of the `fastest` of the attempts. Arguments and errors are its own, and a name for the plan's record."""
    state = fastest(problem, attempts, memory_budget, actions, planning_seconds, gives_up)
    return problem.plan(state.decisions, strategy, memory_budget)


def fastest(
    problem: gaps.Gaps,
    attempts: Sequence[Attempt],
    memory_budget: int,
    actions: Collection[str] = BOTH,
    planning_seconds: float = math.inf,
    gives_up: bool = False,
) -> Evictions:
    """The fastest of the attempts that the allocator model accepts at the budget.

    The allocator loses bytes to slack and holes. Where a request finds no chunk though the sum fits, the
    cheapest contiguous window is cleared (the idea of Coop, Zhang et al., NeurIPS 2023); if that is not
    possible, the attempt is repeated with a smaller target.

    Args:
        problem: The gaps.
        attempts: Ways to evict, the most promising first.
        memory_budget: Bytes.
        actions: What clearing a window may use.
        planning_seconds: No further attempt is started after this time once a plan is found.
        gives_up: Whether none is started after this time even if no plan is found.

    Raises:
        InfeasibleBudgetError: If none fits.
    """
    deadline = time.monotonic() + planning_seconds
    best: Evictions | None = None
    lowest = evictions(problem, {}).outline
    for attempt in attempts:
        target = float(memory_budget)
        tried: Mapping[int, str] | None = None
        for _ in range(_TARGETS):
            if (best is not None or gives_up) and time.monotonic() > deadline:
                break
            try:
                state = attempt(target)
            except gaps.CantRecompute:
                break
            lowest = min(lowest, state.outline, key=lambda outline: outline.peak_bytes)
            limit = math.inf if best is None else best.outline.seconds
            if state.outline.peak_bytes > target or state.evicted == tried:
                break
            tried = state.evicted
            paced = _timed(problem, state, target)
            if paced.outline.seconds >= limit:
                break
            found = _place(problem, paced, memory_budget, limit, actions, target)
            if found is None and paced is not state:
                found = _place(problem, state, memory_budget, limit, actions, None)
            if found is not None:
                best = found
                break
            target *= _TIGHTENING
    if best is None:
        node, bound_bytes = problem.order[int(lowest.live.argmax())], budgets.least_peak(problem).nbytes
        raise base.InfeasibleBudgetError(memory_budget, lowest.peak_bytes, node, bound_bytes)
    return best


def placed(problem: gaps.Gaps, state: Evictions, memory_budget: int, target: float, limit: float) -> Evictions | None:
    """The state with its copies in time, as the device's allocator takes it; None if it does not.

    Args:
        problem: The gaps.
        state: By the sum of its buffers.
        memory_budget: Bytes for the allocator.
        target: Bytes that copies in flight may fill.
        limit: Seconds that it must not take.
    """
    paced = _timed(problem, state, target)
    if problem.cost_model.device.memory_bytes is None:  # the sum of the buffers is all that counts
        return paced if paced.outline.peak_bytes <= memory_budget and paced.outline.seconds < limit else None
    return _place(problem, paced, memory_budget, limit, BOTH, target, _FEW_REPAIRS)


def _timed(problem: gaps.Gaps, state: Evictions, target: float | None) -> Evictions:
    """The same evictions, their copies beside compute where the link allows it."""
    if target is None or not problem.copies_beside:
        return state
    decisions, outline = timing.timed(problem, state.decisions, target)
    return dataclasses.replace(state, decisions=decisions, outline=outline)


def _place(
    problem: gaps.Gaps,
    state: Evictions,
    memory_budget: int,
    limit_seconds: float,
    actions: Collection[str],
    target: float | None,
    repairs: int = _REPAIRS,
) -> Evictions | None:
    """Clears windows until the allocator takes the step; None if it won't or if it gets too slow."""
    for _ in range(repairs):
        if state.outline.seconds >= limit_seconds:
            return None
        try:
            fits = problem.place(state.decisions, memory_budget).allocated_peak_bytes <= memory_budget
            return state if fits else None
        except NoRoom as error:
            window = _window(problem, state, error, actions)
        if not window:
            return None
        try:
            wider = evictions(problem, {**state.evicted, **window}, state.anchors, state.since, state.reuse)
            state = _timed(problem, wider, target)
        except gaps.CantRecompute:
            return None
    return None


def _window(problem: gaps.Gaps, state: Evictions, error: NoRoom, actions: Collection[str]) -> dict[int, str]:
    """The cheapest run of neighbouring chunks that is large enough: which gaps to evict to clear it."""
    prices: dict[str | None, tuple[float, int, str]] = {None: (0.0, -1, "")}
    position = problem.graph.position[error.after] + 1 if error.after else 0

    def price(owner: str | None) -> tuple[float, int, str]:
        if owner is not None and owner not in prices:
            prices[owner] = _price(problem, state, owner, position, actions)
        return prices[owner]

    best: tuple[float, list[str]] = (math.inf, [])
    chunks = error.layout
    first, size, cost = 0, 0, 0.0
    for last, (address, nbytes, owner) in enumerate(chunks):
        is_neighbour = last > 0 and chunks[last - 1][0] + chunks[last - 1][1] == address
        own = price(owner)[0]
        if not is_neighbour:
            first, size, cost = last, 0, 0.0
        if math.isinf(own):
            first, size, cost = last + 1, 0, 0.0
            continue
        size, cost = size + nbytes, cost + own
        while size - chunks[first][1] >= error.nbytes:
            size -= chunks[first][1]
            cost -= price(chunks[first][2])[0]
            first += 1
        if size >= error.nbytes and cost < best[0]:
            best = (cost, [chunk[2] for chunk in chunks[first : last + 1] if chunk[2] is not None])
    return {price(owner)[1]: price(owner)[2] for owner in best[1]}


def _price(
    problem: gaps.Gaps, state: Evictions, owner: str, position: int, actions: Collection[str]
) -> tuple[float, int, str]:
    """Seconds to evict what lives in a chunk at a position, the gap, and the way."""
    storage = problem.storage_of.get(problem.root_of.get(owner, ""))
    for gap in () if storage is None else problem.by_storage.get(storage, ()):
        item = problem.gaps[gap]
        if item.start < position < item.end and gap not in state.evicted:
            return offer(problem, gap, state.evicted, state.anchors, actions)
    return (math.inf, -1, "")


def offer(
    problem: gaps.Gaps, gap: int, evicted: Mapping[int, str], anchors: Collection[int], actions: Collection[str]
) -> tuple[float, int, str]:
    """The cheapest way to evict a gap: seconds, the gap, and "swap" or "recompute"; infinite if there is none."""
    offers = [(math.inf, gap, "")]
    if "swap" in actions:
        offers.append((problem.swap_seconds(gap), gap, "swap"))
    if "recompute" in actions and problem.gaps[gap].storage not in anchors:
        most = min(offers)[0]
        offers.append((problem.recompute_seconds(gap, evicted, anchors, most), gap, "recompute"))
    return min(offers)

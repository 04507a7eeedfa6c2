"""When the copies of swaps run, where they run beside compute.

Evictions say what moves over which gap. This says when, so that little has to wait: copies off the device queue in the
order in which their gaps begin and free their source when they are complete; where memory is short, the next node waits
for the one that is complete first. Copies back start as late as they can and still arrive in time, or, where that is
too late for what comes together, up to a whole step earlier, as far as there is room; several margins are tried.

Known weaknesses: of copies back that compete for room, the one that is needed first gets it; the clock is that of a
step that waits for no copy back.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from graphswap import ir
from graphswap.cost_model import Link
from graphswap.plan import Decision, Recompute, Swap
from graphswap.simulator import Timeline
from graphswap.strategies import gaps

_MARGINS = (0.0, 0.02, 1.0)
"""Of the step's seconds: how much earlier than needed copies back may start."""
_SHARES = (1.0, 0.96, 0.9)
"""Of the budget, for copies back: less where all of it is passed, as when an op can no longer work in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """A swap by positions."""

    swap: Swap
    nbytes: int
    piece_bytes: int  # beside them on the device while they come back
    start: int  # out after
    idle: int  # the first position at which the value may be gone
    end: int  # the use that it must be back for


def timed(
    problem: gaps.Gaps, decisions: Sequence[Decision], memory_budget: float
) -> tuple[tuple[Decision, ...], Timeline]:
    """Gives every swap its times.

    Args:
        problem: The gaps.
        decisions: Swaps that take as little memory as they can, as `Gaps.decide` makes them, and others.
        memory_budget: Bytes that copies in flight may fill; what overflows without them stays as it is.

    Returns:
        The decisions and their timeline: of those that keep the budget the fastest, else the smallest.
    """
    place, value = problem.graph.position, problem.graph.value
    link = problem.cost_model.link(problem.cost_model.far_tier)
    moves = []
    for swap in (decision for decision in decisions if isinstance(decision, Swap)):
        places = (place[swap.out_after], place[swap.freed_before], place[swap.in_before])
        moves.append(_Move(swap, value(swap.value).nbytes, _piece_bytes(value(swap.value)), *places))
    others = tuple(decision for decision in decisions if not isinstance(decision, Swap))
    tight = problem.simulate(tuple(decisions))
    best = (tuple(decisions), tight)
    if not moves or link.is_closed:
        return best
    live = problem.live_by_position(tight)
    repeats = {place[decision.before] for decision in others if isinstance(decision, Recompute)}
    freed, memory, clock = _out(moves, live, _busy(problem, tight), repeats, memory_budget, link)
    leaving = np.zeros(len(live))  # what is freed at a position is still there when copies back start right before it
    np.add.at(leaving, freed, [move.nbytes for move in moves])
    for share, margin in itertools.product(_SHARES, _MARGINS):
        if share < 1.0 and best[1].peak_bytes <= memory_budget and best[1] is not tight:
            break
        room = share * memory_budget
        found = (*others, *_back(problem, moves, freed, memory.copy(), leaving, clock, margin, room, link))
        timeline = problem.simulate(found)
        best = min(best, (found, timeline), key=lambda plan: _worth(plan[1], memory_budget))
    return best


def _piece_bytes(value: ir.Value) -> int:
    return value.nbytes // max(1, ir.swap_pieces(value))


def _worth(timeline: Timeline, memory_budget: float) -> tuple[float, float]:
    return max(0.0, timeline.peak_bytes - memory_budget), timeline.seconds


def _busy(problem: gaps.Gaps, timeline: Timeline) -> np.ndarray:
    """Seconds of each of the user's nodes with what is repeated before it."""
    busy = np.zeros(len(problem.order))
    before = 0.0
    for step in timeline.steps:
        if step.kind in ("run", "recompute"):
            position = problem.graph.position[step.name]
            before += problem.seconds[position]
            if step.kind == "run":
                busy[position], before = before, 0.0
    return busy


def _out(
    moves: Sequence[_Move],
    live: np.ndarray,
    busy: np.ndarray,
    repeats: set[int],
    memory_budget: float,
    link: Link,
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The copies off the device: the position at which each is freed, bytes in use, and when each position starts."""
    starting, idling = collections.defaultdict[int, list[int]](list), collections.defaultdict[int, list[int]](list)
    for number, move in enumerate(moves):
        starting[move.start + 1].append(number)
        idling[move.idle].append(number)
    complete: dict[str, float] = {}  # value -> when its copy is out there
    pending: list[tuple[float, int]] = []  # idle, but not copied yet
    freed = [move.idle for move in moves]
    memory, clock = live.copy(), np.zeros(len(live) + 1)
    waiting, now, lane = 0, 0.0, 0.0
    for position in range(len(live)):
        for number in starting[position]:
            move = moves[number]
            if move.swap.value not in complete:
                lane = max(lane, now) + link.out_seconds(move.nbytes)
                complete[move.swap.value] = lane
        for number in idling[position]:
            heapq.heappush(pending, (complete[moves[number].swap.value], number))
            waiting += moves[number].nbytes
        while pending:
            done, number = pending[0]
            is_full = live[position] + waiting > memory_budget
            # What is repeated before the next node runs before that node waits.
            is_full |= position + 1 in repeats and live[position + 1] + waiting > memory_budget
            is_due = any(moves[other].end <= position + 1 for _, other in pending)
            if not (done <= now or is_full or is_due):
                break
            heapq.heappop(pending)
            now = max(now, done)
            freed[number] = position
            waiting -= moves[number].nbytes
        memory[position] += waiting
        clock[position] = now
        now += busy[position]
    clock[-1] = now
    return freed, memory, clock


def _back(
    problem: gaps.Gaps,
    moves: Sequence[_Move],
    freed: Sequence[int],
    memory: np.ndarray,
    leaving: np.ndarray,
    clock: np.ndarray,
    margin: float,
    memory_budget: float,
    link: Link,
) -> list[Swap]:
    """The swaps with their copies back. Fills `memory` with what is on its way."""
    order = problem.order
    latest = [0] * len(moves)
    lane = np.inf
    for number in sorted(range(len(moves)), key=lambda number: -moves[number].end):
        move = moves[number]
        lane = min(lane, float(clock[move.end])) - link.in_seconds(move.nbytes)
        latest[number] = int(np.searchsorted(clock, lane - margin * clock[-1], side="right")) - 2
    swaps = []
    before = 0  # the copy that is needed before this one starts no later
    for number in sorted(range(len(moves)), key=lambda number: moves[number].end):
        move = moves[number]
        first = min(max(latest[number], freed[number], before if margin else 0), move.end - 1)
        at_first = move.nbytes + move.piece_bytes
        full = np.flatnonzero(memory[first + 1 : move.end] + move.nbytes > memory_budget)
        after = first + 1 + int(full[-1]) if len(full) else first
        while after < move.end - 1 and memory[after + 1] + leaving[after + 1] + at_first > memory_budget:
            after += 1
        memory[after + 1 : move.end] += move.nbytes
        before = max(before, after)
        swaps.append(dataclasses.replace(move.swap, freed_before=order[freed[number]], in_after=order[after]))
    return swaps

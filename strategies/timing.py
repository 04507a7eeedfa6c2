"""When the copies of swaps run, where they run beside compute.

Evictions say what moves over which gap. This says when, so that little has to wait: copies off the device queue in the
order in which their gaps begin, start as late as they can and still be complete by then, or as soon as the value is
made, and free their source when they are complete; where memory is short, the next node waits
for the one that is complete first. Copies back start as late as they can and still arrive in time, or, where that is
too late for what comes together, up to a whole step earlier, as far as there is room; several margins are tried.

Known weaknesses: of copies back that compete for room, the one that is needed first gets it; the clock is that of a
step that waits for no copy back.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from graphswap import ir
from graphswap.cost_model import Link
from graphswap.incremental import Outline
from graphswap.plan import Decision, Recompute, Swap
from graphswap.strategies import gaps

_MARGINS = (0.0, 0.02, 1.0)
"""Of the step's seconds: how much earlier than needed copies back may start."""
_ESTIMATED_MARGIN = 0.02
_SHARES = (1.0, 0.96, 0.9)
"""Of the budget, for copies back: less where all of it is passed, as when an op can no longer work in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """A swap by positions."""

    swap: Swap
    nbytes: int
    piece_bytes: int  # beside them on the device while they come back
    start: int  # out after, or as soon as it may be
    idle: int  # the first position at which the value may be gone
    end: int  # the use that it must be back for


def timed(
    problem: gaps.Gaps, decisions: Sequence[Decision], memory_budget: float
) -> tuple[tuple[Decision, ...], Outline]:
    """Gives every swap its times.

    Args:
        problem: The gaps.
        decisions: Swaps that take as little memory as they can, as `Gaps.decide` makes them, and others.
        memory_budget: Bytes that copies in flight may fill; what overflows without them stays as it is.

    Returns:
        The decisions and their outline: of those that keep the budget the fastest, else the smallest.
    """
    tight = problem.outline(decisions)
    best = (tuple(decisions), tight)
    moves = _moves(problem, decisions)
    link = problem.cost_model.link(problem.cost_model.far_tier)
    if not moves or link.is_closed:
        return best
    moves = _departing(moves, tight, link)
    departures = _out(moves, tight, _repeats(problem, decisions), memory_budget, link)
    others = [decision for decision in decisions if not isinstance(decision, Swap)]
    order = problem.order
    for share, margin in itertools.product(_SHARES, _MARGINS):
        if share < 1.0 and best[1].peak_bytes <= memory_budget and best[1] is not tight:
            break
        after = _back(moves, departures, margin, share * memory_budget, link)
        swaps = [
            dataclasses.replace(
                move.swap, out_after=order[move.start], freed_before=order[freed], in_after=order[first]
            )
            for move, freed, first in zip(moves, departures.freed, after, strict=True)
        ]
        found = (*others, *swaps)
        outline = problem.outline(found)
        best = min(best, (found, outline), key=lambda plan: _worth(plan[1], memory_budget))
    return best


def estimated(problem: gaps.Gaps, decisions: Sequence[Decision], tight: Outline, memory_budget: float) -> float:
    """About the seconds that `timed` would get to, at a fraction of its price.

    Args:
        problem: The gaps.
        decisions: As for `timed`.
        tight: Their outline.
        memory_budget: Likewise.
    """
    moves = _moves(problem, decisions)
    link = problem.cost_model.link(problem.cost_model.far_tier)
    if not moves or link.is_closed:
        return tight.seconds
    moves = _departing(moves, tight, link)
    departures = _out(moves, tight, _repeats(problem, decisions), memory_budget, link)
    after = _back(moves, departures, _ESTIMATED_MARGIN, memory_budget, link)
    return min(tight.seconds, _seconds(moves, departures.freed, after, tight.busy, link))


def _moves(problem: gaps.Gaps, decisions: Sequence[Decision]) -> list[_Move]:
    """The swaps in the order in which they are due to be gone."""
    place, value = problem.graph.position, problem.graph.value
    moves = []
    for swap in decisions:
        if isinstance(swap, Swap):
            places = (place[swap.out_after], place[swap.freed_before], place[swap.in_before])
            moves.append(_Move(swap, value(swap.value).nbytes, _piece_bytes(value(swap.value)), *places))
    return sorted(moves, key=lambda move: move.idle)


def _repeats(problem: gaps.Gaps, decisions: Sequence[Decision]) -> set[int]:
    return {problem.graph.position[decision.before] for decision in decisions if isinstance(decision, Recompute)}


def _piece_bytes(value: ir.Value) -> int:
    return value.nbytes // max(1, ir.swap_pieces(value))


def _worth(outline: Outline, memory_budget: float) -> tuple[float, float]:
    return max(0.0, outline.peak_bytes - memory_budget), outline.seconds


def _departing(moves: Sequence[_Move], tight: Outline, link: Link) -> list[_Move]:
    """The moves, their copies off the device as late as they are complete when they are due, and in that order."""
    ran = np.concatenate([[0.0], np.cumsum(tight.busy)])
    found = list(moves)
    copies = {move.swap.value: number for number, move in reversed(list(enumerate(moves)))}  # the first of each value
    queue = sorted(copies.values())
    lane = np.inf
    latest = {}
    for number in reversed(queue):
        lane = min(lane, float(ran[moves[number].idle])) - link.out_seconds(moves[number].nbytes)
        latest[number] = int(np.searchsorted(ran, lane, side="right")) - 2
    before = 0
    for number in queue:
        move = moves[number]
        before = min(max(move.start, latest[number], before), move.idle - 1)
        found[number] = dataclasses.replace(move, start=before)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Departures:
    """The copies off the device.

    Attributes:
        freed: Of each move, the position at which its source is freed.
        memory: Bytes in use at each position.
        clock: Seconds at which each position starts, and the end.
    """

    freed: Sequence[int]
    memory: np.ndarray
    clock: np.ndarray


def _out(moves: Sequence[_Move], tight: Outline, repeats: set[int], memory_budget: float, link: Link) -> _Departures:
    """Lets sources go when their copies are complete, or earlier, waiting for them, where memory is short."""
    count = len(tight.live)
    starting, idling = collections.defaultdict[int, list[int]](list), collections.defaultdict[int, list[int]](list)
    for number, move in enumerate(moves):
        starting[move.start + 1].append(number)
        idling[move.idle].append(number)
    fullest = tight.live.copy()
    for position in repeats:  # what is repeated before a node runs before that node waits
        if position:
            fullest[position - 1] = max(fullest[position - 1], tight.live[position])
    complete: dict[str, float] = {}  # value -> when its copy is out there
    pending: list[tuple[float, int]] = []  # idle, but not copied yet
    freed = [move.idle for move in moves]
    waiting = np.zeros(count + 1)  # changes of the bytes that are pending, by position
    delays = np.zeros(count + 1)
    ran = np.concatenate([[0.0], np.cumsum(tight.busy)])
    pending_bytes, delay, lane = 0, 0.0, 0.0
    events = sorted({*starting, *idling})
    position = events[0]
    while position < count:
        now = ran[position] + delay
        for number in starting.get(position, ()):
            move = moves[number]
            if move.swap.value not in complete:
                lane = max(lane, now) + link.out_seconds(move.nbytes)
                complete[move.swap.value] = lane
        for number in idling.get(position, ()):
            heapq.heappush(pending, (complete[moves[number].swap.value], number))
            pending_bytes += moves[number].nbytes
            waiting[position] += moves[number].nbytes
        while pending:
            done, number = pending[0]
            is_due = any(moves[other].end <= position + 1 for _, other in pending)
            if not (done <= now or fullest[position] + pending_bytes > memory_budget or is_due):
                break
            heapq.heappop(pending)
            if done > now:
                delays[position] += done - now
                delay, now = delay + done - now, done
            freed[number] = position
            pending_bytes -= moves[number].nbytes
            waiting[position] -= moves[number].nbytes
        following = bisect.bisect_right(events, position)
        upcoming = [events[following] if following < len(events) else count]
        if pending:
            upcoming.append(int(np.searchsorted(ran, pending[0][0] - delay)))
            full = fullest[position + 1 : upcoming[0]] + pending_bytes > memory_budget
            upcoming.append(position + 1 + int(full.argmax()) if full.any() else count)
            upcoming.append(min(moves[number].end for _, number in pending) - 1)
        position = max(position + 1, min(upcoming))
    return _Departures(freed, tight.live + np.cumsum(waiting)[:-1], ran + np.cumsum(delays))


def _back(
    moves: Sequence[_Move], departures: _Departures, margin: float, memory_budget: float, link: Link
) -> list[int]:
    """After which position each move's copy back starts."""
    freed, memory, clock = departures.freed, departures.memory.copy(), departures.clock
    leaving = collections.Counter[int]()  # what is freed at a position is still there when copies start right before it
    for move, position in zip(moves, freed, strict=True):
        leaving[position] += move.nbytes
    latest = [0] * len(moves)
    lane = np.inf
    for number in sorted(range(len(moves)), key=lambda number: -moves[number].end):
        move = moves[number]
        lane = min(lane, float(clock[move.end])) - link.in_seconds(move.nbytes)
        latest[number] = int(np.searchsorted(clock, lane - margin * clock[-1], side="right")) - 2
    found = [0] * len(moves)
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
        found[number] = after
    return found


def _seconds(moves: Sequence[_Move], freed: Sequence[int], after: Sequence[int], busy: np.ndarray, link: Link) -> float:
    """Seconds of the step: compute, and waiting for copies."""
    ran = np.concatenate([[0.0], np.cumsum(busy)])
    leave, arrive, go, use = range(4)  # in the order in which things happen before a position
    events = [(move.start + 1, leave, number) for number, move in enumerate(moves)]
    events += [(position + 1, arrive, number) for number, position in enumerate(after)]
    events += [(position, go, number) for number, position in enumerate(freed)]
    events += [(move.end, use, number) for number, move in enumerate(moves)]
    out = back = delay = now = 0.0
    gone: dict[str, float] = {}  # value -> when its copy is out there
    there: dict[int, float] = {}
    for position, kind, number in sorted(events):
        now = float(ran[position]) + delay
        move = moves[number]
        if kind == leave:
            if move.swap.value not in gone:
                out = gone[move.swap.value] = max(out, now) + link.out_seconds(move.nbytes)
        elif kind == arrive:
            back = there[number] = max(back, now, gone[move.swap.value]) + link.in_seconds(move.nbytes)
        else:
            done = gone[move.swap.value] if kind == go else there[number]
            delay += max(0.0, done - now)
    return max(float(ran[-1]) + delay, out, back)

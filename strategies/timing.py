"""When copies run, where they run beside compute: those of swaps, and of variables that are fetched and stored.

Evictions say what moves over which gap. This says when, so that little has to wait: copies off the device queue in the
order in which their gaps begin, start as late as they can and still be complete by then, or as soon as the value is
made, and free their source when they are complete; where memory is short, the next node waits
for the one that is complete first. Copies back start as late as they can and still arrive in time, or, where that is
too late for what comes together, up to a whole step earlier, as far as there is room; several margins are tried. A
variable's value is copied back in the same way; as it has not been copied out, nothing but room holds it up. Its new
value is one more copy off the device, which nothing waits for but room.

Known weaknesses: what is read once more after it is stored may be written over there if its copy happens to be
complete, so that less memory is used than planned; of copies back that compete for room, the one that is needed first
gets it; the clock is that of a step that waits for no copy back.
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
from graphswap.incremental import Outline
from graphswap.plan import Decision, Prefetch, Recompute, Swap, WriteBack
from graphswap.strategies import gaps

_MARGINS = (0.0, 0.02, 1.0)
"""Of the step's seconds: how much earlier than needed copies back may start."""
_ESTIMATED_MARGIN = 0.02
_SHARES = (1.0, 0.96, 0.9)
"""Of the budget, for copies back: less where all of it is passed, as when an op can no longer work in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """A swap, or a value that is fetched or stored, by positions."""

    decision: Swap | Prefetch | WriteBack
    nbytes: int
    piece_bytes: int  # beside them on the device while they come back
    tier: str
    out_seconds: float
    in_seconds: float
    start: int  # out after, or as soon as it may be
    idle: int  # the first position at which the value may be gone, or after which it may be fetched
    end: int  # the use that it must be back for; the number of positions if it stays away

    @property
    def leaves(self) -> bool:
        return not isinstance(self.decision, Prefetch)

    @property
    def arrives(self) -> bool:
        return not isinstance(self.decision, WriteBack)

    @property
    def value(self) -> str:
        return self.decision.value if isinstance(self.decision, Swap) else self.decision.node


def timed(
    problem: gaps.Gaps, decisions: Sequence[Decision], memory_budget: float
) -> tuple[tuple[Decision, ...], Outline]:
    """Gives every swap its times, has fetches start ahead, and stores run beside compute.

    Args:
        problem: The gaps.
        decisions: Swaps that take as little memory as they can, as `Gaps.decide` makes them, and others.
        memory_budget: Bytes that copies in flight may fill; what overflows without them stays as it is.

    Returns:
        The decisions and their outline: of those that keep the budget the fastest, else the smallest.
    """
    decisions = tuple(decision for decision in decisions if not isinstance(decision, Prefetch | WriteBack))
    tight = problem.outline(decisions)
    best = (decisions, tight)
    copies = _copies(problem, decisions, tight, memory_budget)
    if copies is None:
        return best
    others = [decision for decision in decisions if not (isinstance(decision, Swap) and _is_beside(problem, decision))]
    order = problem.order
    for share, margin in itertools.product(_SHARES, _MARGINS):
        if share < 1.0 and best[1].peak_bytes <= memory_budget and best[1] is not tight:
            break
        found: list[Decision] = [*others, *_stored_at_leisure(problem)]
        for move, freed, first in zip(
            copies.moves, copies.freed, _back(copies, margin, share * memory_budget), strict=True
        ):
            if isinstance(move.decision, Swap):
                times = {"out_after": order[move.start], "freed_before": order[freed], "in_after": order[first]}
                found.append(dataclasses.replace(move.decision, **times))
            elif isinstance(move.decision, Prefetch):
                found.append(dataclasses.replace(move.decision, after=order[first]))
            else:
                gone = order[freed] if freed < len(order) else ""
                found.append(dataclasses.replace(move.decision, freed_before=gone))
        outline = problem.outline(found)
        best = min(best, (tuple(found), outline), key=lambda plan: _worth(plan[1], memory_budget))
    return best


def estimated(problem: gaps.Gaps, decisions: Sequence[Decision], tight: Outline, memory_budget: float) -> float:
    """About the seconds that `timed` would get to, at a fraction of its price.

    Args:
        problem: The gaps.
        decisions: As for `timed`.
        tight: Their outline.
        memory_budget: Likewise.
    """
    copies = _copies(problem, decisions, tight, memory_budget)
    if copies is None:
        return tight.seconds
    return min(tight.seconds, _seconds(copies, _back(copies, _ESTIMATED_MARGIN, memory_budget)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Copies:
    """The copies of a plan, those off the device with their times.

    Attributes:
        moves: Swaps and what is stored, then what is fetched.
        freed: Of each move, the position at which its source is freed, or after which it may be fetched.
        memory: Bytes in use at each position.
        clock: Seconds at which each position starts, and the end, if no copy back is waited for.
        busy: Seconds of each position, without what is fetched and stored.
    """

    moves: Sequence[_Move]
    freed: Sequence[int]
    memory: np.ndarray
    clock: np.ndarray
    busy: np.ndarray


def _copies(problem: gaps.Gaps, decisions: Sequence[Decision], tight: Outline, memory_budget: float) -> _Copies | None:
    """What may run beside compute; None if nothing does."""
    swaps = _swaps(problem, decisions)
    fetches, stores = (_fetches(problem, decisions), _stores(problem)) if problem.beside else ([], [])
    if not (swaps or problem.beside) or (swaps and problem.cost_model.link(problem.cost_model.far_tier).is_closed):
        return None
    busy = tight.busy
    if problem.beside:
        busy = busy.copy()
        for move in fetches:
            busy[move.end] = max(0.0, busy[move.end] - move.in_seconds)
        for store in _stored_at_leisure(problem):
            busy[problem.graph.position[store.node]] = 0.0
        for move in stores:
            busy[move.start + 1] = max(0.0, busy[move.start + 1] - move.out_seconds)
    ran = np.concatenate([[0.0], np.cumsum(busy)])
    leaving = sorted([*swaps, *stores], key=lambda move: move.idle)
    freed, memory, clock = [], tight.live, ran
    if leaving:
        leaving = _departing(leaving, ran)
        freed, memory, clock = _out(leaving, tight.live, ran, _repeats(problem, decisions), memory_budget)
    return _Copies([*leaving, *fetches], [*freed, *(move.idle for move in fetches)], memory, clock, busy)


def _is_beside(problem: gaps.Gaps, swap: Swap) -> bool:
    return problem.cost_model.link(swap.tier).overlaps and not swap.is_synchronous


def _swaps(problem: gaps.Gaps, decisions: Sequence[Decision]) -> list[_Move]:
    """The swaps that run beside compute."""
    place, value = problem.graph.position, problem.graph.value
    moves = []
    for swap in decisions:
        if isinstance(swap, Swap) and _is_beside(problem, swap):
            places = (place[swap.out_after], place[swap.freed_before], place[swap.in_before])
            moved = value(swap.value)
            link = problem.cost_model.link(swap.tier)
            seconds = link.out_seconds(moved.nbytes), link.in_seconds(moved.nbytes)
            moves.append(_Move(swap, moved.nbytes, _piece_bytes(moved), swap.tier, *seconds, *places))
    return moves


def _fetches(problem: gaps.Gaps, decisions: Sequence[Decision]) -> list[_Move]:
    """All runs of what may be fetched beside compute, each from the last use of the run before."""
    graph, position, order = problem.graph, problem.graph.position, problem.order
    fetches = [name for name in problem.beside if graph.by_name[name].op == ir.FETCH]
    uses = {name: set(problem.storages[problem.storage_of[name]].uses) for name in fetches}
    runs = [(name, position[name]) for name in sorted(fetches, key=position.__getitem__)]
    for decision in decisions:
        if isinstance(decision, Recompute):
            end = position[decision.before]
            for name in decision.nodes:
                if name in uses:
                    runs.append((name, end))
                roots = {problem.root_of[reference] for reference in graph.by_name[name].inputs}
                for read in roots & uses.keys():
                    uses[read].add(end)
    moves = []
    for name, end in dict.fromkeys(runs):
        node = graph.by_name[name]
        if any(graph.by_name[other].op == ir.STORE for other in node.control_inputs):
            continue  # of a value that this step stores
        needs = [position[other] for other in (*map(ir.producer, node.inputs), *node.control_inputs)]
        first = max([*needs, *(use for use in (*uses[name], position[name]) if use < end)], default=-1)
        if 0 <= first < end:
            before = name if end == position[name] else order[end]
            tier, seconds = str(dict(node.attrs)["tier"]), problem.cost_model.seconds(graph, node)
            decision = Prefetch(name, order[first], before)
            moves.append(_Move(decision, node.outputs[0].nbytes, 0, tier, 0.0, seconds, first, first, end))
    return moves


def _stores(problem: gaps.Gaps) -> list[_Move]:
    """What may be stored beside compute, but for what is on the device anyway."""
    graph, free = problem.graph, {store.node for store in _stored_at_leisure(problem)}
    moves = []
    for name in sorted(problem.beside - free, key=graph.position.__getitem__):
        node, place = graph.by_name[name], graph.position[name]
        if node.op != ir.STORE:
            continue
        storage = problem.storages[problem.storage_of[problem.root_of[node.inputs[0]]]]
        moves.append(
            _Move(
                WriteBack(name),
                nbytes=storage.nbytes,
                piece_bytes=0,
                tier=str(dict(node.attrs)["tier"]),
                out_seconds=problem.cost_model.seconds(graph, node),
                in_seconds=0.0,
                start=place - 1,
                idle=storage.uses[-1] + 1,
                end=len(problem.order),
            )
        )
    return moves


def _stored_at_leisure(problem: gaps.Gaps) -> list[WriteBack]:
    """Stores beside compute of what is on the device anyway, as it is small, or a result: nobody waits for them."""
    graph, results = problem.graph, {problem.root_of[reference] for reference in problem.graph.outputs}
    stores = [name for name in problem.beside if graph.by_name[name].op == ir.STORE]
    roots = {name: problem.root_of[graph.by_name[name].inputs[0]] for name in stores}
    free = [name for name, root in roots.items() if problem.stays(root) or root in results]
    return [WriteBack(name) for name in sorted(free, key=graph.position.__getitem__)]


def _repeats(problem: gaps.Gaps, decisions: Sequence[Decision]) -> set[int]:
    return {problem.graph.position[decision.before] for decision in decisions if isinstance(decision, Recompute)}


def _piece_bytes(value: ir.Value) -> int:
    return value.nbytes // max(1, ir.swap_pieces(value))


def _worth(outline: Outline, memory_budget: float) -> tuple[float, float]:
    return max(0.0, outline.peak_bytes - memory_budget), outline.seconds


def _departing(moves: Sequence[_Move], ran: np.ndarray) -> list[_Move]:
    """The moves, their copies off the device as late as they are complete when they are due, and in that order."""
    found = list(moves)
    copies = {move.value: number for number, move in reversed(list(enumerate(moves)))}  # the first of each value
    queue = sorted(copies.values())
    lanes: dict[str, float] = {}
    latest = {}
    for number in reversed(queue):
        move = moves[number]
        lane = lanes[move.tier] = min(lanes.get(move.tier, np.inf), float(ran[move.idle])) - move.out_seconds
        latest[number] = int(np.searchsorted(ran, lane, side="right")) - 2
    before: dict[str, int] = {}
    for number in queue:
        move = moves[number]
        start = before[move.tier] = min(max(move.start, latest[number], before.get(move.tier, 0)), move.idle - 1)
        if move.arrives:
            found[number] = dataclasses.replace(move, start=start)
    return found


def _out(
    moves: Sequence[_Move], live: np.ndarray, ran: np.ndarray, repeats: set[int], memory_budget: float
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lets sources go when their copies are complete, or earlier, waiting for them, where memory is short.

    Returns:
        At which position each is freed, the number of positions if it never is; bytes in use at each position, and when
        each starts.
    """
    count = len(live)
    starting, idling = collections.defaultdict[int, list[int]](list), collections.defaultdict[int, list[int]](list)
    for number, move in enumerate(moves):
        starting[move.start + 1].append(number)
        idling[move.idle].append(number)
    fullest = live.copy()
    for position in repeats:  # what is repeated before a node runs before that node waits
        if position:
            fullest[position - 1] = max(fullest[position - 1], live[position])
    complete: dict[str, float] = {}  # value -> when its copy is out there
    pending: list[tuple[float, int]] = []  # idle, but not copied yet
    freed = [move.idle if move.arrives else count for move in moves]
    waiting = np.zeros(count + 1)  # changes of the bytes that are pending, by position
    delays = np.zeros(count + 1)
    pending_bytes, delay = 0, 0.0
    lanes: dict[str, float] = {}
    events = sorted({*starting, *idling})
    position = events[0]
    while position < count:
        now = ran[position] + delay
        for number in starting.get(position, ()):
            move = moves[number]
            if move.value not in complete:
                lanes[move.tier] = max(lanes.get(move.tier, 0.0), now) + move.out_seconds
                complete[move.value] = lanes[move.tier]
        for number in idling.get(position, ()):
            heapq.heappush(pending, (complete[moves[number].value], number))
            pending_bytes += moves[number].nbytes
            waiting[position] += moves[number].nbytes
        while pending:
            done, number = pending[0]
            is_due = any(moves[other].arrives and moves[other].end <= position + 1 for _, other in pending)
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
            upcoming.append(min((moves[n].end for _, n in pending if moves[n].arrives), default=count) - 1)
        position = max(position + 1, min(upcoming))
    return freed, live + np.cumsum(waiting)[:-1], ran + np.cumsum(delays)


def _back(copies: _Copies, margin: float, memory_budget: float) -> list[int]:
    """After which position each move's copy to the device starts; 0 for those that stay away."""
    moves, memory, clock = copies.moves, copies.memory.copy(), copies.clock
    leaving = collections.Counter[int]()  # what is freed at a position is still there when copies start right before it
    for move, position in zip(moves, copies.freed, strict=True):
        if move.leaves:
            leaving[position] += move.nbytes
    latest = [0] * len(moves)
    lanes: dict[str, float] = {}
    arriving = [number for number, move in enumerate(moves) if move.arrives]
    for number in sorted(arriving, key=lambda number: -moves[number].end):
        move = moves[number]
        lane = lanes[move.tier] = min(lanes.get(move.tier, np.inf), float(clock[move.end])) - move.in_seconds
        latest[number] = int(np.searchsorted(clock, lane - margin * clock[-1], side="right")) - 2
    found = [0] * len(moves)
    before: dict[str, int] = {}  # tier -> the copy that is needed before this one starts no later
    for number in sorted(arriving, key=lambda number: moves[number].end):
        move = moves[number]
        earlier = before.get(move.tier, 0)
        first = min(max(latest[number], copies.freed[number], earlier if margin else 0), move.end - 1)
        at_first = move.nbytes + move.piece_bytes
        full = np.flatnonzero(memory[first + 1 : move.end] + move.nbytes > memory_budget)
        after = first + 1 + int(full[-1]) if len(full) else first
        while after < move.end - 1 and memory[after + 1] + leaving[after + 1] + at_first > memory_budget:
            after += 1
        memory[after + 1 : move.end] += move.nbytes
        before[move.tier] = max(earlier, after)
        found[number] = after
    return found


def _seconds(copies: _Copies, after: Sequence[int]) -> float:
    """Seconds of the step: compute, and waiting for copies."""
    moves = copies.moves
    ran = np.concatenate([[0.0], np.cumsum(copies.busy)])
    leave, arrive, go, use = range(4)  # in the order in which things happen before a position
    events = [(move.start + 1, leave, number) for number, move in enumerate(moves) if move.leaves]
    events += [(copies.freed[number], go, number) for _, _, number in events if copies.freed[number] < len(ran) - 1]
    for number, move in enumerate(moves):
        if move.arrives:
            events += [(after[number] + 1, arrive, number), (move.end, use, number)]
    delay = now = 0.0
    outs: dict[str, float] = {}
    ins: dict[str, float] = {}
    gone: dict[str, float] = {}  # value -> when its copy is out there
    there: dict[int, float] = {}
    for position, kind, number in sorted(events):
        now = float(ran[position]) + delay
        move = moves[number]
        if kind == leave:
            if move.value not in gone:
                outs[move.tier] = gone[move.value] = max(outs.get(move.tier, 0.0), now) + move.out_seconds
        elif kind == arrive:
            start = max(ins.get(move.tier, 0.0), now, gone.get(move.value, 0.0))
            ins[move.tier] = there[number] = start + move.in_seconds
        else:
            done = gone[move.value] if kind == go else there[number]
            delay += max(0.0, done - now)
    return max([float(ran[-1]) + delay, *outs.values(), *ins.values()])

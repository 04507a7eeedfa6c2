"""The linear program behind `joint`: what any plan must pay to keep a budget, by swaps and recompute together.

POFO (Beaumont et al., NeurIPS 2021) does so for chains by dynamic programming, Checkmate (Jain et al., MLSys 2020) for
recompute alone as a mixed-integer program; this works on the gaps between uses, and copies are cumulative flows.
Time is cut into *buckets*; between two of them stands a *check*, the position with the most bytes in use nearby.
Fractions:

* of each gap, and each stretch of it between buckets in which the storage may be needed for a recompute: absent because
  it is in the far tier, or absent because it was dropped;
* of each node and bucket: run again there, which needs its inputs to be there, or to be run again in that bucket, too;
* of each storage that is dead already: kept for a later recompute;
* cumulative bytes copied out and back, at most what the links carry in the time that passes. Seconds that pass
  without compute, and those of repeated nodes, are what is minimised; in both of them copies go on.

What is absent at a check is so by a copy or must be recomputed; bytes that are not copied out yet, or were copied back
early, are there.
Bytes on links that do not run beside compute cost their seconds instead. What is fetched beside compute is one more
copy back, and what is stored one more copy off the device, over the link of swaps; over another one they cost nothing.

The optimum bounds all plans in this order that run one node at a time and repeat nodes right before a use that ends a
gap. Chains are followed over `_DEPTH` nodes; what lies before is taken to be there, and nothing comes back early for a
longer one. Storages too small to plan for count as absent while idle.

An op that would work in place if others did not need its input later is granted its output as far as that input is
absent afterwards; where no fraction says so, it is granted it. A first run that is left out leaves no bytes.

Known weaknesses: where a repeated chain overflows between two checks is not seen; a fraction of a storage may be
dropped, which is paid for in full only where the rows of `_all_at_once` see it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from graphswap import allocator, bound, ir, liveness
from graphswap.strategies import gaps
from graphswap.strategies.solver import Solution
from graphswap.variables import SMALL_BYTES

_CHECKS = 100
_DEPTH = 6
_UNIT = 1e-9
"""Bytes are counted in GB, so that all coefficients are of similar size."""
_HORIZON = 10.0
"""The bound holds for plans of at most so many times the step's compute and copies of variables."""
_PRICE = 1e-4
"""Of what it costs at worst: what a copy or a repeated node costs at least, so that no idle ones are chosen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a gap in which its storage is present or absent as a whole.

    Attributes:
        first: Its first check.
        end: The check after its last one; the bucket in which it ends has the same number.
        swapped: Column: the fraction that is in the far tier.
        dropped: Column: the fraction that was dropped; None if it can't be recomputed.
    """

    first: int
    end: int
    swapped: int
    dropped: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A dead storage's stretch between two buckets: the fraction that is still there."""

    first: int
    end: int
    column: int


class Relaxation:
    """The program of one problem, and what its columns mean.

    Attributes:
        program: For any budget.
        prices: Added to the cost while solving.
        checks: Positions of the checks, rising.
        stretches: Of each gap that covers a check.
        runs: Column of (node, bucket): run again there.
        kept: Storage to the columns of its stretches after its last use.
    """

    def __init__(self, problem: gaps.Gaps):
        self._problem = problem
        self._link = problem.cost_model.link(problem.cost_model.far_tier)
        self._builder = bound.Builder()
        self._prices: dict[int, float] = {}
        self._inputs: dict[str, Sequence[int]] = {}
        self.checks = self._find_checks()
        starts, ends = problem.starts, problem.ends
        self._first = np.searchsorted(self.checks, starts, side="right")
        self._end = np.searchsorted(self.checks, ends, side="left")
        self._of_storage: dict[int, list[int]] = collections.defaultdict(list)
        for gap in sorted(np.flatnonzero(self._end > self._first), key=lambda gap: starts[gap]):
            self._of_storage[problem.gaps[gap].storage].append(int(gap))

        count = len(self.checks) + 1
        self._absent: list[list[tuple[int, float]]] = [[] for _ in range(count)]  # changes at each check
        self._out: list[list[tuple[int, float]]] = [
            [] for _ in range(count)
        ]  # what must have been copied out, likewise
        self._born: list[list[tuple[int, float]]] = [[] for _ in range(count)]  # what may be, by bucket
        self._due: list[list[tuple[int, float]]] = [[] for _ in range(count)]  # what must be back by the bucket's end
        self._superfluous: dict[str, int] = {}  # node -> column: its first run is left out
        self._refunds: list[list[tuple[int, float]]] = [[] for _ in range(count)]  # runs that become superfluous
        self._fetches: dict[tuple[int, int], int] = {}
        self._has_stores = any(problem.graph.by_name[name].op == ir.STORE for name in problem.beside)
        self._stored = 0.0  # GB that leave beside compute for good
        self._awaited = np.zeros(count)  # GB that may still be on their way when a bucket ends, though they are due
        self._dropped_at_birth: dict[int, int | None] = {}  # storage that nobody reads before its first gap ends
        self._there: dict[tuple[int, int], tuple[list[tuple[int, float]], float]] = {}  # (storage, bucket) -> terms

        self.runs: dict[tuple[str, int], int] = {}
        self.stretches: dict[int, list[Stretch]] = {}
        self.kept: dict[int, list[_Kept]] = {}
        self._depth = self._demands()
        for node, bucket in self._depth:
            self.runs[node, bucket] = self._column(price=self._spent(node))
        for storage in self._of_storage:
            self._add_gaps(storage)
        for storage in self._needed:
            self._add_kept(storage)
        for node, bucket in self.runs:
            self._add_inputs(node, bucket)
        for gap in self.stretches:
            self._all_at_once(gap)
        self._add_refunds()
        self._add_fetches()
        self._add_stores()
        self._add_flows()
        self.program = self._builder.program(constant=float(problem.seconds.sum()))
        self.prices = np.zeros(len(self.program.cost))
        for column, price in self._prices.items():
            self.prices[column] = price

    def inputs(self, node: str) -> Sequence[int]:
        """Storages that the node reads and that may be absent."""
        if node not in self._inputs:
            problem = self._problem
            roots = dict.fromkeys(problem.root_of[reference] for reference in problem.graph.by_name[node].inputs)
            self._inputs[node] = [problem.storage_of[root] for root in roots if not problem.stays(root)]
        return self._inputs[node]

    # --- time ----------------------------------------------------------------------------------------------------

    def indifference(self, solution: Solution) -> dict[tuple[int, str], float]:
        """What it would cost, at an optimum's prices, to treat a gap the other way: (gap, way) to seconds >= 0.

        Little where the optimum is undecided; much where it is sure to evict the gap so, or not to.
        """
        program = self.program
        priced = np.bincount(program.columns, program.values * solution.duals[program.rows], len(program.cost))
        reduced = program.cost + self.prices - priced
        found = {}
        for gap, stretches in self.stretches.items():
            found[gap, "swap"] = abs(float(sum(reduced[stretch.swapped] for stretch in stretches)))
            dropped = [stretch.dropped for stretch in stretches if stretch.dropped is not None]
            if dropped:
                found[gap, "recompute"] = abs(float(reduced[dropped].sum()))
        return found

    def _find_checks(self) -> np.ndarray:
        """Cuts the step by a mix of time and number of nodes, and takes the fullest position of every part."""
        seconds, live = self._problem.seconds, self._problem.live
        weights = seconds / max(seconds.sum(), 1e-30) + 1.0 / len(seconds)
        part = np.minimum((np.cumsum(weights) / weights.sum() * _CHECKS).astype(int), _CHECKS - 1)
        borders = np.flatnonzero(np.diff(part, prepend=-1))
        ends = [*borders[1:], len(part)]
        return np.array([start + int(np.argmax(live[start:end])) for start, end in zip(borders, ends, strict=True)])

    def _bucket(self, position: int) -> int:
        return int(np.searchsorted(self.checks, position, side="left"))

    # --- what there is to choose -----------------------------------------------------------------------------------

    def _column(self, upper: float = 1.0, price: float = 0.0) -> int:
        column = self._builder.column(upper)
        self._prices[column] = _PRICE * price
        return column

    def _producer(self, storage: int) -> str:
        return ir.producer(self._problem.storages[storage].root)

    def _can_repeat(self, node: str) -> bool:
        return self._problem.can_repeat(self._problem.graph.by_name[node])

    def _seconds(self, node: str) -> float:
        return float(self._problem.seconds[self._problem.graph.position[node]])

    def _spent(self, node: str) -> float:
        """The same, with what it copies beside compute."""
        problem = self._problem
        return problem.cost_model.seconds(problem.graph, problem.graph.by_name[node])

    def _gigabytes(self, storage: int) -> float:
        return self._problem.storages[storage].nbytes * _UNIT

    def _demands(self) -> Mapping[tuple[str, int], int]:
        """(node, bucket) in which it may be repeated, with the nodes that are followed from there on."""
        depth: dict[tuple[str, int], int] = {}
        self._needed: dict[int, set[int]] = collections.defaultdict(set)  # storage -> buckets
        pending: collections.deque[tuple[str, int, int]] = collections.deque()

        def push(node: str, bucket: int, left: int) -> None:
            if depth.get((node, bucket), 0) < left:
                depth[node, bucket] = left
                pending.append((node, bucket, left))

        for storage, found in self._of_storage.items():
            for gap in found:
                if self._can_repeat(self._producer(storage)):
                    push(self._producer(storage), int(self._end[gap]), _DEPTH)
        while pending:
            node, bucket, left = pending.popleft()
            if depth[node, bucket] != left:
                continue
            for storage in self.inputs(node):
                can_repeat = self._can_repeat(self._producer(storage))
                if left > 1 or not can_repeat:
                    self._needed[storage].add(bucket)
                if left > 1 and can_repeat:
                    push(self._producer(storage), bucket, left - 1)
        return depth

    def _restoring(self, storage: int, bucket: int) -> list[tuple[int, float]]:
        """The run in that bucket after which the storage is there, if it can be."""
        run = self.runs.get((self._producer(storage), bucket))
        return [] if run is None else [(run, 1.0)]

    def _add_gaps(self, storage: int) -> None:
        problem, row = self._problem, self._builder.row
        gigabytes, node = self._gigabytes(storage), self._producer(storage)
        copying = self._link.out_seconds(problem.storages[storage].nbytes)
        moved = self._column(price=min(copying, float(problem.clock[-1])))
        self._born[self._bucket(problem.storages[storage].born)].append((moved, gigabytes))
        copied: int | None = None
        for number, gap in enumerate(self._of_storage[storage]):
            first, end = int(self._first[gap]), int(self._end[gap])
            cuts = [first, *sorted(bucket for bucket in self._needed[storage] if first < bucket < end), end]
            stretches = self.stretches[gap] = []
            for start, stop in zip(cuts, cuts[1:], strict=False):
                dropped = self._column() if self._can_repeat(node) else None
                stretch = Stretch(start, stop, self._column(upper=float(not self._link.is_closed)), dropped)
                stretches.append(stretch)
                out = self._column()
                row([(out, 1.0), (stretch.swapped, -1.0)], lower=0.0)
                if copied is not None:  # what is out there stays
                    row([(out, 1.0), (copied, -1.0)], lower=0.0)
                    self._out[start].append((copied, -gigabytes))
                self._out[start].append((out, gigabytes))
                copied = out
                for column in (stretch.swapped, dropped):
                    if column is not None:
                        self._absent[start].append((column, gigabytes))
                        self._absent[stop].append((column, -gigabytes))
                if dropped is not None:
                    row([(stretch.swapped, 1.0), (dropped, 1.0)], upper=1.0)
            for stretch, after in zip(stretches, [*stretches[1:], None], strict=True):
                self._end_stretch(storage, stretch, after)
            if number == 0 and problem.gaps[gap].start == problem.storages[storage].born:
                self._dropped_at_birth[storage] = stretches[0].dropped
        assert copied is not None
        # Where values are stored, too, bytes that are moved for nothing could pass for theirs.
        row([(moved, 1.0), (copied, -1.0)], lower=0.0, upper=0.0 if self._has_stores else np.inf)

    def _end_stretch(self, storage: int, stretch: Stretch, after: Stretch | None) -> None:
        """What is present in the next stretch and was not in this one is fetched or made again."""
        row, bucket = self._builder.row, stretch.end
        fetched = self._fetches[storage, bucket] = self._column()
        self._due[bucket].append((fetched, self._gigabytes(storage)))
        row([(fetched, 1.0), (stretch.swapped, -1.0)], upper=0.0)
        row([(fetched, 1.0), (stretch.swapped, -1.0), *([(after.swapped, 1.0)] if after else [])], lower=0.0)
        terms = [(stretch.swapped, -1.0), (fetched, 1.0)]
        if stretch.dropped is not None:
            terms.append((stretch.dropped, -1.0))
            later = [(after.dropped, 1.0)] if after and after.dropped is not None else []
            row([*self._restoring(storage, bucket), *later, (stretch.dropped, -1.0)], lower=0.0)
        self._there[storage, bucket] = (terms, 1.0)

    def _add_kept(self, storage: int) -> None:
        """A dead storage may be kept; only buckets that a check separates from its last use matter."""
        details = self._problem.storages[storage]
        if details.is_held:
            return
        last = details.uses[-1] if details.uses else details.born
        first = int(np.searchsorted(self.checks, last, side="right"))
        before: _Kept | None = None
        for bucket in sorted(bucket for bucket in self._needed[storage] if bucket > first):
            kept = _Kept(first, bucket, self._column())
            self._absent[first].append((kept.column, -self._gigabytes(storage)))
            self._absent[bucket].append((kept.column, self._gigabytes(storage)))
            if before is not None:
                again = [(column, -1.0) for column, _ in self._restoring(storage, first)]
                self._builder.row([(kept.column, 1.0), (before.column, -1.0), *again], upper=0.0)
            self._there[storage, bucket] = ([(kept.column, 1.0)], 0.0)
            self.kept.setdefault(storage, []).append(kept)
            first, before = bucket, kept

    def _add_inputs(self, node: str, bucket: int) -> None:
        """A repeated node's inputs are there, are fetched, or are repeated, too."""
        left = self._depth[node, bucket]
        for storage in self.inputs(node):
            producer = self._producer(storage)
            if (storage, bucket) not in self._there or (left <= 1 and self._can_repeat(producer)):
                continue
            terms, constant = self._there[storage, bucket]
            again = self.runs.get((producer, bucket))
            if again == self.runs[node, bucket]:
                continue
            terms = [*terms, *([(again, 1.0)] if again is not None else [])]
            row = [(self.runs[node, bucket], 1.0), *((column, -value) for column, value in terms)]
            self._builder.row(row, upper=constant)

    def _all_at_once(self, gap: int) -> None:
        """What a dropped storage is made of is all there at some moment before the gap's end.

        Otherwise a third of it could be made three times of a third of its input.
        """
        stretches = self.stretches[gap]
        longest = max(stretches, key=lambda stretch: stretch.end - stretch.first)
        window = range(longest.end, stretches[-1].end + 1)
        if longest.dropped is None or len(window) < 2:
            return
        root = self._producer(self._problem.gaps[gap].storage)
        again = {root: longest.dropped}  # node -> the fraction that is run again within the window
        pending = collections.deque([(root, _DEPTH)])
        while pending:
            node, left = pending.popleft()
            for storage in self.inputs(node) if left > 1 else ():
                there = self._there_within(storage, gap, window)
                if there is None:
                    continue
                terms, constant = there
                producer = self._producer(storage)
                if self._can_repeat(producer):
                    if producer not in again:
                        again[producer] = self._column()
                        runs = [self.runs[producer, bucket] for bucket in window if (producer, bucket) in self.runs]
                        self._builder.row([(again[producer], 1.0), *((run, -1.0) for run in runs)], upper=0.0)
                        pending.append((producer, left - 1))
                    if again[producer] == again[node]:
                        continue
                    terms = [*terms, (again[producer], 1.0)]
                self._builder.row([(again[node], 1.0), *((column, -value) for column, value in terms)], upper=constant)

    def _there_within(self, storage: int, gap: int, window: range) -> tuple[list[tuple[int, float]], float] | None:
        """How much of a storage is there when the window begins, or comes back within; None if it may be all of it."""
        for other in self._of_storage.get(storage, ()):
            first, end = int(self._first[other]), int(self._end[other])
            if first < window[0] <= end and end >= window[-1]:
                stretches = self.stretches[other]
                at_start = next(s for s in stretches if s.first < window[0] <= s.end)
                terms = [(at_start.swapped, -1.0)]
                if at_start.dropped is not None:
                    terms.append((at_start.dropped, -1.0))
                back = [self._fetches[storage, s.end] for s in stretches if s.end in window]
                return [*terms, *((fetched, 1.0) for fetched in back)], 1.0
            if self._problem.gaps[other].start < self._problem.gaps[gap].end and end > window[0]:
                return None
        kept = [kept for kept in self.kept.get(storage, ()) if kept.end >= window[0]]
        if not kept or self.kept[storage][0].first >= window[-1]:
            return None
        return [(kept[0].column, 1.0)], 0.0

    def _add_refunds(self) -> None:
        """A repeated node whose first values nobody reads runs only once.

        Its first reader must do without: the storage was dropped at birth, or that reader is superfluous itself. The
        run that is left comes before the last of the chain of such readers, which runs where it stands.
        """
        problem = self._problem
        refunded = self._superfluous
        again: dict[str, list[int]] = collections.defaultdict(list)
        for node, bucket in self.runs:
            again[node].append(bucket)
        consumers, position = problem.graph.consumers, problem.graph.position
        stand = liveness.waited_for(problem.graph) | {ir.producer(reference) for reference in problem.graph.outputs}
        latest: dict[str, int] = {}  # the position before which a node runs for the first time, at the latest
        for node in reversed(problem.graph.nodes):
            places = [latest[name] for reference in node.refs() for name in consumers.get(reference, ())]
            can_wait = self._can_repeat(node.name) and node.name not in stand and places
            latest[node.name] = min(places) if can_wait else position[node.name]
            if not self._can_repeat(node.name):
                continue
            rows = []
            for reference in node.refs():
                terms = []
                readers = consumers.get(reference, ())
                if not readers:
                    continue
                storage = problem.storage_of.get(problem.root_of[reference])
                dropped = None if storage is None else self._dropped_at_birth.get(storage)
                if dropped is not None:
                    terms.append((dropped, 1.0))
                by_reader = refunded.get(min(readers, key=position.__getitem__))
                if by_reader is not None:
                    terms.append((by_reader, 1.0))
                rows.append(terms)
            if not rows or not all(rows):
                continue
            column = refunded[node.name] = self._column()
            for terms in rows:
                self._builder.row([(column, 1.0), *((other, -1.0) for other, _ in terms)], upper=0.0)
            if node.name in again:  # otherwise its repeats cost nothing here, either
                saved = self._column()
                self._builder.row([(saved, 1.0), (column, -1.0)], upper=0.0)
                until = self._bucket(latest[node.name])
                runs = [(self.runs[node.name, bucket], -1.0) for bucket in again[node.name] if bucket <= until]
                self._builder.row([(saved, 1.0), *runs], upper=0.0)
                self._refunds[self._bucket(position[node.name])].append((saved, self._seconds(node.name)))

    def _add_fetches(self) -> None:
        """What is fetched beside compute takes its share of the link, each time that it runs."""
        problem, graph = self._problem, self._problem.graph
        far_tier = problem.cost_model.far_tier
        for name in sorted(problem.beside):
            node = graph.by_name[name]
            if node.op != ir.FETCH or dict(node.attrs)["tier"] != far_tier:
                continue
            gigabytes = node.outputs[0].nbytes * _UNIT
            for (repeated, bucket), run in self.runs.items():
                if repeated == name:
                    self._due[bucket].append((run, gigabytes))
            bucket = self._bucket(graph.position[name])
            # Its memory is taken from where it stands, or earlier; it need not be there before its first reader.
            readers = graph.consumers.get(name, ())
            self._awaited[bucket : self._bucket(graph.position[readers[0]]) if readers else None] += gigabytes
            self._due[bucket].append((self._builder.column(lower=1.0), gigabytes))
            if name in self._superfluous:
                self._due[bucket].append((self._superfluous[name], -gigabytes))

    def _add_stores(self) -> None:
        """What is stored beside compute takes its share of the link, and stays on the device until it is gone."""
        problem, graph = self._problem, self._problem.graph
        results = {problem.root_of[reference] for reference in graph.outputs}
        claimed: set[str] = set()
        for name in sorted(problem.beside, key=graph.position.__getitem__):
            node, place = graph.by_name[name], graph.position[name]
            if node.op != ir.STORE or dict(node.attrs)["tier"] != problem.cost_model.far_tier:
                continue
            root = problem.root_of[node.inputs[0]]
            if problem.stays(root) or root in results:
                continue  # its bytes are on the device anyway
            last = problem.storages[problem.storage_of[root]].uses[-1]
            is_first = root not in claimed  # the same bytes are on the device once, however often they are stored
            claimed.add(root)
            one, gigabytes = self._builder.column(lower=1.0), graph.value(node.inputs[0]).nbytes * _UNIT
            self._born[self._bucket(place)].append((one, gigabytes))
            due = int(np.searchsorted(self.checks, last, side="right")) if is_first else len(self.checks)
            self._out[due].append((one, gigabytes))
            self._stored += gigabytes

    # --- memory and links ------------------------------------------------------------------------------------------

    def _add_flows(self) -> None:
        builder, link, count = self._builder, self._link, len(self.checks)
        needed = (self._problem.live[self.checks] - self._idle_small_bytes()[self.checks]) * _UNIT
        clock = self._problem.clock[[0, *(self.checks + 1), len(self._problem.order)]]
        beside = sum(map(self._spent, sorted(self._problem.beside)))
        horizon = _HORIZON * (float(clock[-1]) + beside or self._copying_seconds())
        repeated: list[list[tuple[int, float]]] = [[] for _ in range(count + 1)]
        for (node, bucket), run in self.runs.items():
            repeated[bucket].append((run, self._seconds(node)))
        total = sum(self._gigabytes(storage) for storage in (*self._of_storage, *self.kept)) + 1.0
        total += sum(max(0.0, gigabytes) for due in self._due for _, gigabytes in due)  # each time that one comes back
        total += self._stored
        out_speed, in_speed = link.out_bytes_per_second * _UNIT, link.in_bytes_per_second * _UNIT
        absent = born = must = out = due = back = None

        def running(before: int | None, changes: Sequence[tuple[int, float]], lower: float = 0.0) -> int:
            """A column that is the one before plus the changes."""
            column = builder.column(total, lower=lower)
            earlier = [] if before is None else [(before, -1.0)]
            builder.row([(column, 1.0), *earlier, *((c, -v) for c, v in changes)], lower=0.0, upper=0.0)
            return column

        def carried(before: int | None, speed: float, seconds: float, extra: int) -> int:
            """A column that has grown by what a link carries at most."""
            column = builder.column(total)
            earlier = [] if before is None else [(before, -1.0)]
            if np.isfinite(speed):
                builder.row([(column, 1.0), *earlier, (extra, -speed)], upper=speed * seconds)
            return column

        for bucket in range(count + 1):
            refunded = sum(seconds for _, seconds in self._refunds[bucket])
            extra = builder.column(horizon, lower=-refunded, cost=1.0)
            spent = [(c, -v) for c, v in repeated[bucket]] + self._refunds[bucket]
            absent = running(absent, self._absent[bucket], lower=-total)
            early: list[tuple[int, float]] = []  # bytes that are back before they are due, or have not left yet
            if link.overlaps:
                seconds = float(clock[bucket + 1] - clock[bucket])
                born, must = running(born, self._born[bucket]), running(must, self._out[bucket])
                out = carried(out, out_speed, seconds, extra)
                builder.row([(out, 1.0), (born, -1.0)], upper=0.0)
                # What is not copied out yet though its gap has begun; what is stored is when the step ends.
                leaving = builder.column(0.0 if bucket == count and self._stored else total)
                builder.row([(out, 1.0), (leaving, 1.0), (must, -1.0)], lower=0.0)
                due = running(due, self._due[bucket])
                back = carried(back, in_speed, seconds, extra)
                builder.row([(back, 1.0), (due, -1.0)], lower=-float(self._awaited[bucket]))
                early = [(back, -1.0), (due, 1.0), (leaving, -1.0)]
            elif not link.is_closed:
                spent += [(c, -v / out_speed) for c, v in self._born[bucket]]
                spent += [(c, -v / in_speed) for c, v in self._due[bucket]]
            builder.row([(extra, 1.0), *spent], lower=0.0)
            if bucket < count:
                node = self._problem.graph.nodes[self.checks[bucket]]
                superfluous = self._superfluous.get(node.name)
                elsewhere = [] if superfluous is None else [(superfluous, self._own_bytes(node) * _UNIT)]
                granted = [(column, nbytes * _UNIT) for column, nbytes in self._granted(int(self.checks[bucket]))]
                terms = [(absent, 1.0), *early, *elsewhere, *granted]
                builder.row(terms, lower=float(needed[bucket]), share=_UNIT)

    def _own_bytes(self, node: ir.Node) -> int:
        """What is not there when a node does not run where it stands: what it makes, and what it alone reads there."""
        problem = self._problem
        roots = {problem.root_of[reference] for reference in (*node.inputs, *node.refs())}
        moved = (problem.storages[problem.storage_of[root]] for root in roots if root in problem.storage_of)
        workspace = itertools.chain(*problem.cost_model.workspace(problem.graph, node))
        return sum(storage.nbytes for storage in moved) + sum(map(allocator.rounded, workspace))

    def _granted(self, position: int) -> list[tuple[int, float]]:
        """Columns and bytes of outputs that a plan writes over an input which others need later.

        Those get another copy of it, so it is absent after the position.
        """
        problem = self._problem
        node = problem.graph.nodes[position]
        results = {problem.root_of[reference] for reference in problem.graph.outputs}
        granted = []
        for index, nbytes in enumerate(liveness.output_bytes(node)):
            references = [node.inputs[slot] for slot in liveness.overwritten_by(problem.graph, node, index)]
            own = [reference for reference in references if node.inputs.count(reference) == 1]
            roots = dict.fromkeys(problem.root_of[reference] for reference in own)
            moved = [
                problem.storage_of[root]
                for root in roots
                if root in problem.storage_of
                and root not in results
                and problem.graph.by_name[ir.producer(root)].op not in ir.RESIDENT_OPS
            ]
            if moved and all(
                problem.storages[storage].is_held or problem.storages[storage].uses[-1] > position for storage in moved
            ):
                column = self._column()
                absent = [self._absent_after(storage, position) for storage in moved]
                if all(terms is not None for terms in absent):
                    terms = itertools.chain.from_iterable(terms for terms in absent if terms is not None)
                    self._builder.row([(column, 1.0), *((other, -1.0) for other in terms)], upper=0.0)
                granted.append((column, float(nbytes)))
        return granted

    def _absent_after(self, storage: int, position: int) -> list[int] | None:
        """Columns that say how much of a storage is absent right after a use; None if no column says it."""
        problem = self._problem
        if len(problem.graph.by_name[self._producer(storage)].outputs) > 1:
            return None  # repeated for the sake of another output, it makes this one, too
        gap = next((gap for gap in problem.by_storage.get(storage, ()) if problem.gaps[gap].start == position), None)
        if gap is None:
            return []
        if gap not in self.stretches or self.stretches[gap][0].first in self._needed.get(storage, ()):
            return None
        first = self.stretches[gap][0]
        return [column for column in (first.swapped, first.dropped) if column is not None]

    def _copying_seconds(self) -> float:
        """What a step without compute takes if everything is copied: of a length that the horizon can be made of."""
        if self._link.is_closed:
            return 0.0
        nbytes = sum(self._problem.storages[storage].nbytes for storage in self._of_storage)
        return self._link.out_seconds(nbytes) + self._link.in_seconds(nbytes)

    def _idle_small_bytes(self) -> np.ndarray:
        """Bytes at each position of storages that are too small to plan for, while nobody uses them."""
        change = np.zeros(len(self._problem.order) + 1)
        for storage in self._problem.storages:
            if not storage.is_held and storage.nbytes <= SMALL_BYTES:
                points = (storage.born, *storage.uses)
                for start, end in zip(points, points[1:], strict=False):
                    change[start + 1] += storage.nbytes
                    change[end] -= storage.nbytes
        return np.cumsum(change)[:-1]

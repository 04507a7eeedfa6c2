"""The common ground of the strategies: which buffers sit idle between uses, and plans that evict them.

A *gap* is the stretch between two consecutive uses of a storage. Evicting a storage over a gap frees
its bytes there; it comes back by a swap or by being recomputed, right before its next use or earlier if
another recompute needs it. Following every storage and every gap, not layers, covers skip connections.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from graphswap import allocator as allocator_lib
from graphswap import ir, liveness
from graphswap.cost_model import CostModel
from graphswap.incremental import Incremental, Outline
from graphswap.plan import Decision, Plan, Recompute, Swap
from graphswap.simulator import Timeline, simulate
from graphswap.strategies import order as order_lib
from graphswap.variables import SMALL_BYTES

AGAIN = "recompute again"
"""A way to evict: what comes back early, as another recompute needs it, goes again until it is due itself."""
SWAP_AGAIN = "swap again"
"""Likewise; the copy that is out there is brought back twice."""
SWAPS = frozenset({"swap", SWAP_AGAIN})
"""Ways to evict that need the link."""

_DEEPEST = 200
"""Nodes in a chain that is recomputed from one value: longer ones cost as much as a checkpoint would have saved."""
REUSE = 40
"""For how many positions a repeated value that nobody else needs is kept for the next recompute that reads it."""

_TINY = 0.01
"""Of what is recomputed: what is dead and no larger is kept for that, such as a layer's statistics."""
_SPARE = 100
_ROUNDING = 1e-9
_NEVER_REPEATED = frozenset({"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"})


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which a storage is idle.

    Attributes:
        storage: Index into `Gaps.storages`.
        start: Position of the use before (or of the birth).
        end: Position of the use after.
        nbytes: What evicting frees at the positions between.
    """

    storage: int
    start: int
    end: int
    nbytes: int


class Gaps:
    """One graph in one order, ready for planning.

    Attributes:
        graph: The graph, its nodes in `order`.
        order: Node names.
        beside: `FETCH`es and `STORE`s that may run beside compute.
        storages: All storages.
        gaps: All gaps worth a look.
        starts: Of the gaps, shape (gaps,).
        ends: Likewise.
        sizes: Bytes, likewise.
        live: Bytes in use at each position, resident ones included, when nothing is evicted.
        seconds: Seconds of each node, by position; none of what may arrive or leave beside compute.
        copies_beside: Whether anything may be copied beside compute.
    """

    def __init__(self, graph: ir.Graph, order: tuple[str, ...], cost_model: CostModel):
        self.cost_model = cost_model
        self.fingerprint = graph.fingerprint
        self.graph = graph.replace(nodes=tuple(graph.by_name[name] for name in order))
        self.order = order
        self.storages = liveness.storages(self.graph)
        self.root_of = liveness.roots(self.graph)
        self.storage_of = {storage.root: index for index, storage in enumerate(self.storages)}
        self.beside = frozenset(node.name for node in self.graph.nodes if cost_model.overlaps(node))
        self.copies_beside = bool(self.beside) or cost_model.link(cost_model.far_tier).overlaps
        self.seconds = np.array(
            [0.0 if node.name in self.beside else cost_model.seconds(self.graph, node) for node in self.graph.nodes]
        )
        self.clock = np.concatenate([[0.0], np.cumsum(self.seconds)])
        self.gaps = tuple(self._find_gaps())
        self.starts = np.array([gap.start for gap in self.gaps], int)
        self.ends = np.array([gap.end for gap in self.gaps], int)
        self.sizes = np.array([gap.nbytes for gap in self.gaps], float)
        self.by_storage: dict[int, list[int]] = {}
        for index, gap in enumerate(self.gaps):
            self.by_storage.setdefault(gap.storage, []).append(index)
        self._incremental = Incremental(self.graph, cost_model)
        self._repeatable: dict[int, bool] = {}
        self.live = self.outline(()).live

    def _find_gaps(self):
        for index, storage in enumerate(self.storages):
            if self.stays(storage.root) or not self._can_move(storage):
                continue
            points = (storage.born, *storage.uses)
            for start, end in zip(points, points[1:], strict=False):
                if end - start > 2:
                    yield Gap(index, start, end, storage.nbytes)

    def _can_move(self, storage: liveness.Storage) -> bool:
        """Whether all that names the buffer can be made anew from it alone.

        A list of its rows can't, nor can an IdentityN that reads more than this storage, nor what is being exchanged.
        """
        if self.graph.by_name[ir.producer(storage.root)].op == ir.EXCHANGE:
            return False
        makers = [self.graph.by_name[ir.producer(value)] for value in storage.values[1:]]
        roots = {self.root_of[reference] for node in makers for reference in node.inputs}
        return all(root == storage.root or self.stays(root) for root in roots) and all(
            self.graph.value(value).dtype in ir.ITEM_BYTES for value in storage.values
        )

    def stays(self, root: str) -> bool:
        """Whether a storage is on the device all the time, or takes no bytes there."""
        index = self.storage_of.get(root)
        return index is None or self.storages[index].is_held or self.storages[index].nbytes <= SMALL_BYTES

    # --- recompute ---------------------------------------------------------------------------------------------

    def can_repeat(self, node: ir.Node) -> bool:
        """Whether running the node again gives the same values and changes nothing."""
        if node.stateful or node.op in _NEVER_REPEATED or node.op in ir.RESIDENT_OPS:
            return False
        return all(value.dtype in ir.ITEM_BYTES for value in node.outputs)

    def is_repeatable(self, gap: int) -> bool:
        """Whether the gap's storage can be recomputed while nothing else is evicted."""
        if gap not in self._repeatable:
            self._repeatable[gap] = bool(np.isfinite(self.recompute_seconds(gap, {}, ())))
        return self._repeatable[gap]

    @functools.cached_property
    def long_gap(self) -> dict[int, int]:
        """Storage to its longest gap: what lies before is its time in the forward pass."""
        return {
            storage: max(gaps, key=lambda g: self.gaps[g].end - self.gaps[g].start)
            for storage, gaps in self.by_storage.items()
        }

    @functools.cached_property
    def saved(self) -> dict[int, int]:
        """The storages that wait for the backward pass, each with its gap over the moment of the peak."""
        turn = int(np.argmax(self.live))
        return {gap.storage: index for index, gap in enumerate(self.gaps) if gap.start <= turn < gap.end}

    def anchors(self, segments: int) -> frozenset[int]:
        """Storages to keep so that what is recomputed falls into about `segments` parts of equal bytes.

        At a segment's border the storages that are still to be used by the forward pass are anchors. The
        border is put where their bytes are fewest.
        """
        alive, total, _ = self._forward
        if not total[-1] or segments < 2:
            return frozenset()
        turn = int(np.argmax(self.live))
        borders = []
        width = total[-1] / segments
        for number in range(1, segments):
            low, high = np.searchsorted(total, [(number - 0.5) * width, (number + 0.5) * width])
            high = min(int(high), turn)
            if low < high:
                borders.append(int(low) + int(np.argmin(alive[low:high])))
        return self._kept_at(borders)

    def checkpoints(self, segments: int) -> frozenset[int]:
        """Storages to keep so that no part of what is recomputed has more than a `segments`-th of all bytes.

        Only a single storage may have more. As `anchors`, but border by border: the next one is put where the fewest
        bytes are kept once half of a part's bytes have been made.
        """
        alive, total, _ = self._forward
        if not total[-1] or segments < 2:
            return frozenset()
        turn = int(np.argmax(self.live))
        borders = []
        border, width = 0, total[-1] / segments
        made = 0.0
        while border < turn:
            low, high = np.searchsorted(total, [made + width / 2, made + width], side="right")
            if high >= turn:
                break
            low = max(int(low), border + 1)
            part = alive[low : max(int(high), low + 1)]
            border = low + len(part) - 1 - int(np.argmin(part[::-1]))  # the last one of the best
            made = float(total[border])
            borders.append(border)
        return self._kept_at(borders)

    @functools.cached_property
    def _forward(self) -> tuple[np.ndarray, np.ndarray, Mapping[int, int]]:
        """Of the forward pass: bytes alive after each position, those saved so far, and the last use of each storage.

        The forward pass of a storage ends where its longest gap starts, so no names are needed to tell the passes
        apart.
        """
        length = len(self.order)
        alive = np.zeros(length + 1)
        saved = np.zeros(length)
        last_early: dict[int, int] = {}
        turn = int(np.argmax(self.live))
        for index, storage in enumerate(self.storages):
            if self.stays(storage.root) or storage.born > turn:
                continue
            long = self.long_gap.get(index)
            gap = self.gaps[long] if long is not None else None
            if gap is not None and gap.start <= turn < gap.end:
                saved[storage.born] += storage.nbytes
                last = gap.start
            else:
                last = max((use for use in storage.uses if use <= turn), default=storage.born)
            last_early[index] = last
            alive[storage.born] += storage.nbytes
            alive[last] -= storage.nbytes
        return np.cumsum(alive)[:length], np.cumsum(saved), last_early

    def _kept_at(self, borders: Sequence[int]) -> frozenset[int]:
        return frozenset(
            index
            for index, last in self._forward[2].items()
            for border in borders
            if self.storages[index].born <= border < last
        )

    # --- plans -------------------------------------------------------------------------------------------------

    def decide(
        self,
        evicted: Mapping[int, str],
        anchors: Collection[int] = (),
        reuse: int = REUSE,
        since: Mapping[int, int] | None = None,
    ) -> tuple[Decision, ...]:
        """Turns evictions into decisions. Every swap takes as little memory as it can; `timing` gives it time.

        Args:
            evicted: Gap to "swap", `SWAP_AGAIN`, "recompute" or `AGAIN`.
            anchors: Storages that recomputing may rely on even after their last use.
            reuse: For how many positions a repeated value that nobody else needs is kept for the next
                recompute that reads it.
            since: Gap to the position after which it is evicted, where that is not the gap's start.

        Raises:
            CantRecompute: If a gap says "recompute" and the value depends on something that can't be repeated.
        """
        return _Restorer(self, evicted, anchors, reuse, since or {}).decisions()

    def recompute_seconds(
        self, gap: int, evicted: Mapping[int, str], anchors: Collection[int], most: float = float("inf")
    ) -> float:
        """Seconds to recompute the gap's storage at its end while `evicted` is evicted.

        Infinite if it can't be, and if it takes more than `most` seconds: then its chain is not followed to the end.
        """
        restorer = _Restorer(self, {**evicted, gap: "recompute"}, anchors, 0, most=most)
        try:
            nodes = restorer.closure(self.gaps[gap])
        except CantRecompute:
            return float("inf")
        position = self.graph.position
        return float(sum(self.seconds[position[name]] for name in nodes))

    def swap_seconds(self, gap: int) -> float:
        """Seconds that swapping by itself adds to the step: the copies, less what hides behind the gap's compute."""
        item, link = self.gaps[gap], self.cost_model.link(self.cost_model.far_tier)
        copies = link.out_seconds(item.nbytes) + link.in_seconds(item.nbytes)
        if not link.overlaps:
            return copies
        return max(0.0, copies - float(self.clock[item.end] - self.clock[item.start + 1]))

    def plan(self, decisions: tuple[Decision, ...], strategy: str, memory_budget: int) -> Plan:
        return Plan(
            order=self.order,
            decisions=decisions,
            strategy=strategy,
            memory_budget=memory_budget,
            fingerprint=self.fingerprint,
        )

    def outline(self, decisions: Sequence[Decision]) -> Outline:
        """Bytes and seconds of the step under these decisions, by the sum of its buffers."""
        return self._incremental.outline(decisions)

    def place(self, decisions: tuple[Decision, ...], memory_budget: int) -> Timeline:
        """The worst of `placements`."""
        runs = placements(self.graph, Plan(decisions=decisions), self.cost_model, memory_budget)
        return max(itertools.chain(*runs), key=lambda timeline: timeline.allocated_peak_bytes)


def placements(graph: ir.Graph, plan: Plan, cost_model: CostModel, memory_budget: int) -> list[list[Timeline]]:
    """Simulates with the device's allocator, and once more with a little less memory; without where none limits it.

    A layout that fits only just may not fit where a small buffer lies elsewhere, as in the first step. Which
    node of a pair asks for memory first is open: tried are the first ones, the second ones, and every other one.

    Returns:
        For each size of memory the timelines of these ways to ask.

    Raises:
        simulator.NoRoom: If it runs out of memory.
    """
    device = cost_model.device
    seconds = [pair.second for pair in plan.pairs]
    second_firsts = [set(), set(seconds), set(seconds[::2])] if seconds else [set()]
    if device.memory_bytes is None:
        return [[simulate(graph, plan, cost_model, second_first=second_first) for second_first in second_firsts]]
    limit = max(memory_budget, device.memory_bytes)
    return [
        [
            simulate(
                graph,
                plan,
                cost_model,
                allocator=allocator_lib.Allocator(limit - spare, device.reserves_memory),
                second_first=second_first,
            )
            for second_first in second_firsts
        ]
        for spare in (0, device.memory_bytes // _SPARE)
    ]


@functools.lru_cache(maxsize=4)
def problem(graph: ir.Graph, cost_model: CostModel) -> Gaps:
    """The graph's gaps in the order that the strategies plan for."""
    return Gaps(graph, order_lib.depth_first(graph), cost_model)


class CantRecompute(Exception):
    """A value depends on something that can't be repeated; the text says on what."""


class _Restorer:
    """Walks through the step and brings every evicted storage back when it is due or needed earlier."""

    def __init__(
        self,
        gaps: Gaps,
        evicted: Mapping[int, str],
        anchors: Collection[int],
        reuse: int,
        since: Mapping[int, int] = {},  # noqa: B006 (never changed)
        most: float = float("inf"),
    ):
        self.gaps = gaps
        self.graph = gaps.graph
        self.evicted = evicted
        self.anchors = anchors
        self.reuse = reuse
        self.since = since
        self.seconds_left = most * (1.0 + _ROUNDING)
        self.tier = gaps.cost_model.far_tier
        self.absent: dict[int, int] = {}  # storage -> gap
        self.kept_until: dict[int, int] = {}  # storage of what is there early -> last position that reads it
        self.restored: set[int] = set()
        self.swapped_back: set[int] = set()  # gaps whose value was there early
        self.depth = 0  # of the chain that is followed
        self.tiny_bytes = 0.0
        self.found: list[Decision] = []

    def decisions(self) -> tuple[Decision, ...]:
        events = []
        for gap in self.evicted:
            item = self.gaps.gaps[gap]
            events.append((self.since.get(gap, item.start), 1, gap))
            events.append((item.end, 0, gap))
        for position, is_start, gap in sorted(events):
            storage = self.gaps.gaps[gap].storage
            if is_start:
                self.absent[storage] = gap
            elif self.absent.get(storage) == gap:
                if self._is_kept(storage, position):
                    del self.absent[storage]
                    continue
                nodes = self._restore(storage, position)
                if nodes:
                    self.found.append(Recompute(tuple(nodes), self.gaps.order[position]))
        return tuple(self.found)

    def closure(self, gap: Gap) -> list[str]:
        """Nodes to repeat for one gap, everything evicted so far at its end being absent."""
        for index, action in self.evicted.items():
            other = self.gaps.gaps[index]
            if other.start < gap.end <= other.end and action:
                self.absent[other.storage] = index
        return self._restore(gap.storage, gap.end)

    def _restore(self, storage: int, position: int) -> list[str]:
        """Decides how the storage comes back before `position`; returns the nodes to repeat, in order."""
        nodes: list[str] = []
        self.tiny_bytes = _TINY * self.gaps.storages[storage].nbytes
        self._bring_back(storage, position, nodes, set())
        graph_position = self.graph.position
        return sorted(dict.fromkeys(nodes), key=graph_position.__getitem__)

    def _bring_back(self, storage: int, position: int, nodes: list[str], visiting: set[str]) -> None:
        gap = self.absent.pop(storage, None)
        self.restored.add(storage)
        details = self.gaps.storages[storage]
        if gap is not None and self.evicted[gap] in SWAPS:
            self._swap(gap, position)
            if self.evicted[gap] == SWAP_AGAIN and position < self.gaps.gaps[gap].end:
                self.kept_until[storage] = position
                self.swapped_back.add(gap)
                self.absent[storage] = gap
            wanted = details.values[1:]
        else:
            wanted = details.values
            self._repeat(ir.producer(details.root), position, nodes, visiting)
            if gap is None:
                self.kept_until[storage] = position
            elif self.evicted[gap] == AGAIN and position < self.gaps.gaps[gap].end:
                self.kept_until[storage] = position
                self.absent[storage] = gap
        for value in wanted:
            if value != details.root and self._is_read_across(value, position):
                self._repeat(ir.producer(value), position, nodes, visiting)

    def _repeat(self, name: str, position: int, nodes: list[str], visiting: set[str]) -> None:
        if name in visiting:
            return
        visiting.add(name)
        node = self.graph.by_name[name]
        if not self.gaps.can_repeat(node):
            raise CantRecompute(f"'{name}' ({node.op}) can't be repeated")
        stored = self.graph.stores.get(node.inputs[0]) if node.op in (ir.FETCH, ir.VIEW) else None
        if stored and self.graph.position[stored] < position:
            raise CantRecompute(f"'{stored}' has changed what '{name}' fetches")
        self.seconds_left -= self.gaps.seconds[self.graph.position[name]]
        if self.seconds_left < 0.0:
            raise CantRecompute(f"with '{name}' it takes longer than it may")
        if self.depth == _DEEPEST:
            raise CantRecompute(f"'{name}' ({node.op}) is the end of a chain of more than {_DEEPEST} nodes")
        self.depth += 1
        for reference in node.inputs:
            self._need(reference, position, nodes, visiting)
        self.depth -= 1
        nodes.append(name)

    def _need(self, reference: str, position: int, nodes: list[str], visiting: set[str]) -> None:
        """Makes the value readable right before `position`."""
        root = self.gaps.root_of[reference]
        if self.gaps.stays(root):
            return
        storage = self.gaps.storage_of[root]
        details = self.gaps.storages[storage]
        if self._is_kept(storage, position):
            self.kept_until[storage] = position
        else:
            is_dead = details.uses[-1:] < (position,) and details.nbytes > self.tiny_bytes
            if storage in self.absent or (is_dead and storage not in self.anchors):
                self._bring_back(storage, position, nodes, visiting)
        # An alias that was made before its storage went away still names the first buffer.
        if reference != root and storage in self.restored:
            self._repeat(ir.producer(reference), position, nodes, visiting)

    def _is_kept(self, storage: int, position: int) -> bool:
        """Whether it was repeated for somebody else not long ago."""
        return position - self.kept_until.get(storage, -self.reuse - 1) <= self.reuse

    def _is_read_across(self, value: str, position: int) -> bool:
        """Whether the value is made before the position and read at or after it."""
        places = self.graph.position
        return places[ir.producer(value)] < position and any(
            places[consumer] >= position for consumer in self.graph.consumers.get(value, ())
        )

    def _swap(self, gap: int, position: int) -> None:
        item, order = self.gaps.gaps[gap], self.gaps.order
        left = self.kept_until[item.storage] if gap in self.swapped_back else self.since.get(gap, item.start)
        freed = left + 1
        if position <= freed:  # needed as soon as it would be gone
            return
        self.found.append(
            Swap(
                value=self.gaps.storages[item.storage].root,
                out_after=order[left if gap in self.swapped_back else self._first_copied(gap)],
                freed_before=order[freed],
                in_after=order[position - 1],
                in_before=order[position],
                tier=self.tier,
                is_synchronous=not self.gaps.cost_model.link(self.tier).overlaps,
            )
        )

    def _first_copied(self, gap: int) -> int:
        """After which position the copy off the device may start: beside the uses before the gap.

        Not where the last of them would write over the value if the copy happened to be complete; nor where the value
        may have been made anew since, or is out there already.
        """
        item, graph = self.gaps.gaps[gap], self.graph
        details = self.gaps.storages[item.storage]
        maker, last = graph.by_name[ir.producer(details.root)], graph.nodes[item.start]
        slots = (slot for index in range(len(last.outputs)) for slot in liveness.overwritten_by(graph, last, index))
        if (
            not self.gaps.cost_model.link(self.tier).overlaps
            or len(maker.outputs) > 1  # repeated for the sake of another output
            or any(
                self.gaps.gaps[g].start < item.start for g in self.gaps.by_storage[item.storage] if g in self.evicted
            )
            or any(self.gaps.root_of[last.inputs[slot]] == details.root for slot in slots)
        ):
            return item.start
        return details.born

"""The memory bound: what is on the device while a node runs, whatever the plan. Checkable by hand, without a solver.

While a node runs, its inputs, its outputs and its workspace are on the device, beside all that can't leave. The
largest sum over all nodes bounds the peak of every plan of a class: plans in one order that repeat only certain nodes
and evict certain storages over certain stretches between two uses. There they swap, or repeat the one node that makes
the storage; a node that makes several values may be repeated anywhere for the sake of one. Buffers are counted as
`simulator` counts them.

A node that may be repeated may also run late: where nobody reads its first values, only its repetition runs. Then the
least that stays at any moment up to its first reader counts. An op that works in place is granted its output for
nothing as soon as some plan could leave it alone with its input.

Known weaknesses: what a repeated node finds beside itself, such as the rest of its chain, is not counted, nor are the
pieces in which large values come back.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from graphswap import allocator, ir, liveness
from graphswap.cost_model import CostModel

Stretches = Sequence[tuple[int, int]]
"""Pairs of positions."""


class LeastPeak(NamedTuple):
    """A bound on peaks.

    Attributes:
        nbytes: No plan of the class has a peak below.
        node: Name of the node that needs them; "" if nothing runs.
    """

    nbytes: int
    node: str


def least_peak(
    graph: ir.Graph,
    cost_model: CostModel,
    repeatable: Collection[str],
    evictable: Mapping[str, Stretches],
) -> LeastPeak:
    """Bounds the peak of every plan of a class.

    Args:
        graph: The user's graph, its nodes in the order of the plans.
        cost_model: Its workspace and resident bytes count.
        repeatable: Names of the nodes that a plan of the class may repeat.
        evictable: Root of each storage that such a plan may evict, to the pairs of consecutive uses between which
            it does.
    """
    return _Floor(graph, cost_model, repeatable, evictable).least_peak()


class _Floor:
    """What is certain at each position.

    Attributes:
        stays: Root of a storage to the stretches in which it is on the device.
        bytes_staying: The sum of their bytes at each position.
    """

    def __init__(
        self,
        graph: ir.Graph,
        cost_model: CostModel,
        repeatable: Collection[str],
        evictable: Mapping[str, Stretches],
    ):
        self.graph = graph
        self.cost_model = cost_model
        self.repeatable = frozenset(repeatable)
        self.evictable = evictable
        self.root_of = liveness.roots(graph)
        self.storage_of = {storage.root: storage for storage in liveness.storages(graph)}
        self.results = {self.root_of[reference] for reference in graph.outputs}
        producers = {ir.producer(reference) for reference in graph.outputs} | liveness.waited_for(graph)
        self.fixed = {node.name for node in graph.nodes} - (self.repeatable - producers)
        self.first_update: dict[str, int] = {}  # of each variable
        for position, node in enumerate(graph.nodes):
            if node.op in liveness.ASSIGNS or node.op in liveness.UPDATES:
                self.first_update.setdefault(self.root_of[node.inputs[0]], position)
        self.stays = self._stays()
        change = np.zeros(len(graph.nodes) + 1, dtype=np.int64)
        for root, stretches in self.stays.items():
            for first, last in stretches:
                change[first] += self.storage_of[root].nbytes
                change[last + 1] -= self.storage_of[root].nbytes
        self.bytes_staying = np.cumsum(change)[:-1] + cost_model.resident_bytes

    def least_peak(self) -> LeastPeak:
        latest = self._latest()
        least = np.zeros(
            len(self.graph.nodes), dtype=np.int64
        )  # bytes staying from a node's position to its latest one
        found = LeastPeak(int(self.bytes_staying.max(initial=self.cost_model.resident_bytes)), "")
        for position in reversed(range(len(self.graph.nodes))):
            node = self.graph.nodes[position]
            if node.name not in latest:  # nothing that must run needs it
                continue
            last, before = latest[node.name]
            least[position] = self.bytes_staying[position : before + 1].min()
            if before > position:
                least[position] = min(least[position], least[before])
            nbytes = int(least[position]) + self._own_bytes(node, position, last)
            if nbytes >= found.nbytes:
                found = LeastPeak(nbytes, node.name)
        return found

    def _latest(self) -> Mapping[str, tuple[int, int]]:
        """Of each node that must run, the position before which it runs at the latest.

        Beside it the position of the reader that says so, or its own.
        """
        found: dict[str, tuple[int, int]] = {}
        position = self.graph.position
        for node in reversed(self.graph.nodes):
            readers = {name for reference in node.refs() for name in self.graph.consumers.get(reference, ())}
            places = [(found[name][0], position[name]) for name in readers if name in found]
            if node.name in self.fixed:
                found[node.name] = (position[node.name], position[node.name])
            elif places:
                found[node.name] = min(places)
        return found

    # --- what stays --------------------------------------------------------------------------------------------

    def _stays(self) -> Mapping[str, Stretches]:
        found = collections.defaultdict[str, list[tuple[int, int]]](list)
        end, position = len(self.graph.nodes) - 1, self.graph.position
        for storage in self.storage_of.values():
            if self._is_resident(storage.root):
                if not self._is_variable(storage.root):
                    found[storage.root].append((0, end))
            else:
                found[storage.root] += self._between_uses(storage)
        for reference in self.graph.outputs:
            root = self.root_of[reference]
            if root in self.storage_of and not self._is_resident(root):
                found[root].append((position[ir.producer(reference)] + 1, end))
        for variable, buffers in self._buffers_of_variables().items():
            for (root, start), (_, after) in itertools.pairwise([*buffers, ("", end + 1)]):
                if root == variable or not self._is_resident(root):  # what is resident in its own right counts already
                    found[root].append((start, after - 1))
        return {root: _merged(stretches) for root, stretches in found.items()}

    def _between_uses(self, storage: liveness.Storage) -> Stretches:
        """Where a storage is certain to be on the device while others run."""
        if self._has_one_copy(storage.root):
            return [(storage.born + 1, max((storage.born, *storage.uses)))]
        pairs = itertools.pairwise((storage.born, *storage.uses))
        return [(start + 1, use) for start, use in pairs if self._is_kept(storage.root, start, use)]

    def _has_one_copy(self, root: str) -> bool:
        return ir.producer(root) not in self.repeatable and root not in self.evictable

    def _is_kept(self, root: str, start: int, use: int) -> bool:
        """Whether the copy that is there after one use is the one that the next use reads."""
        producer = self.graph.by_name[ir.producer(root)]
        is_made_elsewhere = producer.name in self.repeatable and len(producer.outputs) > 1
        can_wait = self.graph.nodes[use].name not in self.fixed
        return not (is_made_elsewhere or can_wait or (start, use) in self.evictable.get(root, ()))

    def _buffers_of_variables(self) -> Mapping[str, Sequence[tuple[str, int]]]:
        """Of each variable the storages whose buffer it has in turn, and since which position."""
        found = {root: [(root, 0)] for root in self.storage_of if self._is_variable(root)}
        for position, node in enumerate(self.graph.nodes):
            if node.op in liveness.ASSIGNS and self.root_of[node.inputs[0]] in found:
                value = self.root_of[node.inputs[1]]
                if value in self.storage_of:
                    found[self.root_of[node.inputs[0]]].append((value, position + 1))
        return found

    def _is_resident(self, root: str) -> bool:
        return self.graph.by_name[ir.producer(root)].op in ir.RESIDENT_OPS

    def _is_variable(self, root: str) -> bool:
        return self._is_resident(root) and self.graph.value(root).dtype == "resource"

    # --- what a node needs -------------------------------------------------------------------------------------

    def _own_bytes(self, node: ir.Node, position: int, latest: int) -> int:
        """Bytes of inputs, outputs and workspace that are not counted among what stays."""
        if node.op in ir.RESIDENT_OPS:
            return 0
        total = 0
        for root in {self.root_of[reference] for reference in node.inputs}:
            counted = any(first <= latest and position <= last for first, last in self.stays.get(root, ()))
            if root in self.storage_of and not self._is_resident(root) and not counted:
                total += self.storage_of[root].nbytes
        for index, nbytes in enumerate(liveness.output_bytes(node)):
            if liveness.alias_of(node, index) is None and not self._may_overwrite(node, index, position, latest):
                total += nbytes
        return total + sum(
            sum(map(allocator.rounded, buffers)) for buffers in self.cost_model.workspace(self.graph, node)
        )

    def _may_overwrite(self, node: ir.Node, index: int, position: int, latest: int) -> bool:
        """Whether some plan lets the node write an output over an input."""
        for slot in liveness.overwritten_by(self.graph, node, index):
            reference = node.inputs[slot]
            if node.inputs.count(reference) == 1 and not self._is_needed_beside(
                self.root_of[reference], position, latest
            ):
                return True
        return False

    def _is_needed_beside(self, root: str, position: int, latest: int) -> bool:
        """Whether a buffer that the node reads is needed by others, too, whatever the plan."""
        if self._is_variable(root):
            return self.first_update.get(root, latest) >= latest
        if self._is_resident(root):
            return True
        later = [use for use in self.storage_of[root].uses if use > position] if root in self.storage_of else []
        if self._has_one_copy(root) and root in self.results:
            return True
        if latest > position or not later:
            return False
        return self._has_one_copy(root) or self._is_kept(root, position, later[0])


def _merged(stretches: Stretches) -> Stretches:
    """The same positions as disjoint stretches."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(stretches):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        elif first <= last:
            merged.append((first, last))
    return merged

"""Topological orders that keep the peak low. The order matters as much as what is swapped or recomputed."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from graphswap import ir, liveness

_URGENT = -(1 << 60)
_AT_ONCE = frozenset({"Shape", "ShapeN", "Size", "Rank"}) | ir.RESIDENT_OPS
"""Ops that only let go of what they read."""
_LARGEST = 200
"""Nodes of a branch that are looked at."""


def traced(graph: ir.Graph) -> tuple[str, ...]:
    """The order of the trace."""
    return tuple(graph.position)


def breadth_first(graph: ir.Graph) -> tuple[str, ...]:
    """Memory-greedy list scheduling; ties keep the order of the trace."""
    return _late(graph, _list_schedule(graph, depth_first=False))


def depth_first(graph: ir.Graph) -> tuple[str, ...]:
    """Memory-greedy list scheduling; ties go on where the last node left off, so branches run one by one."""
    return _late(graph, _list_schedule(graph, depth_first=True))


def _list_schedule(graph: ir.Graph, depth_first: bool) -> list[str]:
    """Of the nodes that could run, runs first the one that frees the most beyond what it allocates.

    A node whose results only feed updates of variables runs at once, of several the one that feeds fewest, and the
    update as soon as nobody reads the old value any more; so no gradient outlives its layer. O((n + e) log n).

    Known weakness: apart from that it never looks further than one node ahead.
    """
    nodes = graph.nodes
    root_of = liveness.roots(graph)
    position = graph.position
    sizes = _sizes(graph)
    results = {root_of[reference] for reference in graph.outputs}
    readers: dict[str, set[int]] = {}  # storage -> nodes that have still to read it
    followers: list[list[int]] = [[] for _ in nodes]
    waiting = [0] * len(nodes)
    for index, node in enumerate(nodes):
        for reference in set(node.inputs):
            readers.setdefault(root_of[reference], set()).add(index)
        before = {position[ir.producer(r)] for r in node.inputs} | {position[name] for name in node.control_inputs}
        waiting[index] = len(before)
        for predecessor in before:
            followers[predecessor].append(index)
    urgent = {**_only_for_updates(graph), **dict.fromkeys(_exchanging(graph), 0)}
    old_readers, delayed = _old_readers(graph)

    def growth(index: int) -> int:
        node = nodes[index]
        total = 0
        for output, reference in enumerate(node.refs()):
            if liveness.alias_of(node, output) is None:
                total += sizes[reference]
        for root in {root_of[reference] for reference in node.inputs}:
            if len(readers[root]) == 1 and root not in results:
                total -= sizes.get(root, 0)
        return total

    def priority(index: int) -> int:
        node = nodes[index]
        if node.op in liveness.ASSIGNS or node.op in liveness.UPDATES:
            return -_URGENT if old_readers[index] else 2 * _URGENT
        if node.op in (ir.STORE, ir.UPDATE):
            return 2 * _URGENT
        if node.op in _AT_ONCE or not any(sizes[r] for r in node.refs()):
            return _URGENT
        if node.name in urgent:
            return _URGENT + urgent[node.name]
        return min(growth(index), 0)

    ready: list[tuple[int, int, int]] = []
    order: list[str] = []

    def offer(index: int) -> None:
        tie = -len(order) if depth_first else 0
        heapq.heappush(ready, (priority(index), tie, index))

    for index in range(len(nodes)):
        if not waiting[index]:
            offer(index)
    done = [False] * len(nodes)
    while ready:
        _, _, index = heapq.heappop(ready)
        if done[index]:
            continue
        done[index] = True
        order.append(nodes[index].name)
        for root in {root_of[reference] for reference in nodes[index].inputs}:
            left = readers[root]
            left.discard(index)
            if len(left) == 1:
                (last,) = left
                if not waiting[last] and not done[last]:
                    offer(last)
        for update in delayed.get(index, ()):
            old_readers[update].discard(index)
            if not (old_readers[update] or waiting[update] or done[update]):
                offer(update)
        for follower in followers[index]:
            waiting[follower] -= 1
            if not waiting[follower]:
                offer(follower)
    return order


def _late(graph: ir.Graph, order: list[str]) -> tuple[str, ...]:
    """Moves what makes more bytes than it frees right before the first node that needs it.

    The scaled momentum of every variable could be there before the first layer runs, and so could what the
    backward pass computes of the forward pass's results alone. What reads a variable stays before its update. What
    alone keeps its inputs there, and makes no more than they are, does not wait: as the last slice of the gradient of a
    concatenation. Of several such branches that a node waits for, as the terms of a layer's gradient, `_Branches`
    says which runs first.
    """
    root_of = liveness.roots(graph)
    place = {name: place for place, name in enumerate(order)}
    last_use = {root_of[reference]: name for name in order for reference in graph.by_name[name].inputs}
    sizes = _sizes(graph)
    exchanging = _exchanging(graph)
    can_wait: dict[str, int] = {}  # node -> bytes that it makes
    fixed: set[str] = set()  # made of variables and constants alone
    before: dict[str, list[str]] = {}
    for name in order:
        node = graph.by_name[name]
        producers = [ir.producer(reference) for reference in node.inputs]
        before[name] = [*producers, *node.control_inputs]
        is_data = node.op == "Placeholder" and any(value.nbytes for value in node.outputs)
        if not is_data and fixed.issuperset(producers) and (not node.stateful or node.op == "ReadVariableOp"):
            fixed.add(name)
        if node.stateful or node.op in ir.RESIDENT_OPS or node.op == "ReadVariableOp" or name in exchanging:
            continue
        roots = {root_of[reference] for reference in node.inputs}
        freed = sum(sizes[r] for r in roots if last_use[r] == name and ir.producer(r) not in can_wait)
        made = sum(sizes[r] for index, r in enumerate(node.refs()) if liveness.alias_of(node, index) is None)
        if made > freed or not made:
            can_wait[name] = made
    readers_before = _readers_before(graph)
    begun: set[str] = set()
    done: set[str] = set()
    late: list[str] = []
    branches = _Branches(graph, place, before, done)

    def finish(name: str) -> None:
        """Gives a node its place, and after it what waits though it would free more than it makes."""
        found = [name]
        while found:
            late.append(name := found.pop())
            for other in branches.finish(name):
                is_ready = other not in done and done.issuperset((*before[other], *readers_before.get(other, ())))
                if other in can_wait and other not in found and is_ready and branches.freed(other) >= can_wait[other]:
                    found.append(other)

    for root in [name for name in order if name not in can_wait] + order:
        pending = [root]
        while pending:
            name = pending[-1]
            # A reader of the old value may itself need the update: then it can't come before it.
            readers = [other for other in readers_before.get(name, ()) if other not in begun]
            missing = [other for other in dict.fromkeys((*before[name], *readers)) if other not in done]
            begun.add(name)
            if name in done or not missing:
                pending.pop()
                if name not in done:
                    finish(name)
            else:
                # What is made of variables alone comes last, right before its reader.
                if len(missing) > 1:
                    turns = {other: (other in fixed, *branches.turn(other), place[other]) for other in missing}
                    missing.sort(key=turns.__getitem__, reverse=True)
                pending += missing
    return tuple(late)


class _Branches:
    """What must still run before a node can, as the order is made.

    Args:
        graph: The graph.
        place: Of each node in an order that would do.
        before: The nodes that each waits for.
        done: Those that have their place.
    """

    def __init__(self, graph: ir.Graph, place: Mapping[str, int], before: Mapping[str, Sequence[str]], done: set[str]):
        self._graph = graph
        self._place = place
        self._before = before
        self._done = done
        self._root_of = liveness.roots(graph)
        self._sizes = _sizes(graph)
        self._readers = collections.Counter(root for node in graph.nodes for root in self._read(node))
        self._readers.update(self._root_of[reference] for reference in graph.outputs)
        self._left: dict[str, set[str]] = {}  # storage -> nodes that have still to read it
        for node in graph.nodes:
            for root in self._read(node):
                if self._sizes[root]:
                    self._left.setdefault(root, set()).add(node.name)

    def finish(self, name: str) -> list[str]:
        """Takes note that a node has its place; returns others that alone have still to read what it reads."""
        self._done.add(name)
        read = self._read(self._graph.by_name[name])
        self._readers.subtract(read)
        alone: set[str] = set()
        for root in read & self._left.keys():
            self._left[root].discard(name)
            if self._readers[root] == 1:
                alone |= self._left[root]
        return sorted(alone, key=self._place.__getitem__)

    def freed(self, name: str) -> int:
        """Bytes that a node would free if it ran now."""
        return sum(self._sizes[root] for root in self._read(self._graph.by_name[name]) if self._readers[root] == 1)

    def turn(self, name: str) -> tuple[bool, int]:
        """When a branch should run, of several that the same node waits for: the least comes first.

        First those that leave no more than they free, the lowest peak first; then what has most on the way beyond what
        it leaves (Liu, "An application of generalized tree pebbling to sparse matrix factorization", SIAM Journal on
        Algebraic and Discrete Methods 1987).

        Known weakness: branches run one after the other; parts of them are not interleaved.
        """
        branch = {name}
        pending = [name]
        while pending and len(branch) <= _LARGEST:
            found = [other for other in self._before[pending.pop()] if other not in self._done and other not in branch]
            branch.update(found[:_LARGEST])
            pending += found[:_LARGEST]
        level = peak = 0
        read = collections.Counter[str]()
        for other in sorted(branch, key=self._place.__getitem__):
            node = self._graph.by_name[other]
            roots = self._read(node)
            read.update(roots)
            freed = sum(
                self._sizes[root]
                for root in roots
                if read[root] == self._readers[root]
                and (ir.producer(root) in branch or ir.producer(root) in self._done)
            )
            made = in_place = 0
            for index, reference in enumerate(node.refs()):
                if liveness.alias_of(node, index) is None:
                    made += self._sizes[reference]
                    in_place += self._sizes[reference] if liveness.overwritten_by(self._graph, node, index) else 0
            peak = max(peak, level + made - min(freed, in_place))
            level += made - freed
        return (False, peak) if level <= 0 else (True, level - peak)

    def _read(self, node: ir.Node) -> set[str]:
        return {self._root_of[reference] for reference in node.inputs}


def _readers_before(graph: ir.Graph) -> dict[str, list[str]]:
    """For every update the nodes that read the variable's value from before it."""
    readers, _ = _old_readers(graph)
    nodes = graph.nodes
    return {nodes[update].name: [nodes[reader].name for reader in found] for update, found in readers.items()}


def _sizes(graph: ir.Graph) -> dict[str, int]:
    """Bytes that each value adds when it is made; 0 for what is there all the time."""
    sizes = {}
    for node in graph.nodes:
        held = node.op in ir.RESIDENT_OPS or node.op == "ReadVariableOp"
        for reference, nbytes in zip(node.refs(), liveness.output_bytes(node), strict=True):
            sizes[reference] = 0 if held else nbytes
    return sizes


def _old_readers(graph: ir.Graph) -> tuple[dict[int, set[int]], dict[int, list[int]]]:
    """For every update the nodes that read the variable's value from before it, and the other way round.

    An update that runs before them would have to copy the variable.
    """
    root_of = liveness.roots(graph)
    read_of: dict[str, str] = {}  # value -> the ReadVariableOp whose result it is, by whatever name
    users: dict[str, set[int]] = {}  # ReadVariableOp -> nodes that read its result
    for index, node in enumerate(graph.nodes):
        for reference in node.inputs:
            if reference in read_of:
                users[read_of[reference]].add(index)
        for output, reference in enumerate(node.refs()):
            source = liveness.alias_of(node, output)
            if node.op == "ReadVariableOp":
                read_of[reference] = node.name
                users[node.name] = set()
            elif source is not None and node.inputs[source] in read_of:
                read_of[reference] = read_of[node.inputs[source]]
    reads: dict[str, list[str]] = {}  # variable -> its ReadVariableOps so far
    readers: dict[int, set[int]] = {}
    delayed: dict[int, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        if node.op == "ReadVariableOp":
            reads.setdefault(root_of[node.inputs[0]], []).append(node.name)
        elif node.op in liveness.ASSIGNS or node.op in liveness.UPDATES:
            before = reads.get(root_of[node.inputs[0]], ())
            readers[index] = set().union(*(users[read] for read in before)) - {index}
            for reader in readers[index]:
                delayed.setdefault(reader, []).append(index)
    return readers, delayed


_UPDATES_OF_A_VARIABLE = 8
"""At most so many updates belong to one gradient: the variable, its slots, averages and accumulators."""


def _only_for_updates(graph: ir.Graph) -> Mapping[str, int]:
    """The nodes all of whose results end in updates of one variable and its optimizer state, and in how many.

    All of the backward pass ends in updates; the number of updates tells the gradient of one variable
    from what is passed on to the layers before. Where few layers are left before, it does not: that ends in few, too,
    though in more than the gradients beside it do.
    """
    results = {ir.producer(reference) for reference in graph.outputs}
    ends: dict[str, frozenset[str]] = {}
    blocks = {value: name for name, values in graph.blocks.items() for value in values}
    starts = {*graph.blocks, *(ir.producer(graph.by_name[name].inputs[0]) for name in graph.blocks)}

    def count(end: str) -> int:
        """How many variables it updates."""
        stored: Any = () if end in blocks else dict(graph.by_name[end].attrs).get("stored", ())
        return max(1, len(stored))

    for node in reversed(graph.nodes):
        if node.op in liveness.ASSIGNS or node.op in liveness.UPDATES or node.op in (ir.STORE, ir.UPDATE):
            ends[node.name] = frozenset({node.name})
            continue
        reached: set[str] = set()
        is_known = node.name not in results
        for reference in node.refs():
            for name in graph.consumers.get(reference, ()):
                if reference in blocks and name in starts:  # where it is summed with others, it stands for one variable
                    reached.add(reference)
                else:
                    is_known = is_known and name in ends
                    reached |= ends.get(name, frozenset())
        most = sum(_UPDATES_OF_A_VARIABLE if end in blocks else count(end) for end in reached)
        if is_known and reached and most <= _UPDATES_OF_A_VARIABLE:
            ends[node.name] = frozenset(reached)
    return {name: sum(map(count, reached)) for name, reached in ends.items()}


def _exchanging(graph: ir.Graph) -> frozenset[str]:
    """Names of the nodes that exchange gradients, and join, split and pass them on for that: they run at once."""
    found: set[str] = set()
    for name, values in graph.blocks.items():
        makers = [graph.by_name[ir.producer(value)] for value in values]
        found.update((name, *(node.name for node in makers if liveness.alias_of(node, 0) is not None)))
        found.update([ir.producer(graph.by_name[name].inputs[0])] if len(values) > 1 else [])
    for node in graph.nodes:
        if node.op == ir.AWAIT:
            readers = [graph.by_name[reader] for reader in graph.consumers.get(node.name, ())]
            found.update((node.name, *(reader.name for reader in readers if dict(reader.attrs).get("is_inserted"))))
    return frozenset(found)

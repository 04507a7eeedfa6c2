"""The training step as an immutable graph: Value, Node, Graph; print, index, verify.

Grammar of the printed form (`parser.py` reads it back):

    graph      = "graph" NAME "(" refs ")" "->" "(" refs ")" [ "after(" refs ")" ] "{" node* "}"
    node       = "%" NAME "=" OP ["!"] "(" refs ")" [attrs] ["like(" NAME ")"] ["@" JSON-STRING]
                 ["after(" refs ")"] ":" "(" values ")"
    attrs      = JSON object
    value      = DTYPE "[" dims "]" | DTYPE "[*]"        a dim is an integer or "?"
    ref        = "%" NAME [":" INDEX]                    index 0 is left out

"!" marks a stateful node. `like(x)` says that the node repeats node x: the same op and attributes,
other inputs. The nodes of a graph stand in execution order.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Attr = int | float | bool | str | tuple[int, ...]

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "int8", "uint8", "qint8", "quint8", "int4", "uint4"), 1),
    **dict.fromkeys(("float8_e5m2", "float8_e4m3fn"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "qint16", "quint16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "qint32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes per element. A dtype that is missing here (resource, variant, string) holds no device bytes."""

SWAP_OUT = "SwapOut"
"""Copies its input to the far tier. Its output is a handle that holds no device bytes."""
SWAP_IN = "SwapIn"
"""Brings the value behind a SwapOut's handle back to the device."""

FETCH = "Fetch"
"""Brings the value of a variable that lies in a far tier to the device. Reads the handle of its value there."""
VIEW = "View"
"""The same where it lies: what it makes takes no device bytes. Who reads it computes on the host."""
STORE = "Store"
"""Gives such a variable a new value: its first input. The others are the handles of the value of before and of memory
for the new one; without any, it is sent away."""
OVERLAPS = "overlaps"
"""Attribute of a FETCH or STORE that runs beside compute, as copies of swaps do. What reads the fetched value waits for
it, and so does what the plan says is to wait. Its value is the node that it waits for only so as not to start earlier,
or ""."""
UPDATE = "Update"
"""Gives variables in far tiers new values that are computed where they lie, element by element.

Its inputs are the `values` that it reads on the device, then of each variable the two handles that a STORE has. What it
computes is the attribute `program`, as `elementwise` reads it: given are the values, then the variables, all of one
`dtype` and `shape`. Of the results the first ones are the node's outputs; the others are new values of the variables
whose numbers are in `stored`, unless the node is not stateful: then it only computes.
"""

BARRIER = "XlaOptimizationBarrier"
"""Passes each input on as an output once all of them are there. XLA merges and moves nothing across it."""
PLACE = "Place"
"""Copies its input to a kind of memory, its attribute `memory_kind`, in a graph for XLA."""
ANCHOR = "Anchor"
"""Its first input, bit for bit, but not before its other inputs are there: a wait that XLA keeps."""

ALL_REDUCE = "CollectiveReduceV2"
"""The sum of its first input over all replicas, which all compute it at the same time.

How many they are is in the attribute `workers`.
"""
EXCHANGE = "Exchange"
"""The same of a block of gradients, beside compute: a `CollectiveReduceV2` that no node waits for but its AWAIT.

Its second output is what arrives of the other replicas, which is on the device until the block is done.
"""
AWAIT = "Await"
"""The sum that an EXCHANGE makes, once it is there. The other inputs are let go of then."""

SHARD = "Shard"
"""This worker's part of its input, flat. Parts are equally long: the last ones may be padded with zeros.

How many workers there are is in the attribute `workers`, as it is of an `ALL_GATHER`.
"""
ALL_GATHER = "AllGather"
"""The value whose parts all workers have, of which its first input is this one's."""

RECEIVE = "Receive"
"""The value that another replica has for its input, in a graph of one of them (`replicas`)."""

IS_DEFERRED = "is_deferred"
"""Attribute of an argument that a function captures anew with each call, such as the key of a collective. They come
last."""

IS_ZEROS = "is_zeros"
"""Attribute of a node whose output is many zeros, made anew in each step: TensorFlow would fold them into a constant
that stays on the device."""

IS_FOLDED = "is_folded"
"""Attribute of a node in the place of which TensorFlow's constant folding will compute something else."""

RESIDENT_OPS = frozenset({"Placeholder", "Const", "VarHandleOp"})
"""Ops whose outputs are in memory before the step starts and stay there."""


class GraphError(ValueError):
    """A graph breaks a rule of the IR. The message shows the lines around the fault."""


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """The type of one output of a node.

    Attributes:
        dtype: TensorFlow's name of the element type, "float32".
        shape: Dimensions; None for an unknown one. None in place of the tuple: unknown rank.
    """

    dtype: str
    shape: tuple[int | None, ...] | None = ()

    @property
    def nbytes(self) -> int:
        """Device bytes of the value; 0 for handles and strings, and while a dimension is unknown."""
        return _nbytes(self.dtype, self.shape)

    @property
    def is_resolved(self) -> bool:
        """Whether `nbytes` can be trusted."""
        return self.dtype not in ITEM_BYTES or (self.shape is not None and None not in self.shape)

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[*]"
        return f"{self.dtype}[{','.join('?' if d is None else str(d) for d in self.shape)}]"


@functools.lru_cache(maxsize=4096)
def _nbytes(dtype: str, shape: tuple[int | None, ...] | None) -> int:
    if shape is None or None in shape:
        return 0
    return ITEM_BYTES.get(dtype, 0) * math.prod(d for d in shape if d is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        name: Unique in its graph.
        op: Operation type, TensorFlow's name or `SWAP_OUT` / `SWAP_IN`.
        inputs: References "node" or "node:index" to the values it reads.
        control_inputs: Names of nodes that must have run before.
        outputs: Types of the values it makes.
        device: Placement as TensorFlow spells it; "" leaves it open.
        stateful: Whether TensorFlow calls the op stateful: it is never run twice.
        attrs: Attributes of nodes that graphswap inserts, sorted by name. The attributes of the
            user's nodes stay in TensorFlow's graph.
        like: The node that this one repeats, or "".
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    control_inputs: tuple[str, ...] = ()
    outputs: tuple[Value, ...] = ()
    device: str = ""
    stateful: bool = False
    attrs: tuple[tuple[str, Attr], ...] = ()
    like: str = ""

    def refs(self) -> tuple[str, ...]:
        """References to this node's outputs, in order."""
        if len(self.outputs) == 1:  # nearly always
            return (self.name,)
        return tuple(ref(self.name, i) for i in range(len(self.outputs)))

    def __str__(self) -> str:
        parts = [f"%{self.name} = {self.op}{'!' if self.stateful else ''}({_refs(self.inputs)})"]
        if self.attrs:
            parts.append(json.dumps(dict(self.attrs), sort_keys=True))
        if self.like:
            parts.append(f"like(%{self.like})")
        if self.device:
            parts.append(f"@{json.dumps(self.device)}")
        if self.control_inputs:
            parts.append(f"after({_refs(self.control_inputs)})")
        return f"{' '.join(parts)} : ({', '.join(map(str, self.outputs))})"


@dataclasses.dataclass(frozen=True)
class Graph:
    """A training step: nodes in execution order.

    Attributes:
        name: For messages.
        nodes: In an order that respects inputs and control inputs.
        inputs: Names of the nodes that stand for the arguments, in order.
        outputs: References to the results, in order.
        control_outputs: Names of nodes that must run though nobody reads them.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    control_outputs: tuple[str, ...] = ()

    @functools.cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @functools.cached_property
    def position(self) -> Mapping[str, int]:
        """Node name to its place in the execution order."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    @functools.cached_property
    def consumers(self) -> Mapping[str, tuple[str, ...]]:
        """Reference to the names of the nodes that read it, each once, in execution order."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node.name)
        return {value: tuple(names) for value, names in found.items()}

    @functools.cached_property
    def waiting(self) -> Mapping[str, tuple[str, ...]]:
        """Node to the names of those that wait for it by a control input, in execution order."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in node.control_inputs:
                found.setdefault(name, []).append(node.name)
        return {name: tuple(names) for name, names in found.items()}

    @functools.cached_property
    def stores(self) -> Mapping[str, str]:
        """Handle of a variable in a far tier to the name of the node that gives it a new value."""
        found = {node.inputs[1]: node.name for node in self.nodes if node.op == STORE and len(node.inputs) > 1}
        for node in self.nodes:
            if node.op == UPDATE:
                stored: Any = dict(node.attrs)["stored"]
                found.update((far_handles(node)[number], node.name) for number in stored)
        return found

    @functools.cached_property
    def placed(self) -> Mapping[str, str]:
        """Variables that live in far tiers, each with its tier."""
        handles = [dict(node.attrs) for node in self.nodes if node.op == "Placeholder"]
        return {str(attrs["store_of"]): str(attrs["tier"]) for attrs in handles if "store_of" in attrs}

    @functools.cached_property
    def shards(self) -> Mapping[str, str]:
        """Variables of which every worker keeps a part, each with what stands for this one's part."""
        parts = {node.name: dict(node.attrs).get("shard_of") for node in self.nodes if node.op == "Placeholder"}
        return {str(variable): name for name, variable in parts.items() if variable is not None}

    @functools.cached_property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """EXCHANGE nodes to the values that each sums over all replicas, one behind the other."""
        found = {}
        for node in self.nodes:
            if node.op == EXCHANGE:
                is_joined = dict(node.attrs)["is_joined"]
                found[node.name] = self.by_name[node.inputs[0]].inputs[:-1] if is_joined else node.inputs[:1]
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the printed form: equal for equal graphs, in any process."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        # Equal graphs have equal hashes; hashing every node would cost more than the lookups it serves.
        return hash((self.name, len(self.nodes), self.outputs))

    def value(self, reference: str) -> Value:
        name, index = split_ref(reference)
        return self.by_name[name].outputs[index]

    def replace(self, **changes: object) -> Graph:
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        head = f"graph {self.name}({_refs(self.inputs)}) -> ({_refs(self.outputs)})"
        if self.control_outputs:
            head += f" after({_refs(self.control_outputs)})"
        return "\n".join([head + " {", *(f"  {node}" for node in self.nodes), "}"])


_WHOLE_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20
_SMALLEST_PIECE_BYTES = 1 << 20


@functools.lru_cache(maxsize=4096)
def swap_pieces(value: Value) -> int:
    """In how many equal pieces a value travels to the far tier: 1 up to 16 MiB, else pieces of 1 to 4 MiB.

    A value that has no such pieces, as its number of elements has few divisors, travels whole.
    """
    if value.nbytes <= _WHOLE_BYTES:
        return 1
    elements = value.nbytes // ITEM_BYTES[value.dtype]
    fewest, most = -(-value.nbytes // _PIECE_BYTES), value.nbytes // _SMALLEST_PIECE_BYTES
    return next((count for count in range(fewest, most + 1) if elements % count == 0), 1)


def ref(name: str, index: int = 0) -> str:
    """The reference to output `index` of node `name`."""
    return f"{name}:{index}" if index else name


def split_ref(reference: str) -> tuple[str, int]:
    """The inverse of `ref`."""
    name, _, index = reference.partition(":")
    return name, int(index) if index else 0


def producer(reference: str) -> str:
    """Name of the node that makes the value."""
    return reference.partition(":")[0]


def verify(graph: Graph) -> Graph:
    """Returns the graph, or raises GraphError naming the first broken rule.

    The rules: names are unique; whatever a node reads or waits for stands before it; references
    exist; inputs, outputs and control outputs exist.
    """
    arity: dict[str, int] = {}

    def fault(index: int, message: str) -> GraphError:
        around = range(max(0, index - 5), min(len(graph.nodes), index + 6))
        lines = (f"{'>' if i == index else ' '} {graph.nodes[i]}" for i in around)
        return GraphError(f"graph {graph.name}: {message}\n" + "\n".join(lines))

    for index, node in enumerate(graph.nodes):
        for reference in node.inputs:
            name, output = split_ref(reference)
            if name not in arity:
                raise fault(index, f"node '{node.name}' reads '%{reference}', which does not stand before it.")
            if output >= arity[name]:
                raise fault(
                    index,
                    f"node '{node.name}' reads '%{reference}', but '{name}' has {arity[name]} output(s).",
                )
        for name in node.control_inputs:
            if name not in arity:
                raise fault(index, f"node '{node.name}' runs after '{name}', which does not stand before it.")
        if node.name in arity:
            raise fault(index, f"there are two nodes called '{node.name}'.")
        arity[node.name] = len(node.outputs)
    for name in (*graph.inputs, *graph.control_outputs):
        if name not in arity:
            raise fault(len(graph.nodes), f"the signature names node '{name}', which does not exist.")
    for reference in graph.outputs:
        name, output = split_ref(reference)
        if output >= arity.get(name, 0):
            raise fault(len(graph.nodes), f"the result '%{reference}' does not exist.")
    return graph


def origin(graph: Graph) -> Mapping[str, str]:
    """For every value, the value of the user's graph that it is a copy of, often itself.

    A SwapIn's output is a copy of what its SwapOut read, an Anchor's is its first input, a repeated node's
    outputs are copies of the first one's.
    """
    origins: dict[str, str] = {}
    for node in graph.nodes:
        for index, reference in enumerate(node.refs()):
            if node.op in (SWAP_OUT, SWAP_IN, ANCHOR):
                origins[reference] = origins[node.inputs[0]]
            elif node.like:
                first = ref(node.like, index)  # may be gone: `rewrites.prune`
                origins[reference] = origins.get(first, first)
            else:
                origins[reference] = reference
    return origins


def far_handles(update: Node) -> tuple[str, ...]:
    """Of each variable of an UPDATE the handle of its value."""
    values: Any = dict(update.attrs)["values"]
    return update.inputs[values::2]


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Returns the wanted name, numbered if it is taken, and takes it."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def _refs(references: Iterable[str]) -> str:
    return ", ".join(f"%{r}" for r in references)

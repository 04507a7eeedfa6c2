"""How to do it: passes from (graph, plan) to graph. They obey, and never decide."""

from collections.abc import Sequence

from graphswap import ir
from graphswap.plan import Plan
from graphswap.rewrites import pass_manager
from graphswap.rewrites.anchor import anchor
from graphswap.rewrites.barriers import barriers
from graphswap.rewrites.exchange import exchange as exchange
from graphswap.rewrites.host_update import PS_TIER as PS_TIER
from graphswap.rewrites.host_update import host_update as host_update
from graphswap.rewrites.ordering import ordering
from graphswap.rewrites.overlap import overlap
from graphswap.rewrites.place import place as place
from graphswap.rewrites.prune import prune
from graphswap.rewrites.recompute import recompute
from graphswap.rewrites.schedule import schedule
from graphswap.rewrites.shard import shard as shard
from graphswap.rewrites.swap import swap

PASSES: tuple[pass_manager.RewritePass, ...] = (
    schedule,  # positions in the plan mean the planned order
    recompute,
    swap,  # after recompute: repeated nodes read what came back, too
    overlap,  # after swap: copies that start at one place are in the plan's order
    prune,  # after swap: a value that is swapped out has a reader
    ordering,  # last: chains whatever was inserted
)

JIT_PASSES: tuple[pass_manager.RewritePass, ...] = (
    schedule,
    recompute,
    anchor,  # in the place of control edges
    prune,
)
"""For a step that XLA compiles inside TensorFlow, where nothing can be swapped."""

PJRT_PASSES: tuple[pass_manager.RewritePass, ...] = (
    schedule,
    recompute,
    swap,
    prune,
    barriers,  # in the place of control edges
)
"""For a step that XLA compiles, on devices that PJRT knows kinds of memory of."""


def rewrite(graph: ir.Graph, plan: Plan, passes: Sequence[pass_manager.RewritePass] = PASSES) -> ir.Graph:
    """Carries out the plan. An empty plan returns the same object.

    Raises:
        ir.GraphError: If a pass leaves a broken graph.
    """
    return graph if plan.is_empty else pass_manager.run_passes(graph, plan, passes)


def rewrite_for_worker(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Carries out the plan for a worker's part of a step. An empty plan holds the order: what comes from parameter
    servers would come at once.

    Raises:
        ir.GraphError: If a pass leaves a broken graph.
    """
    return pass_manager.run_passes(graph, plan, PASSES)


def rewrite_for_jit(graph: ir.Graph, plan: Plan) -> ir.Graph:
    """Carries out a plan without swaps, for XLA inside TensorFlow to compile. An empty plan adds anchors alone.

    Raises:
        ir.GraphError: If a pass leaves a broken graph.
    """
    return pass_manager.run_passes(graph, plan, JIT_PASSES)

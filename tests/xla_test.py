"""The search for a plan whose compiled program fits, with a stand-in for the compiler; no XLA runs here."""

import dataclasses

import pytest

from graphswap import ir, parser, planning, xla
from graphswap.cost_model import CostModel, DeviceSpec
from graphswap.graphdef import UnsupportedGraphError
from graphswap.plan import Plan, PlanError, Recompute
from graphswap.profiler import Compiled
from graphswap.simulator import simulate
from graphswap.strategies import Auto, Greedy, budgets
from graphswap.strategies.base import InfeasibleBudgetError
from graphswap.strategies.chen import Chen

LAYERS = 8
MIB = 1 << 20


def chain():
    """Products forward, and products backward that read what went forward."""
    lines = ["%x = Placeholder() : (float32[512,512])", "%f0 = Sin(%x) : (float32[512,512])"]
    lines += [f"%f{i} = MatMul(%f{i - 1}, %x) : (float32[512,512])" for i in range(1, LAYERS)]
    lines += [f"%b{LAYERS} = Sin(%f{LAYERS - 1}) : (float32[512,512])"]
    lines += [f"%b{i} = MatMul(%b{i + 1}, %f{i}) : (float32[512,512])" for i in reversed(range(LAYERS))]
    return parser.parse("graph chain(%x) -> (%b0) {\n" + "\n".join(lines) + "\n}")


GRAPH = chain()
COSTS = CostModel(DeviceSpec(has_cpu_kernels=False))


@dataclasses.dataclass
class Compiler:
    """Adds so many bytes to what the simulator says of a program, and counts its calls."""

    extra_bytes: int = 0
    calls: int = 0

    def __call__(self, graph: ir.Graph) -> Compiled:
        self.calls += 1
        # The argument, in a chunk that may be larger.
        resident = sum(node.outputs[0].nbytes + 256 for node in graph.nodes if node.op == "Placeholder")
        anchored = any(node.op == ir.ANCHOR or node.like for node in graph.nodes) or graph is not GRAPH
        extra = self.extra_bytes if anchored else 2 * self.extra_bytes
        return Compiled(simulate(graph, Plan(), COSTS).peak_bytes - resident + extra)


def planned(budget, compiler, strategy=None):
    return xla.plan(strategy or Greedy(), GRAPH, COSTS, budget, compiler)


PLAIN = simulate(GRAPH, Plan(), COSTS).peak_bytes


def test_a_step_that_fits_stays_as_it_is():
    found = planned(PLAIN, compiler := Compiler())
    assert found.rewritten is GRAPH
    assert (found.plain_bytes, found.peak_bytes, compiler.calls) == (PLAIN, PLAIN, 1)
    assert found.planned.notes[0] == "it fits the budget as it is"


def test_anchors_alone_are_tried_before_anything_is_repeated():
    found = planned(PLAIN + MIB, Compiler(MIB))
    assert found.planned.plan == Plan()
    assert (found.plain_bytes, found.peak_bytes) == (PLAIN + 2 * MIB, PLAIN + MIB)


def test_what_the_program_needs_decides_not_what_the_simulator_says():
    budget = PLAIN - 2 * MIB
    found = planned(budget, Compiler(MIB))
    assert found.planned.plan.recomputes
    # The simulator had room for more: its own peak is lower than the budget by what the compiler adds.
    assert found.planned.timeline.peak_bytes <= budget - MIB
    assert found.peak_bytes <= budget


def test_all_that_the_allocator_will_count_is_counted():
    resident = CostModel(COSTS.device, resident_bytes=1024)

    def compiler(graph):
        return Compiled(MIB, (4, 300), constant_bytes=2560 if graph is GRAPH else 4096)

    # Buffers are rounded to 256 bytes; the argument's may be larger by one chunk. Constants of the step itself are
    # among the resident bytes already.
    least = MIB + 1024 + MIB + 256 + 512 + 256
    assert xla.plan(Greedy(), GRAPH, resident, 9 * MIB, compiler).peak_bytes == least
    only = planning.Given(Plan(), None, "plan.json")
    assert xla.plan(only, GRAPH, resident, 9 * MIB, compiler).peak_bytes == least + 1536


def test_a_chunk_that_is_larger_than_asked_for_counts():
    def on(memory_bytes, budget):
        device = dataclasses.replace(COSTS.device, memory_bytes=memory_bytes)
        found = xla.plan(Greedy(), GRAPH, CostModel(device), budget, lambda graph: Compiled(8 * MIB))
        return found.peak_bytes, found.is_fenced

    needed = 9 * MIB + 256
    assert on(32 * MIB, 12 * MIB) == (needed, False)
    assert on(12 * MIB, 12 * MIB) == (12 * MIB, False)
    # 16 MiB less the argument's is less than twice the buffer: without a fence the allocator would hand out all of it.
    assert on(16 * MIB, 12 * MIB) == (12 * MIB, True)
    with pytest.raises(InfeasibleBudgetError) as caught:
        on(16 * MIB, 9 * MIB)
    assert caught.value.smallest_bytes == needed


def test_checkpoints_along_the_chain_are_the_last_attempt():
    strategy = Auto(0.1)
    chen = budgets.smallest(Chen(), GRAPH, COSTS)
    repeated = {name for decision in chen.recomputes for name in decision.nodes}
    assert budgets.smallest(strategy, GRAPH, COSTS).decisions != chen.decisions

    def compiler(graph):
        return Compiled(MIB if {node.like for node in graph.nodes if node.like} == repeated else 64 * MIB)

    assert planned(4 * MIB, compiler, strategy).planned.plan.strategy == "chen"
    with pytest.raises(InfeasibleBudgetError):
        planned(4 * MIB, compiler)


def test_a_budget_that_no_program_keeps_is_refused_with_the_smallest_that_was_found():
    with pytest.raises(InfeasibleBudgetError, match="is below the smallest reachable peak") as caught:
        planned(2 * MIB, Compiler(MIB))
    assert caught.value.smallest_bytes > 2 * MIB


def test_the_smallest_is_what_the_attempts_found():
    found = planned("min", Compiler(MIB))
    assert found.peak_bytes < PLAIN + MIB


def test_anchors_that_cost_more_than_they_save_are_left_out():
    found = planned("free", Compiler(-MIB))
    assert found.rewritten is GRAPH
    assert found.plain_bytes == found.peak_bytes


def test_a_given_plan_is_taken_as_it_is():
    only = Plan(decisions=(Recompute(("f0", "f1"), "b1"),))
    found = planned(PLAIN + 9 * MIB, Compiler(), planning.Given(only, None, "plan.json"))
    assert found.planned.plan is only
    assert found.planned.notes[0] == "the plan is that of 'plan.json'"
    with pytest.raises(InfeasibleBudgetError):
        planned(2 * MIB, Compiler(), planning.Given(only, None, "plan.json"))


def test_plans_that_differ_by_their_order_are_compiled():
    compiler = Compiler()
    order = tuple(node.name for node in GRAPH.nodes)
    planned(PLAIN + 9 * MIB, compiler, planning.Given(Plan(order=order), None, "plan.json"))
    assert compiler.calls == 2


def test_a_program_that_xla_refuses_is_one_that_does_not_fit():
    def compiler(graph):
        if any(node.like for node in graph.nodes):
            raise UnsupportedGraphError("not this one")
        return Compiler(MIB)(graph)

    with pytest.raises(InfeasibleBudgetError) as caught:
        planned(PLAIN - 2 * MIB, compiler)
    assert caught.value.smallest_bytes == PLAIN + MIB
    assert "XLA could not compile 1 of the plans" in planned("min", compiler).planned.notes


def test_anchors_are_free():
    assert planned("free", Compiler(MIB)).peak_bytes == PLAIN + MIB


def test_a_plan_with_swaps_is_refused():
    class Swapping:
        def plan(self, graph, cost_model, memory_budget):
            from graphswap.plan import Swap

            return Plan(decisions=(Swap("f1", "f2", "f3", "b3", "b1", "host"),), strategy="mine")

    with pytest.raises(PlanError, match="expected a plan without swaps for jit_compile=True, received one with 1 from"):
        planned(PLAIN - 2 * MIB, Compiler(), Swapping())

import dataclasses
import itertools

import hypothesis
import laws_test
import pytest
import testing
import tiny_graphs
from hypothesis import strategies as st

from graphswap import ir, parser, replicas, rewrites, simulator
from graphswap.cost_model import CostModel, Profile, Workspace
from graphswap.plan import Plan, Recompute, Swap

DEVICES = ("/device:CPU:0", "/device:CPU:1", "/device:CPU:2")


def copied(graph, number):
    """The graph as replica of that number: on its device, what reads a variable without one, as TensorFlow has it."""

    def named(reference):
        return f"r{number}/{reference}" if number else reference

    def placed(node):
        return "" if node.op in ("Placeholder", "ReadVariableOp") else DEVICES[number]

    nodes = [
        dataclasses.replace(
            node,
            name=named(node.name),
            inputs=tuple(map(named, node.inputs)),
            control_inputs=tuple(map(named, node.control_inputs)),
            device=placed(node),
        )
        for node in graph.nodes
    ]
    signature = {field: tuple(map(named, getattr(graph, field))) for field in ("inputs", "outputs", "control_outputs")}
    return graph.replace(nodes=tuple(nodes), **signature)


def mirrored(graph, count=2):
    """A step of several replicas of the graph, which returns the mean of their first results."""
    parts = [copied(graph, number) for number in range(count)]
    results = tuple(part.outputs[0] for part in parts)
    value = graph.value(graph.outputs[0])
    mean = [ir.Node("packed", "Pack", results, outputs=(ir.Value("float32", (count, *value.shape)),))]
    mean += [ir.Node("mean", "Sum", ("packed",), tuple(n for p in parts for n in p.control_outputs), outputs=(value,))]
    return ir.verify(
        graph.replace(
            nodes=(*(node for part in parts for node in part.nodes), *mean),
            inputs=tuple(name for part in parts for name in part.inputs),
            outputs=("mean", *(r for part in parts for r in part.outputs[1:])),
            control_outputs=tuple(n for part in parts for n in part.control_outputs),
        )
    )


def split(graph, count=2):
    return replicas.split(graph, DEVICES[:count])


@hypothesis.given(st.randoms(use_true_random=False), st.sampled_from((2, 3)), st.booleans())
@hypothesis.settings(max_examples=40)
def test_every_replica_does_what_the_first_one_does(rng, count, sums):
    step = testing.random_graph(rng)
    if sums:
        step = testing.replicated(step, count)
    parts = split(mirrored(step, count), count)
    assert [dict(found) for found in parts.twins] == [
        {name: f"r{number}/{name}" for name in step.by_name} for number in range(1, count)
    ]
    plan = laws_test.random_plan(rng, parts.first)
    rewritten = rewrites.rewrite(parts.first, plan)
    merged = parts.merged(rewritten)
    assert merged.inputs == parts.whole.inputs
    common = {node.name for node in (*merged.nodes, *rewritten.nodes) if is_common(node.name)}
    outcome = laws_test.evaluate(merged)
    plain = laws_test.evaluate(parts.whole)
    assert (outcome.results, outcome.variables) == (plain.results, plain.variables)
    own = [node for node in rewritten.nodes if node.name not in common]
    for number in range(count):
        mine = [node for node in merged.nodes if node.name not in common and replica_of(node.name) == number]
        assert [node.op for node in mine] == [node.op for node in own]
        assert all(node.device in ("", DEVICES[number]) for node in mine)
        of_others = {node.name for node in merged.nodes} - {node.name for node in mine} - common
        for before, after in itertools.pairwise(range(len(own))):
            if is_before(rewritten, own[before].name, own[after].name):
                assert is_before(merged, mine[before].name, mine[after].name)
        for node in mine:
            assert of_others.isdisjoint((*map(ir.producer, node.inputs), *node.control_inputs))


def is_before(graph, first, last):
    """Whether a node can't run before another has."""
    pending, seen = [last], {last}
    while pending and first not in seen:
        node = graph.by_name[pending.pop()]
        new = {*map(ir.producer, node.inputs), *node.control_inputs} - seen
        seen |= new
        pending += new
    return first in seen


def is_common(name):
    return name.partition("/")[0] in ("packed", "mean") or "/from_" in name


def replica_of(name):
    if name.startswith(("r1/", "r2/")):
        return int(name[1])
    head, _, tail = name.rpartition("/replica_")
    return int(tail) if head else 0


def test_an_empty_plan_leaves_the_step_as_it_is():
    parts = split(mirrored(parser.parse(tiny_graphs.CHAIN)))
    assert parts.merged(parts.first) is parts.whole


def test_the_first_replica_is_a_step_of_its_own():
    parts = split(mirrored(parser.parse(tiny_graphs.CHAIN)))
    testing.assert_graph_text(
        parts.first,
        """
        graph chain(%x, %w) -> (%mean) {
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (float32[8,8])
          %f1 = MatMul(%x, %w) @"/device:CPU:0" : (float32[8,8])
          %f2 = MatMul(%f1, %w) @"/device:CPU:0" : (float32[8,8])
          %f3 = MatMul(%f2, %w) @"/device:CPU:0" : (float32[8,8])
          %b3 = MatMul(%f3, %w) @"/device:CPU:0" : (float32[8,8])
          %b2 = MatMul(%b3, %f2) @"/device:CPU:0" : (float32[8,8])
          %b1 = MatMul(%b2, %f1) @"/device:CPU:0" : (float32[8,8])
          %b1/from_1 = Receive!(%b1) {"only_reads": true, "replica": 1} @"/device:CPU:0" : (float32[8,8])
          %packed = Pack!(%b1, %b1/from_1) {"only_reads": true} : (float32[2,8,8])
          %mean = Sum!(%packed) {"only_reads": true} : (float32[8,8])
        }
        """,
    )
    live = {step.name: step.live_bytes for step in simulator.simulate(parts.first, Plan(), CostModel()).steps}
    assert live["packed"] == 6 * 256  # x w b1, the other's b1, and packed, which is two


SUMMED_ON_ONE = """
graph summed(%v0, %v1, %x0, %x1) -> (%u0, %u1) {
  %v0 = Placeholder() : (float32[8,8])
  %v1 = Placeholder() : (float32[8,8])
  %x0 = Placeholder() : (float32[8,8])
  %x1 = Placeholder() : (float32[8,8])
  %a0 = MatMul(%x0, %v0) @"/device:CPU:0" : (float32[8,8])
  %g0 = MatMul(%a0, %v0) @"/device:CPU:0" : (float32[8,8])
  %a1 = MatMul(%x1, %v1) @"/device:CPU:1" : (float32[8,8])
  %g1 = MatMul(%a1, %v1) @"/device:CPU:1" : (float32[8,8])
  %sum = AddN(%g0, %g1) @"/device:CPU:0" : (float32[8,8])
  %u0 = Mul(%sum, %a0) @"/device:CPU:0" : (float32[8,8])
  %u1 = Mul(%sum, %a1) @"/device:CPU:1" : (float32[8,8])
}
"""


def test_what_one_device_sums_belongs_to_no_replica():
    parts = split(parser.parse(SUMMED_ON_ONE))
    assert parts.twins == ({"v0": "v1", "x0": "x1", "a0": "a1", "g0": "g1", "u0": "u1"},)
    assert [str(node) for node in parts.first.nodes if node.op in (ir.RECEIVE, "AddN")] == [
        '%g0/from_1 = Receive!(%g0) {"only_reads": true, "replica": 1} @"/device:CPU:0" : (float32[8,8])',
        '%sum = AddN!(%g0, %g0/from_1) {"only_reads": true} @"/device:CPU:0" : (float32[8,8])',
    ]
    plan = Plan(
        decisions=(
            Swap("g0/from_1", "g0/from_1", "sum", "g0/from_1", "sum"),
            Recompute(("a0",), "u0"),
        )
    ).check(parts.first)
    text = str(parts.merged(rewrites.rewrite(parts.first, plan))).replace("g0/from_1", "received")
    for long, short in (('"/device:CPU:0"', "0"), ('"/device:CPU:1"', "1"), ('{"nbytes": 256, "tier": "host"} ', "")):
        text = text.replace(long, short)
    assert [line.strip().partition(" : ")[0] for line in text.splitlines()[5:-1]] == [
        "%a0 = MatMul(%x0, %v0) @0",
        "%a1 = MatMul(%x1, %v1) @1",
        "%g0 = MatMul(%a0, %v0) @0 after(%a0)",
        "%g1 = MatMul(%a1, %v1) @1 after(%a1)",
        "%received/swap_out = SwapOut(%g1) @0",
        "%received/swap_in = SwapIn(%received/swap_out) @0 after(%a0, %a1, %g0, %g1, %received/swap_out)",
        "%sum = AddN(%g0, %received/swap_in) @0 after(%received/swap_out, %g0, %g1, %a0, %a1)",
        "%a0/recompute = MatMul(%x0, %v0) like(%a0) @0 after(%sum, %a0, %g0)",
        "%a0/recompute/replica_1 = MatMul(%x1, %v1) like(%a1) @1 after(%sum, %a1, %g1)",
        "%u0 = Mul(%sum, %a0/recompute) @0 after(%sum, %a0/recompute)",
        "%u1 = Mul(%sum, %a0/recompute/replica_1) @1 after(%sum, %a0/recompute/replica_1)",
    ]


TWO_IN_A_ROW = """
graph summed(%v0, %v1, %x0, %x1) -> (%c0, %c1, %d0, %d1) {
  %v0 = Placeholder() : (float32[8,8])
  %v1 = Placeholder() : (float32[8,8])
  %x0 = Placeholder() : (float32[8,8])
  %x1 = Placeholder() : (float32[8,8])
  %a0 = MatMul(%x0, %v0) @"/device:CPU:0" : (float32[8,8])
  %a1 = MatMul(%x1, %v1) @"/device:CPU:1" : (float32[8,8])
  %c0 = Tanh(%a0) @"/device:CPU:0" : (float32[8,8])
  %c1 = Tanh(%a1) @"/device:CPU:1" : (float32[8,8])
  %sum = AddN(%a0, %a1) @"/device:CPU:0" : (float32[8,8])
  %twice = Mul(%sum, %sum) @"/device:CPU:0" : (float32[8,8])
  %d0 = Mul(%twice, %a0) @"/device:CPU:0" : (float32[8,8])
  %d1 = Mul(%twice, %a1) @"/device:CPU:1" : (float32[8,8])
}
"""


def test_what_belongs_to_no_replica_has_its_place_in_the_order_of_each():
    parts = split(parser.parse(TWO_IN_A_ROW))
    rewritten = rewrites.rewrite(parts.first, Plan(decisions=(Recompute(("a0",), "d0"),)))
    merged = parts.merged(rewritten)
    assert is_before(merged, "c0", "d0") and is_before(merged, "c1", "d1")


def test_what_belongs_to_no_replica_is_swapped_once():
    graph = parser.parse(TWO_IN_A_ROW.replace("Mul(%twice, %a", "Mul(%sum, %c"))
    nodes = graph.by_name
    order = [*graph.inputs, "a0", "a1", "sum", "twice", "c0", "c1", "d0", "d1"]
    parts = split(ir.verify(graph.replace(nodes=tuple(nodes[name] for name in order))))
    plan = Plan(decisions=(Swap("sum", "twice", "c0", "c0", "d0"),)).check(parts.first)
    merged = parts.merged(rewrites.rewrite(parts.first, plan))
    assert [(n.name, n.device) for n in merged.nodes if n.op == ir.SWAP_IN] == [("sum/swap_in", DEVICES[0])]
    assert all("sum/swap_in" in merged.by_name[name].inputs for name in ("d0", "d1"))


def test_costs_are_those_of_all_replicas_that_share_the_cores():
    parts = split(parser.parse(SUMMED_ON_ONE))
    measured = Profile("", {"a0": 1.0, "a1": 2.0, "sum": 0.5}, {"a0": Workspace((256,)), "a1": Workspace((512,))})
    own = parts.of_first(measured, parts.first)
    assert (own.seconds["a0"], own.seconds["sum"], own.seconds["g0"]) == (3.0, 0.5, 0.0)
    assert own.workspace == {"a0": Workspace((512,))}


def test_costs_of_what_a_pass_has_added_are_those_of_all_replicas_too():
    parts = split(parser.parse(SUMMED_ON_ONE))
    plan = Plan(decisions=(Recompute(("a0",), "u0"),)).check(parts.first)
    rewritten = rewrites.rewrite(parts.first, plan)
    added = [node.name for node in parts.merged(rewritten).nodes if node.like]
    own = parts.of_first(Profile("", dict.fromkeys(added, 1.0), {}), rewritten)
    assert own.seconds["a0/recompute"] == 2.0


def test_a_smaller_share_of_a_batch_is_alike():
    graph, small = parser.parse(SUMMED_ON_ONE), (ir.Value("float32", (4, 8)),)
    nodes = [dataclasses.replace(n, outputs=small) if n.name in ("x1", "a1") else n for n in graph.nodes]
    parts = split(graph.replace(nodes=tuple(nodes)))
    plan = Plan(decisions=(Swap("a0", "a0", "g0", "sum", "u0"),)).check(parts.first)
    merged = parts.merged(rewrites.rewrite(parts.first, plan))
    (back,) = (node for node in merged.nodes if node.op == ir.SWAP_IN and node.device == DEVICES[1])
    assert (str(back.outputs[0]), dict(back.attrs)["nbytes"]) == ("float32[4,8]", 128)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("%g1 = MatMul", "%g1 = Mul", "node 'g1' (Mul), to which no node of CPU:0 is alike"),
        (
            "%x1 = Placeholder() : (float32[8,8])",
            "%x1 = Placeholder() : (float32[9,8])",
            "node 'a1' (MatMul), to which",
        ),
        ("%u1 = Mul(%sum, %a1)", "%u1 = Mul(%sum, %a0)", "node 'u1' (Mul), which reads 'a0' of another replica"),
        ("MatMul(%x1, %v1)", "MatMul(%v1, %x1)", "node 'g1' (MatMul), to which no node of CPU:0 is alike"),
        (
            '%a0 = MatMul(%x0, %v0) @"/device:CPU:0" : (float32[8,8])\n  %g0 = MatMul(%a0, %v0) '
            '@"/device:CPU:0" : (float32[8,8])\n  %a1 = MatMul(%x1, %v1) @"/device:CPU:1" : (float32[8,8])',
            '%a1 = MatMul(%x1, %v1) @"/device:CPU:1" : (float32[8,8])\n  %early = Neg(%a1) : (float32[8,8])\n  '
            '%a0 = MatMul(%x0, %v0) @"/device:CPU:0" : (float32[8,8])\n  %g0 = MatMul(%a0, %v0) '
            '@"/device:CPU:0" : (float32[8,8])',
            "node 'early' (Neg), which reads 'a1' before 'a0' is there",
        ),
    ],
)
def test_parts_that_differ_are_refused(old, new, what):
    with pytest.raises(replicas.UnlikeReplicas) as caught:
        split(parser.parse(SUMMED_ON_ONE.replace(old, new)))
    assert str(caught.value).startswith(f"expected replicas that run the same nodes, on CPU:0, CPU:1, received {what}")


def test_devices_are_named_once():
    graph = parser.parse(SUMMED_ON_ONE)
    assert replicas.used_devices(graph, "CPU") == DEVICES[:2]
    assert replicas.used_devices(graph, "GPU") == ()

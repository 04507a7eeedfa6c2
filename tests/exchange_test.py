"""What TensorFlow sums at once is summed in blocks; keys and starts are the same on all workers."""

import dataclasses
import random
from typing import Any

import pytest
import testing

from graphswap import blocks, ir, parser, rewrites
from graphswap.collectives import packed
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Exchange, Plan, PlanError, Swap
from graphswap.rewrites.exchange import _sorted, exchange
from graphswap.simulator import simulate

STEP = parser.parse(
    """
    graph step(%x, %a, %b, %c, %key, %token) -> (%loss) after(%set_a, %set_b, %set_c) {
      %x = Placeholder() : (float32[8,8])
      %a = Placeholder() {"held_bytes": [256]} : (resource[])
      %b = Placeholder() {"held_bytes": [256]} : (resource[])
      %c = Placeholder() {"held_bytes": [256]} : (resource[])
      %key = Placeholder() : (int32[])
      %token = Placeholder() : (resource[])
      %size = Const() : (int32[])
      %group = Const() : (int32[])
      %axis = Const() : (int32[])
      %sizes = Const() : (int32[3])
      %statistics = CollectiveReduceV2!(%x, %size, %group, %key, %token) {"workers": 4} : (float32[8,8])
      %grad_c = MatMul(%x, %statistics) : (float32[8,8])
      %loss = L2Loss(%grad_c) : (float32[])
      %grad_b = MatMul(%x, %grad_c) : (float32[8,8])
      %grad_a = MatMul(%x, %grad_b) : (float32[8,8])
      %flat_c = Reshape(%grad_c) : (float32[64])
      %flat_b = Reshape(%grad_b) : (float32[64])
      %flat_a = Reshape(%grad_a) : (float32[64])
      %pack = ConcatV2(%flat_c, %flat_b, %flat_a, %axis) : (float32[192])
      %sum = CollectiveReduceV2!(%pack, %size, %group, %key, %token) {"workers": 4} after(%statistics) : (float32[192])
      %split = SplitV(%sum, %sizes, %axis) : (float32[64], float32[64], float32[64])
      %sum_c = Reshape(%split) : (float32[8,8])
      %sum_b = Reshape(%split:1) : (float32[8,8])
      %sum_a = Reshape(%split:2) : (float32[8,8])
      %set_a = AssignSubVariableOp!(%a, %sum_a) : ()
      %set_b = AssignSubVariableOp!(%b, %sum_b) : ()
      %set_c = AssignSubVariableOp!(%c, %sum_c) : ()
      %mean = CollectiveReduceV2!(%loss, %size, %group, %key, %token) {"workers": 4} after(%sum) : (float32[])
      %done = NoOp!() after(%sum, %mean) : ()
    }
    """
)
TWO = Plan(decisions=(Exchange(("flat_c",), 1), Exchange(("flat_b", "flat_a"), 0)))


def keys(graph) -> list[Any]:
    return [dict(node.attrs)["instance_key"] for node in graph.nodes if node.op == ir.EXCHANGE]


def test_each_block_is_summed_awaited_and_split():
    exchanged = ir.verify(exchange(STEP, TWO))
    assert parser.parse(str(exchanged)) == exchanged
    one, two = keys(exchanged)
    found = [str(node) for node in exchanged.nodes if node.name.startswith(("sum", "mean", "done"))]
    assert found == [
        f'%sum/block_0 = Exchange!(%flat_c, %size, %group, %token) {{"held_pieces": [1, 3], "instance_key": {one}, '
        '"is_joined": false, "sum": "sum", "workers": 4} : (float32[64], uint8[192])',
        '%sum/block_1/join = ConcatV2(%flat_b, %flat_a, %axis) {"is_inserted": true} : (float32[128])',
        f'%sum/block_1 = Exchange!(%sum/block_1/join, %size, %group, %token) {{"held_pieces": [1, 3], "instance_key": '
        f'{two}, "is_joined": true, "sum": "sum", "workers": 4}} after(%sum/block_0) : (float32[128], uint8[384])',
        # It is waited for once the next one has started. Others read the gradient's buffer, which stays until then.
        '%sum/block_0/await = Await!(%sum/block_0, %sum/block_0:1, %flat_c) {"ahead": 1} after(%sum/block_1/join) : '
        "(float32[64])",
        '%sum/block_1/await = Await!(%sum/block_1, %sum/block_1:1) {"ahead": 0} after(%sum/block_1/join) : '
        "(float32[128])",
        '%sum/block_1/parts = SplitV(%sum/block_1/await, %axis) {"is_inserted": true} : (float32[64], float32[64])',
        "%sum_c = Reshape(%sum/block_0/await) : (float32[8,8])",
        "%sum_b = Reshape(%sum/block_1/parts) : (float32[8,8])",
        "%sum_a = Reshape(%sum/block_1/parts:1) : (float32[8,8])",
        '%mean = CollectiveReduceV2!(%loss, %size, %group, %key, %token) {"workers": 4} after(%sum/block_1) : '
        "(float32[])",
        "%done = NoOp!() after(%sum/block_0/await, %sum/block_1/await, %mean) : ()",
    ]


def test_keys_hang_on_what_is_summed_and_on_no_name():
    one, two = keys(exchange(STEP, TWO))
    assert min(one, two) >= 1 << 30 and max(one, two) < 1 << 31
    other = parser.parse(str(STEP).replace("%flat_", "%packed_").replace("graph step", "graph again"))
    renamed = tuple(Exchange(tuple(v.replace("flat", "packed") for v in e.values), e.ahead) for e in TWO.exchanges)
    assert keys(exchange(other, Plan(decisions=renamed))) == [one, two]
    split = Plan(decisions=tuple(Exchange((value,)) for value in ("flat_c", "flat_b", "flat_a")))
    turned = Plan(decisions=(Exchange(("flat_c",)), Exchange(("flat_a", "flat_b"))))
    found = [*keys(exchange(STEP, split)), *keys(exchange(STEP, turned))[1:], two]
    assert len(set(found)) == 5
    assert found[0] == one


def test_a_gradient_that_others_read_stays_until_its_block_is_done():
    nodes = [ir.Node("norm", "L2Loss", ("flat_c",), outputs=(ir.Value("float32"),))]
    graph = ir.verify(STEP.replace(nodes=(*STEP.nodes, *nodes)))
    assert exchange(graph, TWO).by_name["sum/block_0/await"].inputs == ("sum/block_0", "sum/block_0:1", "flat_c")


def test_a_sum_within_the_backward_pass_keeps_its_place_among_the_blocks():
    """The blocks before it are on the network already; it waits for them, on all workers alike."""
    nodes = []
    for node in STEP.nodes:
        inputs = tuple(
            "summed" if reference == "grad_b" and node.name == "grad_a" else reference for reference in node.inputs
        )
        nodes.append(dataclasses.replace(node, inputs=inputs))
        if node.name == "grad_b":
            sizes, attrs = ("size", "group", "key", "token"), (("workers", 4),)
            nodes.append(
                ir.Node("summed", ir.ALL_REDUCE, ("grad_b", *sizes), (), node.outputs, stateful=True, attrs=attrs)
            )
    exchanged = ir.verify(exchange(STEP.replace(nodes=tuple(nodes)), TWO))
    assert exchanged.by_name["summed"].control_inputs == ("sum/block_0",)
    assert exchanged.by_name["statistics"].control_inputs == ()


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ((Exchange(("grad_c",)),), "expected values that TensorFlow sums at once."),
        ((Exchange(()),), "expected values that TensorFlow sums at once."),
        ((Exchange(("flat_c",), -1),), "expected a number of later blocks from 0 on."),
        ((Exchange(("flat_c",)),), "expected every value of a sum in one block; look at 'flat_a'."),
        ((*TWO.exchanges, Exchange(("flat_c",))), "expected every value of a sum in one block; look at 'flat_a'."),
    ],
)
def test_other_values_are_refused(decisions, message):
    with pytest.raises(PlanError, match=f"does not fit graph 'step': {message}"):
        exchange(STEP, Plan(decisions=decisions))


def test_a_plan_without_blocks_returns_the_same_object():
    assert exchange(STEP, Plan()) is STEP


def test_a_plan_names_the_blocks_that_the_graph_has():
    exchanged = exchange(STEP, TWO)
    assert TWO.check(exchanged) is TWO
    assert Plan.from_json(TWO.to_json()) == TWO
    with pytest.raises(PlanError, match="it has no such block, which `rewrites.exchange` would have made"):
        TWO.check(STEP)
    moving = Swap("sum/block_0", "sum/block_0", "sum_c", "sum/block_1", "set_c")
    with pytest.raises(PlanError, match="'sum/block_0' is on its way to the other replicas"):
        Plan(decisions=(moving,)).check(exchanged)


def test_compute_goes_on_beside_a_block():
    """Blocks take the network in turn, and the device until they are awaited; only what awaits them waits."""
    exchanged = exchange(STEP, TWO)
    link = Link(256.0, 256.0, 1.0, overlaps=True)
    model = CostModel(DeviceSpec(launch_seconds=1.0, memory_bytes_per_second=float("inf"), network=link))
    # A quarter of 256 bytes takes 1/4 s and 1 s of latency, six times; of 512 bytes 1/2 s.
    steps = {step.name: step for step in simulate(exchanged, Plan(), model).steps}
    first, second = steps["sum/block_0"], steps["sum/block_1"]
    assert (first.kind, second.kind) == ("exchange", "exchange")
    assert first.end - first.start == 6 * 1.25
    assert (second.start, second.end) == (first.end, first.end + 6 * 1.5)
    assert steps["sum/block_1/join"].start < first.end
    assert steps["sum/block_0/await"].start == first.end
    assert steps["sum/block_1/await"].start == second.end


def test_no_node_of_the_chain_waits_for_a_block():
    exchanged = exchange(STEP, TWO)
    rewritten = rewrites.rewrite(exchanged, Plan(order=tuple(exchanged.position)))
    waiting = [node.name for node in rewritten.nodes if "sum/block_0" in (*node.inputs, *node.control_inputs)]
    assert waiting == ["sum/block_1", "sum/block_0/await"]
    place = list(rewritten.by_name).index("sum/block_0")
    assert rewritten.nodes[place].control_inputs == tuple(node.name for node in rewritten.nodes[place - 2 : place])


def test_a_copy_that_starts_after_a_block_does_not_wait_for_it():
    exchanged = exchange(STEP, TWO)
    swap = Swap("grad_a", "flat_a", "sum_c", "sum/block_1", "set_c")
    rewritten = rewrites.rewrite(exchanged, Plan(decisions=(swap,)))
    assert rewritten.by_name["grad_a/swap_in"].control_inputs == ("sum/block_1/join",)


def test_random_blocks_cover_all_values():
    graph = testing.replicated(testing.random_graph(random.Random(3), 12), 3)
    exchanged = exchange(graph, testing.random_exchanges(random.Random(1), graph))
    assert len(keys(exchanged)) == len(set(keys(exchanged)))
    assert "sum" not in exchanged.by_name


def test_sums_that_stay_keep_their_order_without_the_one_that_goes():
    text = str(STEP).replace(
        '  %sum = CollectiveReduceV2!(%pack, %size, %group, %key, %token) {"workers": 4} after(%statistics)',
        '  %early = CollectiveReduceV2!(%loss, %size, %group, %key, %token) {"workers": 4} after(%statistics) : '
        '(float32[])\n  %sum = CollectiveReduceV2!(%pack, %size, %group, %key, %token) {"workers": 4} after(%early)',
    )
    exchanged = ir.verify(exchange(parser.parse(text), TWO))
    assert exchanged.by_name["early"].control_inputs == ("statistics", "sum/block_1")
    assert exchanged.by_name["mean"].control_inputs == ("sum/block_1", "early")


CHAINED = parser.parse(
    """
    graph step(%x, %a, %b, %token) -> () after(%set_a, %set_b) {
      %x = Placeholder() : (float32[8])
      %a = Placeholder() {"held_bytes": [256]} : (resource[])
      %b = Placeholder() {"held_bytes": [256]} : (resource[])
      %token = Placeholder() : (resource[])
      %key = Const() : (int32[])
      %grad_a = Neg(%x) : (float32[8])
      %sum_a = CollectiveReduceV2!(%grad_a, %key, %key, %key, %token) {"workers": 2} : (float32[8])
      %set_a = AssignSubVariableOp!(%a, %sum_a) : ()
      %new_a = ReadVariableOp!(%a) after(%set_a) : (float32[8])
      %grad_b = Mul(%new_a, %x) : (float32[8])
      %sum_b = CollectiveReduceV2!(%grad_b, %key, %key, %key, %token) {"workers": 2} after(%sum_a) : (float32[8])
      %set_b = AssignSubVariableOp!(%b, %sum_b) : ()
    }
    """
)
"""Two optimizers: the second one's gradients are those of weights that the first one has updated."""


def test_a_sum_that_another_one_needs_through_a_variable_stays():
    assert [one.name for one in packed(CHAINED)] == ["sum_b"]
    exchanged = ir.verify(exchange(CHAINED, Plan(decisions=(Exchange(("grad_b",), 1),))))
    assert exchanged.by_name["sum_a"] == CHAINED.by_name["sum_a"]
    assert blocks.choose(CHAINED, CostModel(), None)  # and ends


def test_blocks_that_would_wait_for_themselves_are_refused():
    nodes = [STEP.by_name["x"], ir.Node("one", "NoOp", control_inputs=("two",))]
    nodes.append(ir.Node("two", "NoOp", control_inputs=("one",)))
    with pytest.raises(PlanError, match="for which 'two' would wait for itself"):
        _sorted(nodes)


def test_sums_that_need_each_other_by_the_turn_of_a_third_one_stay():
    sum_b = CHAINED.by_name["sum_b"]
    third = dataclasses.replace(sum_b, name="third", inputs=("x", *sum_b.inputs[1:]), control_inputs=("set_a",))
    changed = {
        "new_a": third,
        "grad_b": dataclasses.replace(CHAINED.by_name["grad_b"], inputs=("third", "x")),
        "sum_b": dataclasses.replace(sum_b, control_inputs=("third",)),
    }
    graph = CHAINED.replace(nodes=tuple(changed.get(node.name, node) for node in CHAINED.nodes))
    assert len(packed(graph)) == 2
    assert blocks.choose(graph, CostModel(), None) == ()


def test_of_what_is_summed_twice_the_first_sum_is_one():
    again = dataclasses.replace(STEP.by_name["sum"], name="again", inputs=("flat_c", *STEP.by_name["sum"].inputs[1:]))
    again = dataclasses.replace(again, outputs=(ir.Value("float32", (64,)),))
    more = ir.Node("set_again", "AssignSubVariableOp", ("c", "again"), stateful=True)
    twice = STEP.replace(nodes=(*STEP.nodes, again, more))
    assert packed(twice) == packed(STEP)

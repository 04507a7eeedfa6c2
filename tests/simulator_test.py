"""Timelines worked out by hand. Unless said otherwise a node takes a second, and a value 256 bytes: one unit."""

import pytest
import tiny_graphs

from graphswap import parser
from graphswap.allocator import Allocator
from graphswap.cost_model import CostModel, DeviceSpec, Link, Profile, Workspace
from graphswap.plan import Plan, Prefetch, Recompute, SideBySide, Swap, WriteBack
from graphswap.simulator import NoRoom, simulate

# A unit takes two seconds to the host and one back; to the disk and from there four each.
LINKS = {"host": Link(128.0, 256.0, 0.0, overlaps=True), "disk": Link(64.0, 64.0, 0.0, overlaps=True)}
CHAIN = parser.parse(tiny_graphs.CHAIN)


def cost_model(links=LINKS, workspace=None, **fields):
    return CostModel(DeviceSpec(launch_seconds=1.0, links=links), Profile("", {}, workspace or {}), **fields)


def run(graph, *decisions, model=None, **options):
    if isinstance(graph, str):
        graph = parser.parse(graph)
    plan = Plan(decisions=decisions).check(graph)
    return simulate(graph, plan, model or cost_model(), **options)


def table(timeline):
    """One line per entry: name, kind, start and end in seconds, live units."""
    return [f"{s.name} {s.kind} {s.start:g} {s.end:g} {s.live_bytes // 256}" for s in timeline.steps]


def live(timeline):
    """Live units of each entry, by name."""
    return {step.name: step.live_bytes // 256 for step in timeline.steps}


# --- without a plan ---------------------------------------------------------------------------------------------


def test_a_chain():
    timeline = run(CHAIN)
    assert table(timeline) == [
        "x run 0 1 2",  # x and w are there from the start
        "w run 1 2 2",
        "f1 run 2 3 3",  # + f1
        "f2 run 3 4 4",  # + f2
        "f3 run 4 5 5",  # + f3
        "b3 run 5 6 6",  # + b3; f3 is free afterwards
        "b2 run 6 7 6",  # + b2; b3 and f2 are free afterwards
        "b1 run 7 8 5",  # x w f1 b2 b1
    ]
    assert timeline.peak_bytes == timeline.allocated_peak_bytes == 6 * 256
    assert timeline.peak_step.name == "b3"
    assert (timeline.seconds, timeline.swapped_bytes, timeline.recomputed_seconds) == (8.0, 0, 0.0)


def test_a_diamond():
    # w, right and join take two units. top is free after right.
    assert live(run(tiny_graphs.DIAMOND)) == {"x": 3, "w": 3, "top": 4, "left": 5, "right": 7, "join": 8}


BRANCHES = """
graph branches(%x) -> (%join) {
  %x = Placeholder() : (float32[64])
  %top = Op(%x) : (float32[64])
  %other = Op(%x) : (float32[64])
  %left = Relu(%top) : (float32[64])
  %right = Op(%other) : (float32[128])
  %join = Op(%left, %right) : (float32[64])
}
"""


def test_two_nodes_side_by_side_let_go_of_nothing_before_both_have_all():
    # Alone, left writes over top.
    assert live(run(BRANCHES)) == {"x": 1, "top": 2, "other": 3, "left": 3, "right": 5, "join": 5}
    two_for_one = BRANCHES.replace("Relu(%top)", "Op(%top)")
    assert live(run(two_for_one)) == {"x": 1, "top": 2, "other": 3, "left": 4, "right": 5, "join": 5}
    together = run(two_for_one, SideBySide("left", "right"))
    assert live(together) == {"x": 1, "top": 2, "other": 3, "left": 4, "right": 6, "join": 5}
    assert together.seconds == 6.0


def test_the_second_of_two_may_ask_first():
    together = run(BRANCHES, SideBySide("left", "right"), second_first={"right"})
    assert live(together) == {"x": 1, "top": 2, "other": 3, "right": 5, "left": 5, "join": 5}


def test_writing_over_inputs_that_nobody_else_needs():
    assert live(run(tiny_graphs.RESIDUAL)) == {
        "x": 2,
        "w": 2,
        "product1": 3,
        "relu1": 3,  # over product1
        "sum1": 4,  # x is an argument, grad_relu1 needs relu1
        "product2": 5,
        "relu2": 5,  # over product2
        "sum2": 5,  # over sum1, which product2 has read
        "loss": 6,  # read by nobody: gone at once
        "grad_relu2": 5,  # over relu2
        "grad_product2": 6,
        "grad_sum1": 5,  # over sum2; grad_relu2 is free
        "grad_relu1": 4,  # over relu1; grad_product2 is free
        "grad_product1": 5,
        "grad_x": 4,  # over grad_sum1; grad_relu1 is free
    }


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("%b = Relu(%a) : (float32[8,8])", 1),
        ("%b = AddV2(%a, %x) : (float32[8,8])", 1),
        ("%b = AddV2(%x, %a) : (float32[8,8])", 1),
        ("%b = AddV2(%a, %a) : (float32[8,8])", 2),  # the second input still needs it
        ("%b = MatMul(%a, %a) : (float32[8,8])", 2),  # not elementwise
        ("%b = Relu(%a) : (float32[8,4])", 2),  # another size
        ("%b = IsFinite(%a) : (bool[256])", 2),  # another type
        ("%b = FusedBatchNormV3(%a) : (float32[8,8], float32[8,8])", 2),  # only the first output
    ],
)
def test_when_an_output_is_written_over_an_input(line, units):
    timeline = run(f"""
    graph g(%x) -> (%b) {{
      %x = Placeholder() : (float32[8,8])
      %a = Op() : (float32[8,8])
      {line}
    }}
    """)
    assert live(timeline)["b"] == 1 + units


def test_an_alias_keeps_its_buffer():
    timeline = run("""
    graph g() -> () {
      %a = Op() : (float32[8,8], float32[8,8])
      %b = IdentityN(%a, %a:1) : (float32[8,8], float32[8,8])
      %c = Reshape(%b) : (float32[64])
      %d = Op() : (float32[8,8])
      %e = MatMul(%c, %d) : (float32[8,8])
      %f = Op() : (float32[8,8])
    }
    """)
    # a:1 is free after b, a only after e.
    assert live(timeline) == {"a": 2, "b": 2, "c": 1, "d": 2, "e": 3, "f": 1}


def test_workspace_is_in_use_while_the_node_runs():
    timeline = run(CHAIN, model=cost_model(workspace={"f2": Workspace(late=(300,)), "b1": Workspace((1,), (1,))}))
    assert list(live(timeline).values()) == [2, 2, 3, 4 + 2, 5, 6, 6, 5 + 2]


def test_resident_bytes_are_in_use_all_the_time():
    timeline = run(CHAIN, model=cost_model(resident_bytes=1000))
    assert timeline.peak_bytes == 6 * 256 + 1000
    assert timeline.steps[0].live_bytes == 2 * 256 + 1000


def test_results_stay():
    timeline = run("""
    graph g() -> (%view) {
      %a = Op() : (float32[8,8])
      %view = Identity(%a) : (float32[8,8])
      %b = Relu(%view) : (float32[8,8])
      %c = Relu(%b) : (float32[8,8])
    }
    """)
    assert live(timeline) == {"a": 1, "view": 1, "b": 2, "c": 2}


def test_an_order():
    order = ("w", "x", "f1", "f2", "f3", "b3", "b2", "b1")
    timeline = simulate(CHAIN, Plan(order=order), cost_model())
    assert [step.name for step in timeline.steps] == list(order)


def test_handles_take_no_bytes_but_what_they_hold():
    timeline = run("""
    graph g(%w) -> () {
      %w = Placeholder() {"held_bytes": [512]} : (resource[])
      %handle = Identity(%w) : (resource[])
      %read = ReadVariableOp!(%handle) : (float32[8,16])
      %list = TensorListStack(%read) {"held_bytes": [1024]} : (variant[])
      %text = AsString(%list) : (string[100])
    }
    """)
    assert live(timeline) == {"w": 2, "handle": 2, "read": 2, "list": 6, "text": 6}


# --- variables --------------------------------------------------------------------------------------------------

UPDATE = """
graph g(%w, %x) -> () {{
  %w = Placeholder() {{"held_bytes": [256]}} : (resource[])
  %x = Placeholder() : (float32[8,8])
  %read = ReadVariableOp!(%w) : (float32[8,8])
  %y = MatMul(%read, %x) : (float32[8,8])
  {}
}}
"""


def test_an_update_works_in_place():
    timeline = run(UPDATE.format("%update = AssignSubVariableOp!(%w, %y) : ()  %after = NoOp() : ()"))
    assert live(timeline) == {"w": 2, "x": 2, "read": 2, "y": 3, "update": 3, "after": 2}


def test_an_update_copies_the_variable_while_somebody_reads_it():
    timeline = run(UPDATE.format("%update = AssignAddVariableOp!(%w, %y) : ()  %late = Op(%read) : ()"))
    # The old buffer lives on until late.
    assert live(timeline) == {"w": 2, "x": 2, "read": 2, "y": 3, "update": 4, "late": 3}


def test_a_result_that_was_read_keeps_an_update_from_working_in_place():
    text = UPDATE.format("%update = AssignSubVariableOp!(%w, %y) : ()").replace("-> ()", "-> (%read)")
    assert live(run(text))["update"] == 4


def test_an_assigned_value_becomes_the_variable():
    timeline = run(UPDATE.format("%assign = AssignVariableOp!(%w, %y) : ()  %after = NoOp() : ()"))
    # The variable gives its buffer up and takes that of y.
    assert live(timeline) == {"w": 2, "x": 2, "read": 2, "y": 3, "assign": 3, "after": 2}


def test_a_variable_that_shares_its_buffer_is_copied_by_an_update():
    timeline = run(
        UPDATE.format("%assign = AssignVariableOp!(%w, %x) : ()  %update = AssignSubVariableOp!(%w, %x) : ()")
    )
    # From assign on w and x are one buffer, which x's owner keeps.
    assert live(timeline) == {"w": 2, "x": 2, "read": 2, "y": 3, "assign": 2, "update": 2}
    assert timeline.peak_bytes == 3 * 256


def test_assigning_what_was_read_changes_nothing():
    timeline = run(UPDATE.format("%assign = AssignVariableOp!(%w, %read) : ()  %late = Op(%read) : (float32[8,8])"))
    assert live(timeline) == {"w": 2, "x": 2, "read": 2, "y": 3, "assign": 2, "late": 3}


# --- swaps ------------------------------------------------------------------------------------------------------


def swap(**changes):
    """f1 leaves the device after f2 and comes back before b1."""
    fields = {"value": "f1", "out_after": "f2", "freed_before": "b3", "in_after": "b3", "in_before": "b1"}
    return Swap(**{**fields, **changes})


def test_a_swap_beside_compute():
    timeline = run(CHAIN, swap())
    assert table(timeline) == [
        "x run 0 1 2",
        "w run 1 2 2",
        "f1 run 2 3 3",
        "f2 run 3 4 4",
        "f1 swap_out 4 6 4",
        "f3 run 4 5 5",
        "b3 run 6 7 5",  # waits for the copy, then f1 is gone: x w f2 f3 b3
        "f1 swap_in 7 8 5",  # f3 is free, f1's new buffer counts from here: x w f2 b3 f1
        "b2 run 7 8 6",
        "b1 run 8 9 5",
    ]
    assert (timeline.peak_bytes, timeline.seconds) == (6 * 256, 9.0)
    assert (timeline.swapped_bytes, timeline.recomputed_seconds) == (256, 0.0)


def test_a_copy_that_comes_back_late_stalls_its_reader():
    timeline = run(CHAIN, swap(in_after="b2"))
    assert table(timeline)[-4:] == [
        "b3 run 6 7 5",
        "b2 run 7 8 5",
        "f1 swap_in 8 9 4",  # x w b2 f1
        "b1 run 9 10 5",
    ]
    assert timeline.peak_bytes == 5 * 256


def test_a_copy_starts_back_only_when_it_has_arrived_out_there():
    timeline = run(CHAIN, swap(tier="disk"))
    # The copy out takes from 4 to 8, so that b3 starts at 8.
    assert table(timeline)[4:] == [
        "f1 swap_out 4 8 4",
        "f3 run 4 5 5",
        "b3 run 8 9 5",
        "f1 swap_in 9 13 5",
        "b2 run 9 10 6",
        "b1 run 13 14 5",
    ]
    # Nobody waits here: the copy back queues behind the copy out.
    timeline = run(CHAIN, swap(tier="disk", freed_before="b1", in_after="f3"))
    assert [line for line in table(timeline) if "swap" in line] == ["f1 swap_out 4 8 4", "f1 swap_in 8 12 6"]
    assert timeline.seconds == 13.0


def test_a_value_counts_until_the_node_that_waits_for_its_copy():
    # The copy is complete at 6, but x w f1 f2 b3 b2 and the new f1 are in use at b2.
    timeline = run(CHAIN, swap(freed_before="b1"))
    assert live(timeline)["b2"] == 7


def test_copies_of_one_direction_queue_and_directions_do_not():
    timeline = run(
        CHAIN,
        swap(),
        Swap("f2", out_after="f3", freed_before="b2", in_after="b3", in_before="b2"),
        Swap("w", out_after="w", freed_before="f2", in_after="f2", in_before="b3", tier="disk"),
    )
    assert table(timeline) == [
        "x run 0 1 2",
        "w run 1 2 2",
        "w swap_out 2 6 2",
        "f1 run 2 3 3",
        "f2 run 6 7 4",  # waits for w's copy; w stays, it is an argument
        "f1 swap_out 7 9 4",
        "w swap_in 7 11 5",
        "f3 run 7 8 6",
        "f2 swap_out 9 11 6",  # behind f1
        "b3 run 11 12 6",  # waits for w, and for f1's copy, after which f1 is gone: x w f2 w' f3 b3
        "f1 swap_in 12 13 5",  # b3 was the last to read w' and f3
        "f2 swap_in 13 14 6",  # behind f1
        "b2 run 14 15 6",  # f2's old buffer is gone: x w b3 f1 f2' b2
        "b1 run 15 16 5",
    ]


def test_the_step_ends_with_its_last_copy():
    timeline = run(CHAIN, swap(value="b3", out_after="b2", freed_before="b1", in_after="b2", tier="disk"))
    # Nobody reads the new copy: it is freed at once.
    assert table(timeline)[-3:] == ["b3 swap_out 7 11 5", "b3 swap_in 11 15 6", "b1 run 11 12 5"]
    assert timeline.seconds == 15.0


def test_a_swap_that_compute_waits_for():
    links = {"host": Link(128.0, 256.0, 0.5)}
    timeline = run(CHAIN, swap(in_after="b2"), model=cost_model(links))
    assert table(timeline)[4:] == [
        "f1 swap_out 4 6.5 4",
        "f3 run 6.5 7.5 5",
        "b3 run 7.5 8.5 5",
        "b2 run 8.5 9.5 5",
        "f1 swap_in 9.5 11 4",
        "b1 run 11 12 5",
    ]
    assert timeline.seconds == 12.0


def test_a_second_swap_uses_the_far_copy():
    timeline = run(
        CHAIN,
        Swap("f1", out_after="f1", freed_before="f2", in_after="f1", in_before="f2"),
        Swap("f1", out_after="f2", freed_before="b3", in_after="f3", in_before="b2"),
        Swap("f1", out_after="b2", freed_before="b1", in_after="b2", in_before="b1"),
    )
    assert [line for line in table(timeline) if "swap" in line] == [
        "f1 swap_out 3 5 3",
        "f1 swap_in 5 6 4",  # f2 reads this one
        "f1 swap_in 8 9 5",  # nobody reads this one
        "f1 swap_in 10 11 4",  # b1 reads this one
    ]
    assert timeline.swapped_bytes == 256


def test_the_copy_that_comes_back_may_be_written_over():
    timeline = run(
        """
        graph g(%x) -> (%b) {
          %x = Placeholder() : (float32[8,8])
          %a = Relu(%x) : (float32[8,8])
          %other = Relu(%a) : (float32[8,8])
          %b = Relu(%a) : (float32[8,8])
        }
        """,
        Swap("a", out_after="a", freed_before="b", in_after="other", in_before="b"),
    )
    # other can't be written over a, which is being copied.
    assert [step.live_bytes // 256 for step in timeline.steps] == [1, 2, 2, 3, 3, 2]


# --- recompute --------------------------------------------------------------------------------------------------


def test_recompute():
    timeline = run(CHAIN, Recompute(("f1", "f2"), before="b2"))
    assert table(timeline)[4:] == [
        "f3 run 4 5 4",  # f1 is free after f2: x w f2 f3
        "b3 run 5 6 4",  # f2 is free after f3
        "f1 recompute 6 7 4",  # x w b3 f1
        "f2 recompute 7 8 5",
        "b2 run 8 9 6",
        "b1 run 9 10 5",  # reads the second f1
    ]
    assert (timeline.peak_bytes, timeline.recomputed_seconds, timeline.seconds) == (6 * 256, 2.0, 10.0)


def test_later_repeats_read_earlier_ones():
    timeline = run(CHAIN, Recompute(("f1",), before="b3"), Recompute(("f2",), before="b2"))
    # x w f2 f3 f1; x w f3 f1 b3; x w f1 b3 f2. The first f1 is free after f2, the first f2 after f3.
    assert live(timeline) == {"x": 2, "w": 2, "f1": 4, "f2": 5, "f3": 4, "b3": 5, "b2": 6, "b1": 5}


def test_a_repeated_node_reads_what_came_back():
    timeline = run(CHAIN, swap(in_before="b2"), Recompute(("f2",), before="b2"))
    assert table(timeline)[5:] == [
        "f3 run 4 5 5",
        "b3 run 6 7 4",  # x w f3 b3
        "f1 swap_in 7 8 4",
        "f2 recompute 8 9 5",  # waits for f1
        "b2 run 9 10 6",
        "b1 run 10 11 5",
    ]


def test_results_stay_what_the_user_s_nodes_made():
    graph = CHAIN.replace(outputs=("b3", "b1"))
    timeline = run(graph, Recompute(("b3",), before="b2"))
    # The second b3 is free after b2, the first one stays: x w f1 b2 b1 b3.
    assert live(timeline)["b1"] == 6


def test_a_value_that_is_read_late_keeps_the_variable_from_being_updated_in_place():
    graph = UPDATE.format("%update = AssignSubVariableOp!(%w, %y) : ()  %late = Op(%y) : ()")
    timeline = run(graph, Recompute(("y",), before="late"))
    # The repeated y reads the old w.
    assert [step.live_bytes // 256 for step in timeline.steps] == [2, 2, 2, 3, 4, 4, 3]


# --- with an allocator ------------------------------------------------------------------------------------------


def test_the_allocator_counts_slack():
    timeline = run(
        """
        graph g() -> () {
          %a = Op() : (float32[192])
          %b = Op() : (float32[8,8])
          %use = Op(%a) : ()
          %c = Op() : (float32[128])
          %d = Op() : (float32[8,8])
          %end = Op(%b, %c, %d) : ()
        }
        """,
        allocator=Allocator(16 * 256),
    )
    # c takes a's chunk of three units, which is too small to be split.
    assert (timeline.peak_bytes, timeline.allocated_peak_bytes) == (4 * 256, 5 * 256)


HOLES = """
graph g(%x) -> () {
  %x = Placeholder() : (float32[8,8])
  %a = Op() {"workspace_bytes": 256} : (float32[8,8])
  %b = Op(%a) : (float32[8,8])
  %use = Op(%a) : ()
  %c = MatMul(%b, %b) : (float32[8,16])
}
"""


def test_no_room_shows_the_layout():
    graph = parser.parse(HOLES)
    assert run(graph).peak_bytes == 4 * 256
    with pytest.raises(NoRoom) as error:
        run(graph, allocator=Allocator(4 * 256))
    # Four units would be in use, but the two free ones lie apart.
    assert error.value.nbytes == 2 * 256
    assert error.value.after == "use"
    first = error.value.layout[0][0]
    layout = [(address - first, nbytes, owner) for address, nbytes, owner in error.value.layout]
    assert layout == [(0, 256, "x"), (256, 256, None), (512, 256, "b"), (768, 256, None)]
    assert str(error.value) == "no room for 512 bytes after node 'use'"
    assert run(graph, allocator=Allocator(5 * 256)).allocated_peak_bytes == 4 * 256


def test_the_elements_of_a_list_fill_holes():
    graph = """
    graph g(%x) -> () {{
      %x = Placeholder() : (float32[64])
      %a = MatMul(%x) : (float32[128])
      %b = MatMul(%x) : (float32[64])
      %c = MatMul(%a, %b) : (float32[64])
      %list = While(%c) {{"held_bytes": [1024], "held_pieces": [{}]}} : (variant[])
      %y = MatMul(%b, %c, %list) : (float32[64])
    }}
    """
    # x, a hole of two, b, c, and three more
    timeline = run(graph.format(4), allocator=Allocator(8 * 256))
    assert timeline.allocated_peak_bytes == timeline.peak_bytes == 8 * 256
    with pytest.raises(NoRoom, match="no room for 1024 bytes after node 'c'"):
        run(graph.format(1), allocator=Allocator(8 * 256))


def test_workspace_that_comes_before_the_outputs_lies_before_them():
    graph = parser.parse("""
    graph g(%x) -> (%b) {
      %x = Placeholder() : (float32[8,8])
      %a = Op(%x) : (float32[8,8])
      %b = Op(%x, %a) : (float32[8,32])
    }
    """)

    def placed(workspace):
        return run(graph, model=cost_model(workspace={"a": workspace}), allocator=Allocator(6 * 256))

    # x a, then four units in one piece, or two before a and two behind it.
    assert placed(Workspace(late=(512,))).peak_bytes == 6 * 256
    with pytest.raises(NoRoom):
        placed(Workspace(early=(512,)))


def test_small_buffers_go_into_the_holes_that_are_left_for_them():
    graph = parser.parse("""
    graph g(%x) -> (%small) {
      %x = Placeholder() : (float32[8,8])
      %small = Op(%x) : (float32[8,8])
      %large = Op(%x) : (float32[8,640])
    }
    """)
    model = CostModel(DeviceSpec(holes=2), Profile("", {}, {}))
    with pytest.raises(NoRoom) as error:
        run(graph, model=model, allocator=Allocator((1 + 2 * 65 + 70) * 256))
    units = [(nbytes // 256, owner) for _, nbytes, owner in error.value.layout]
    fence = (1, "")
    assert units == [(1, "x"), (1, "small"), (63, None), fence, (64, None), fence, (70, None)]


def test_a_repeated_node_whose_first_value_nobody_reads_runs_once():
    graph = parser.parse(tiny_graphs.CHAIN)
    timeline = run(graph, Recompute(("f3",), before="b3"))
    assert [(step.name, step.kind) for step in timeline.steps if step.name == "f3"] == [("f3", "recompute")]
    assert timeline.seconds == run(graph).seconds


def test_a_synchronous_swap_frees_its_source_at_once():
    def swap(**options):
        return Swap("f1", out_after="f2", freed_before="b3", in_after="b2", in_before="b1", **options)

    assert live(run(CHAIN, swap()))["f3"] == live(run(CHAIN))["f3"]
    assert live(run(CHAIN, swap(is_synchronous=True)))["f3"] == live(run(CHAIN))["f3"] - 1


@pytest.mark.parametrize(
    ("call", "units"),
    [
        ("SparseSoftmaxCrossEntropyWithLogits(%a, %x) : (float32[8], float32[8,64])", 8 + 8 + 1),
        ("SparseSoftmaxCrossEntropyWithLogits(%x, %a) : (float32[8], float32[8,64])", 8 + 8 + 1 + 8),
        ("SelectV2(%x, %a, %x) : (float32[8,64])", 8 + 8),
        ("SelectV2(%a, %x, %x) : (float32[8,64])", 8 + 8 + 8),
    ],
)
def test_an_output_is_written_over_the_input_that_its_kernel_reuses(call, units):
    graph = f"""
    graph g(%x) -> (%c) {{
      %x = Placeholder() : (float32[8,64])
      %a = MatMul(%x, %x) : (float32[8,64])
      %c = {call}
    }}
    """
    assert run(graph).peak_bytes == units * 256


# --- variables in far tiers -------------------------------------------------------------------------------------


# The handles' nodes take a second each, too: everything else starts at 3.
FAR = """
graph far(%x) -> (%loss) after(%store) {
  %w = Placeholder() {"store_of": "v", "tier": "host"} : (resource[])
  %spare = Placeholder() : (resource[])
  %x = Placeholder() : (float32[8,8])
  %a = MatMul(%x, %x) : (float32[8,8])
  %b = MatMul(%a, %a) : (float32[8,8])
  %fetch = Fetch(%w) {"tier": "host", "variable": "v"} : (float32[8,8])
  %y = MatMul(%b, %fetch) : (float32[8,8])
  %new = MatMul(%y, %fetch) : (float32[8,8])
  %store = Store!(%new, %w, %spare) {"tier": "host", "variable": "v"} after(%fetch, %y, %new) : ()
  %c = MatMul(%y, %y) : (float32[8,8])
  %loss = MatMul(%c, %c) : (float32[8,8])
}
"""


def test_variables_are_fetched_and_stored_in_turn():
    assert table(run(FAR))[3:] == [
        "a run 3 4 2",
        "b run 4 5 3",
        "fetch run 5 6 3",  # x b, and v
        "y run 6 7 4",
        "new run 7 8 4",  # x y v, and its new value
        "store run 8 10 3",
        "c run 10 11 3",
        "loss run 11 12 3",
    ]


def test_a_fetch_that_starts_ahead_and_a_store_that_is_written_back():
    timeline = run(FAR, Prefetch("fetch", "a", "fetch"), WriteBack("store", "loss"))
    assert table(timeline)[3:] == [
        "a run 3 4 2",
        "fetch fetch 4 5 3",
        "b run 4 5 4",
        "y run 5 6 4",
        "new run 6 7 4",
        "store store 7 9 3",
        "c run 7 8 4",  # x y c, and the new value that is on its way
        "loss run 9 10 3",  # waits for it
    ]
    assert (timeline.seconds, timeline.swapped_bytes) == (10.0, 0)
    assert run(FAR, WriteBack("store")).seconds == 10.0
    assert live(run(FAR, WriteBack("store")))["loss"] == 4


def test_a_fetch_that_starts_late_stalls_its_reader_and_queues_with_what_comes_back():
    swap_x = Swap("x", "a", "b", "b", "c")
    text = FAR.replace("%c = MatMul(%y, %y)", "%c = MatMul(%y, %x)")
    timeline = run(text, swap_x, Prefetch("fetch", "b", "fetch"))
    assert table(timeline)[3:8] == [
        "a run 3 4 2",
        "x swap_out 4 6 2",
        "b run 6 7 3",  # the argument stays, whoever reads a copy of it
        "x swap_in 7 8 3",
        "fetch fetch 8 9 4",
    ]
    assert table(timeline)[8] == "y run 9 10 5"


def test_who_waits_for_a_store_waits_for_one_that_is_written_back():
    text = FAR.replace("%c = MatMul(%y, %y)", "%c = MatMul(%y, %y) after(%store)")
    assert table(run(text, WriteBack("store")))[-2:] == ["c run 10 11 3", "loss run 11 12 3"]

"""Which variables can be divided among workers, and what then computes on parts."""

import pytest

from graphswap import ir, parser, shards

STEP = parser.parse(
    """
    graph step(%x, %w, %m, %v, %b, %key, %token) -> (%loss) after(%set_m, %set_v, %set_w, %set_b) {
      %x = Placeholder() : (float32[8,128])
      %w = Placeholder() {"held_bytes": [102400]} : (resource[])
      %m = Placeholder() {"held_bytes": [102400]} : (resource[])
      %v = Placeholder() {"held_bytes": [102400]} : (resource[])
      %b = Placeholder() {"held_bytes": [1024]} : (resource[])
      %key = Placeholder() {"is_deferred": true} : (int32[])
      %token = Placeholder() {"is_deferred": true} : (resource[])
      %size = Const() : (int32[])
      %group = Const() : (int32[])
      %rate = Const() : (float32[])
      %weight = ReadVariableOp!(%w) : (float32[128,200])
      %y = MatMul(%x, %weight) : (float32[8,200])
      %loss = L2Loss(%y) : (float32[])
      %grad = MatMul(%x, %y) : (float32[128,200])
      %flat = Reshape(%grad) : (float32[25600])
      %sum = CollectiveReduceV2!(%flat, %size, %group, %key, %token) {"workers": 3} : (float32[25600])
      %summed = Reshape(%sum) : (float32[128,200])
      %clipped = Mul(%summed, %rate) : (float32[128,200])
      %old_m = ReadVariableOp!(%m) : (float32[128,200])
      %d_m = Sub(%clipped, %old_m) : (float32[128,200])
      %add_m = Mul(%d_m, %rate) : (float32[128,200])
      %set_m = AssignAddVariableOp!(%m, %add_m) after(%old_m) : ()
      %square = Square(%clipped) : (float32[128,200])
      %set_v = AssignAddVariableOp!(%v, %square) : ()
      %new_m = ReadVariableOp!(%m) after(%set_m) : (float32[128,200])
      %new_v = ReadVariableOp!(%v) after(%set_v) : (float32[128,200])
      %root = Sqrt(%new_v) : (float32[128,200])
      %change = RealDiv(%new_m, %root) : (float32[128,200])
      %set_w = AssignSubVariableOp!(%w, %change) : ()
      %old_b = ReadVariableOp!(%b) : (float32[200])
      %set_b = AssignAddVariableOp!(%b, %old_b) : ()
      %mean = CollectiveReduceV2!(%loss, %size, %group, %key, %token) {"workers": 3} : (float32[])
      %done = NoOp!() after(%mean) : ()
    }
    """
)
"""A weight `w` with the slots `m` and `v` of an optimizer that clips, and a small variable."""

ALL = ("w", "m", "v", "b")


def changed(line: str, *lines: str) -> ir.Graph:
    """STEP with other lines in the place of the one that makes this value."""
    text = str(STEP).splitlines()
    place = next(number for number, found in enumerate(text) if found.strip().startswith(f"%{line} ="))
    return parser.parse("\n".join([*text[:place], *lines, *text[place + 1 :]]))


def test_slots_are_divided_weights_and_small_variables_are_not():
    assert shards.divisible(STEP, ALL) == ("m", "v")


def test_all_that_only_leads_to_parts_is_done_on_parts():
    assert shards.region(STEP, ("m", "v")) == {
        *("clipped", "old_m", "d_m", "add_m", "set_m", "square", "set_v", "new_m", "new_v", "root", "change")
    }


def test_the_workers_are_those_of_the_sums():
    assert shards.workers(STEP) == 3
    assert shards.part_length(ir.Value("float32", (5, 2)), 3) == 4


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("root", ["%norm = L2Loss(%new_v) : (float32[])", "%root = Mul(%new_v, %norm) : (float32[128,200])"]),
        ("d_m", ["%row = Slice(%old_m) : (float32[200])", "%d_m = Sub(%clipped, %row) : (float32[128,200])"]),
        ("root", ["%root = Cumsum(%new_v) : (float32[128,200])"]),
    ],
    ids=["norm", "row", "cumulated"],
)
def test_slots_whose_elements_meet_stay_whole(line, lines):
    graph = changed(line, *lines)
    assert not {"m", "v"} <= set(shards.divisible(graph, ALL))


def test_what_would_be_gathered_more_often_than_it_saves_stays_whole():
    lines = ["%set_w = AssignSubVariableOp!(%w, %change) : ()"]
    lines += [f"%more_{i} = AddV2(%change, %new_m) : (float32[128,200])" for i in range(2)]
    lines += [f"%copy_{i} = L2Loss(%more_{i}) : (float32[])" for i in range(2)]
    assert shards.divisible(changed("set_w", *lines), ALL) == ()


def test_a_gradient_that_others_read_is_summed_up_whole():
    graph = changed(
        "square", "%norm = L2Loss(%clipped) : (float32[])", "%square = Square(%clipped) : (float32[128,200])"
    )
    assert "clipped" not in shards.region(graph, ("m", "v"))
    assert shards.divisible(graph, ALL) == ("m", "v")


def test_only_candidates_are_divided():
    assert shards.divisible(STEP, ["m"]) == ("m",)


def test_what_can_not_be_gathered_stays_whole():
    halves = [line.replace("float32[128,200]", "bfloat16[128,200]") for line in str(STEP).splitlines()]
    assert shards.divisible(parser.parse("\n".join(halves)), ALL) == ()

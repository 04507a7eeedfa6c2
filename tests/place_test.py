import pytest
import testing

from graphswap import ir, parser
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Place, Plan, PlanError, Recompute, Swap
from graphswap.rewrites.place import place
from graphswap.simulator import simulate

STEP = parser.parse(
    """
    graph step(%x, %w, %m) -> (%loss) after(%assign_m, %assign_w) {
      %x = Placeholder() : (float32[8,8])
      %w = Placeholder() {"held_bytes": [256]} : (resource[])
      %m = Placeholder() {"held_bytes": [256]} : (resource[])
      %read_w = ReadVariableOp!(%w) : (float32[8,8])
      %y = MatMul(%x, %read_w) : (float32[8,8])
      %loss = L2Loss(%y) : (float32[])
      %grad = MatMul(%x, %y) : (float32[8,8])
      %assign_m = AssignAddVariableOp!(%m, %grad) : ()
      %read_m = ReadVariableOp!(%m) after(%assign_m) : (float32[8,8])
      %grad_x = MatMul(%y, %read_w) : (float32[8,8])
      %assign_w = AssignSubVariableOp!(%w, %read_m) after(%read_w) : ()
      %done = NoOp!() after(%assign_w, %grad_x) : ()
    }
    """
)
BOTH = Plan(decisions=(Place("w"), Place("m", "disk")))


def test_variables_are_fetched_before_their_readers_and_stored_after_them():
    testing.assert_graph_text(
        ir.verify(place(STEP, BOTH)),
        """
        graph step(%x, %w, %m, %w/store, %w/spare, %m/store, %m/spare) -> (%loss)
          after(%assign_m/store, %assign_w/store) {
          %w/store = Placeholder() {"store_of": "w", "tier": "host"} : (resource[])
          %w/spare = Placeholder() : (resource[])
          %m/store = Placeholder() {"store_of": "m", "tier": "disk"} : (resource[])
          %m/spare = Placeholder() : (resource[])
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (resource[])
          %m = Placeholder() : (resource[])
          %w/fetch = Fetch(%w/store) {"tier": "host", "variable": "w"} : (float32[8,8])
          %y = MatMul(%x, %w/fetch) : (float32[8,8])
          %loss = L2Loss(%y) : (float32[])
          %grad = MatMul(%x, %y) : (float32[8,8])
          %m/fetch = Fetch(%m/store) {"tier": "disk", "variable": "m"} : (float32[8,8])
          %assign_m/value = AddV2(%m/fetch, %grad) {"is_inserted": true} : (float32[8,8])
          %assign_m/store = Store!(%assign_m/value, %m/store, %m/spare) {"tier": "disk", "variable": "m"}
            after(%m/fetch) : ()
          # What reads m after its update reads the new value, without waiting for the store.
          %grad_x = MatMul(%y, %w/fetch) : (float32[8,8])
          %assign_w/value = Sub(%w/fetch, %assign_m/value) {"is_inserted": true} : (float32[8,8])
          # After all that read the old value: they might be repeated.
          %assign_w/store = Store!(%assign_w/value, %w/store, %w/spare) {"tier": "host", "variable": "w"}
            after(%w/fetch, %y, %grad_x) : ()
          %done = NoOp!() after(%assign_w/store, %grad_x) : ()
        }
        """,
    )


def test_a_store_waits_for_readers_of_casts():
    """A cast may be made anew for a later reader; of the new value it would be another one."""
    text = (
        str(STEP)
        .replace("%y = MatMul(%x, %read_w)", "%half = Cast(%read_w) : (float32[8,8])\n%y = MatMul(%x, %half)")
        .replace("MatMul(%y, %read_w)", "MatMul(%y, %half)")
    )
    placed = ir.verify(place(parser.parse(text), BOTH))
    assert placed.by_name["assign_w/store"].control_inputs == ("w/fetch", "half", "y", "grad_x")


def test_of_several_updates_the_last_one_is_stored():
    graph = parser.parse(
        """
        graph twice(%v, %d) -> () after(%first, %second) {
          %v = Placeholder() {"held_bytes": [256]} : (resource[])
          %d = Placeholder() : (float32[8])
          %first = AssignVariableOp!(%v, %d) : ()
          %second = AssignAddVariableOp!(%v, %d) after(%first) : ()
        }
        """
    )
    placed = place(graph, Plan(decisions=(Place("v"),)))
    assert [str(node) for node in placed.nodes if node.op in (ir.FETCH, ir.STORE, "AddV2")] == [
        '%second/value = AddV2(%d, %d) {"is_inserted": true} : (float32[8])',
        '%second/store = Store!(%second/value, %v/store, %v/spare) {"tier": "host", "variable": "v"} : ()',
    ]


ROWS = parser.parse(
    """
    graph embed(%table, %rows) -> (%out) {
      %table = Placeholder() {"held_bytes": [1024]} : (resource[])
      %rows = Placeholder() : (int32[2])
      %all = ReadVariableOp!(%table) : (float32[32,8])
      %out = ResourceGather!(%table, %rows) {"only_reads": true} : (float32[2,8])
    }
    """
)


def test_a_gather_reads_the_whole_variable():
    placed = place(ROWS, Plan(decisions=(Place("table"),)))
    assert str(placed.by_name["out"]) == '%out = GatherV2(%table/fetch, %rows) {"is_inserted": true} : (float32[2,8])'


TABLE = parser.parse(
    """
    graph embed(%table, %rows) -> (%y) after(%assign) {
      %table = Placeholder() {"held_bytes": [1024]} : (resource[])
      %rows = Placeholder() : (int32[2])
      %axis = Const() : (int32[])
      %all = ReadVariableOp!(%table) : (float32[32,8])
      %x = GatherV2(%all, %rows, %axis) : (float32[2,8])
      %y = MatMul(%x, %all) : (float32[2,32])
      %grad = MatMul(%y, %x) : (float32[32,8])
      %assign = AssignSubVariableOp!(%table, %grad) : ()
    }
    """
)


def test_where_the_host_computes_it_gathers_rows():
    """The product takes the whole table. What was viewed stays as it was: the gather may run again after the update."""
    plan = Plan(decisions=(Place("table", computes_there=True),))
    placed = ir.verify(place(TABLE, plan))
    assert [str(node) for node in placed.nodes if node.op in (ir.FETCH, ir.VIEW, "GatherV2", "MatMul", ir.UPDATE)][
        :4
    ] == [
        '%table/view = View(%table/store) {"held_bytes": [0], "tier": "host", "variable": "table"} : (float32[32,8])',
        '%table/fetch = Fetch(%table/store) {"tier": "host", "variable": "table"} : (float32[32,8])',
        "%x = GatherV2(%table/view, %rows, %axis) : (float32[2,8])",
        "%y = MatMul(%x, %table/fetch) : (float32[2,32])",
    ]
    assert placed.by_name["table/update"].control_inputs == ("table/view", "table/fetch", "y")
    with pytest.raises(PlanError, match="'table/view' would bring back what 'table/update' has stored"):
        Plan(decisions=(Recompute(("table/view",), "late"),)).check(
            placed.replace(nodes=(*placed.nodes, ir.Node("late", "NoOp")))
        )
    with pytest.raises(PlanError, match="'table/view' is in a far tier"):
        Plan(decisions=(Swap("table/view", "x", "y", "x", "y"),)).check(placed)


def test_a_table_of_which_only_rows_are_read_is_not_fetched():
    text = str(TABLE).replace("MatMul(%x, %all)", "MatMul(%x, %x)")
    placed = ir.verify(place(parser.parse(text), Plan(decisions=(Place("table", computes_there=True),))))
    assert not [node for node in placed.nodes if node.op == ir.FETCH]
    assert placed.by_name["x"].inputs == ("table/view", "rows", "axis")
    elsewhere = ir.verify(place(parser.parse(text), Plan(decisions=(Place("table"),))))
    assert elsewhere.by_name["x"].inputs == ("table/fetch", "rows", "axis")


def test_a_gather_reads_rows_where_the_host_computes():
    placed = place(ROWS, Plan(decisions=(Place("table", computes_there=True),)))
    assert str(placed.by_name["out"]) == '%out = GatherV2(%table/view, %rows) {"is_inserted": true} : (float32[2,8])'


def test_a_fetch_takes_no_more_than_its_value():
    graph = parser.parse(
        """
        graph large(%v) -> (%read) {
          %v = Placeholder() {"held_bytes": [33554432]} : (resource[])
          %read = ReadVariableOp!(%v) : (float32[8388608])
        }
        """
    )
    placed = place(graph, Plan(decisions=(Place("v"),)))
    assert placed.inputs == ("v", "v/store", "v/spare")
    assert placed.by_name["v/fetch"].inputs == ("v/store",)
    model = CostModel(DeviceSpec(links={"host": Link(1e9, 2**30, 0.0)}))
    assert model.seconds(placed, placed.by_name["v/fetch"]) == 1 / 32
    assert simulate(placed, Plan(), model).peak_bytes == 32 << 20


def test_without_places_it_is_the_same_object():
    assert place(STEP, Plan(order=tuple(STEP.by_name))) is STEP


def test_a_variable_that_has_to_stay_is_refused():
    graph = parser.parse(f"{str(STEP).removesuffix('}')}  %branch = If!(%loss, %w) : (float32[8,8])\n}}")
    with pytest.raises(PlanError, match="Place.* does not fit graph 'step': 'branch' .If. takes the variable itself"):
        place(graph, BOTH)


def test_a_variable_that_nothing_uses_only_leaves():
    text = str(STEP).replace("{\n", '{\n  %idle = Placeholder() {"held_bytes": [256]} : (resource[])\n', 1)
    placed = place(parser.parse(text), Plan(decisions=(Place("idle"),)))
    assert placed.inputs == STEP.inputs
    assert not placed.by_name["idle"].attrs


def test_the_graph_says_what_is_placed():
    assert place(STEP, BOTH).placed == {"w": "host", "m": "disk"}
    assert STEP.placed == {}


def test_what_far_memory_does_not_take_stays():
    graph = parser.parse(
        """
        graph small(%v) -> (%read) {
          %v = Placeholder() {"held_bytes": [256]} : (resource[])
          %read = ReadVariableOp!(%v) : (float8_e5m2[256])
        }
        """
    )
    with pytest.raises(PlanError, match=r"values of its type stay on the device: float8_e5m2\[256\]"):
        place(graph, Plan(decisions=(Place("v"),)))


def test_what_is_no_variable_is_refused():
    with pytest.raises(PlanError, match="variable='x'.* it has no such variable"):
        place(STEP, Plan(decisions=(Place("x"),)))


def test_plans_with_places_are_for_the_graph_that_was_made():
    placed = place(STEP, BOTH)
    assert BOTH.check(placed) is BOTH
    assert Plan.from_json(BOTH.to_json()) == BOTH
    assert "place      m  disk" in str(BOTH)
    there = Plan(decisions=(Place("m", "disk", computes_there=True, reason="slots"),))
    assert Plan.from_json(there.to_json()) == there
    assert "place      m  disk, host computes  (slots)" in str(there)
    with pytest.raises(PlanError, match="'w' is on the device in this graph"):
        BOTH.check(STEP)
    with pytest.raises(PlanError, match="expected a tier out of .* received 'tape'"):
        Plan(decisions=(Place("w", "tape"),)).check(placed)


def test_nothing_is_fetched_again_once_it_is_stored():
    placed = place(STEP, BOTH)
    Plan(decisions=(Recompute(("w/fetch",), "grad_x"),)).check(placed)
    with pytest.raises(PlanError, match="'w/fetch' would bring back what 'assign_w/store' has stored"):
        Plan(decisions=(Recompute(("w/fetch",), "done"),)).check(placed)

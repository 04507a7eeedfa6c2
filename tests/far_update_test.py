import pytest
import testing

from graphswap import ir, parser
from graphswap.plan import Place, Plan
from graphswap.rewrites.place import place

HEAD = """
    graph step(%x, %w, %m, %rate) -> (%loss) after(%assign_m, %assign_w) {
      %x = Placeholder() : (float32[8,8])
      %w = Placeholder() {"held_bytes": [256]} : (resource[])
      %m = Placeholder() {"held_bytes": [256]} : (resource[])
      %rate = Placeholder() : (float32[])
      %read_w = ReadVariableOp!(%w) : (float32[8,8])
      %y = MatMul(%x, %read_w) : (float32[8,8])
      %loss = L2Loss(%y) : (float32[])
      %grad = MatMul(%x, %y) : (float32[8,8])
"""
MOMENTUM = parser.parse(
    f"""{HEAD}
      %read_m = ReadVariableOp!(%m) : (float32[8,8])
      %kept = Mul(%read_m, %rate) : (float32[8,8])
      %new_m = AddV2(%kept, %grad) : (float32[8,8])
      %assign_m = AssignVariableOp!(%m, %new_m) after(%read_m) : ()
      %step = Mul(%new_m, %rate) : (float32[8,8])
      %grad_x = MatMul(%y, %read_w) : (float32[8,8])
      %assign_w = AssignSubVariableOp!(%w, %step) after(%read_w) : ()
      %done = NoOp!() after(%assign_w, %grad_x) : ()
    }}
    """
)


def placed(graph, **tiers):
    return ir.verify(place(graph, Plan(decisions=tuple(Place(name, tier, True) for name, tier in tiers.items()))))


def updates(graph):
    return [node for node in graph.nodes if node.op == ir.UPDATE]


def test_what_a_step_computes_of_variables_is_one_update():
    testing.assert_graph_text(
        placed(MOMENTUM, w="host", m="disk"),
        """
        graph step(%x, %w, %m, %rate, %w/store, %w/spare, %m/store, %m/spare) -> (%loss) after(%m/update) {
          %w/store = Placeholder() {"store_of": "w", "tier": "host", "computes_there": true} : (resource[])
          %w/spare = Placeholder() : (resource[])
          %m/store = Placeholder() {"store_of": "m", "tier": "disk", "computes_there": true} : (resource[])
          %m/spare = Placeholder() : (resource[])
          %x = Placeholder() : (float32[8,8])
          %w = Placeholder() : (resource[])
          %m = Placeholder() : (resource[])
          %rate = Placeholder() : (float32[])
          %w/fetch = Fetch(%w/store) {"tier": "host", "variable": "w"} : (float32[8,8])
          %y = MatMul(%x, %w/fetch) : (float32[8,8])
          %loss = L2Loss(%y) : (float32[])
          %grad = MatMul(%x, %y) : (float32[8,8])
          # The slot is never fetched.
          %grad_x = MatMul(%y, %w/fetch) : (float32[8,8])
          %m/update = Update!(%rate, %grad, %m/store, %m/spare, %w/store, %w/spare)
            {"dtype": "float32", "program": "4; Mul 2 0; AddV2 4 1; Mul 5 0; Sub 3 6; 5 7", "shape": [8, 8],
             "stored": [0, 1], "values": 2} after(%w/fetch, %y, %grad_x) : ()
          %done = NoOp!() after(%m/update, %grad_x) : ()
        }
        """,
    )


def test_what_a_weight_on_the_device_changes_by_comes_there():
    graph = placed(MOMENTUM, m="host")
    (update,) = updates(graph)
    assert update.inputs == ("rate", "grad", "m/store", "m/spare")
    assert dict(update.attrs)["program"] == "3; Mul 2 0; AddV2 3 1; Mul 4 0; 5 4"
    assert update.outputs == (ir.Value("float32", (8, 8)),)
    assert graph.by_name["assign_w"].inputs == ("w", "m/update")
    assert not [node for node in graph.nodes if node.op in (ir.FETCH, ir.STORE)]
    assert graph.stores == {"m/store": "m/update"}


def test_only_where_the_decision_says_so():
    decisions = (Place("m"), Place("w", computes_there=True))
    graph = ir.verify(place(MOMENTUM, Plan(decisions=decisions)))
    (update,) = updates(graph)
    assert update.inputs == ("new_m", "rate", "w/store", "w/spare")
    assert "m/fetch" in graph.by_name


def norm_of(value):
    """A step that scales the gradient by a norm of a value, adding a penalty for large weights."""
    return parser.parse(
        f"""{HEAD}
      %penalty = Mul(%read_w, %rate) : (float32[8,8])
      %whole = AddV2(%grad, %penalty) : (float32[8,8])
      %read_m = ReadVariableOp!(%m) : (float32[8,8])
      %norm = L2Loss(%{value}) : (float32[])
      %scaled = Mul(%whole, %norm) : (float32[8,8])
      %new_m = AddV2(%read_m, %scaled) : (float32[8,8])
      %assign_m = AssignVariableOp!(%m, %new_m) after(%read_m) : ()
      %assign_w = AssignSubVariableOp!(%w, %new_m) after(%read_w) : ()
    }}
    """
    )


def test_nothing_waits_for_itself():
    """The norm is of what is computed of a weight: that has to be there before the update begins."""
    graph = placed(norm_of("whole"), w="host", m="host")
    (update,) = updates(graph)
    assert update.inputs[:1] == ("whole",)
    assert graph.by_name["norm"].inputs == ("whole",)
    assert dict(update.attrs)["program"] == "4; Mul 0 1; AddV2 2 4; Sub 3 5; 5 6"


def test_a_norm_of_the_gradient_alone_is_known_before():
    (update,) = updates(placed(norm_of("grad"), w="host", m="host"))
    assert update.inputs[:3] == ("rate", "grad", "norm")
    assert dict(update.attrs)["program"] == "5; Mul 3 0; AddV2 1 5; Mul 6 2; AddV2 4 7; Sub 3 8; 8 9"


def test_what_is_read_of_new_values_comes_of_the_update():
    text = str(MOMENTUM).replace("-> (%loss)", "-> (%new_m)").replace("MatMul(%y, %read_w)", "MatMul(%y, %new_m)")
    graph = placed(parser.parse(text), w="host", m="host")
    (update,) = updates(graph)
    assert graph.outputs == (update.name,)
    assert graph.by_name["grad_x"].inputs == ("y", update.name)
    assert str(dict(update.attrs)["program"]).endswith("; 5 5 7")


def test_the_only_value_of_before_that_another_node_stores_is_fetched():
    """The update of w reads m, whose new value comes of something else."""
    graph = parser.parse(
        f"""{HEAD}
      %read_m = ReadVariableOp!(%m) : (float32[8,8])
      %squashed = Tanh(%read_m) : (float32[8,8])
      %assign_w = AssignSubVariableOp!(%w, %read_m) after(%read_w) : ()
      %assign_m = AssignVariableOp!(%m, %squashed) after(%read_m) : ()
    }}
    """
    )
    graph = placed(graph, w="host", m="host")
    (update,) = updates(graph)
    assert update.inputs == ("m/fetch", "w/store", "w/spare")
    assert graph.by_name["assign_m/store"].op == ir.STORE


def test_what_has_nothing_to_do_with_far_memory_is_left_alone():
    """An average of a weight that something else stores, on the device."""
    graph = parser.parse(
        f"""{HEAD}
      %less = Sub(%grad, %read_w) : (float32[8,8])
      %assign_m = AssignVariableOp!(%m, %less) : ()
      %squashed = Tanh(%read_w) : (float32[8,8])
      %assign_w = AssignVariableOp!(%w, %squashed) after(%read_w) : ()
    }}
    """
    )
    assert not updates(placed(graph, w="host"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_values_of_other_types_come_to_the_device(dtype):
    graph = placed(parser.parse(str(MOMENTUM).replace("float32", dtype)), w="host", m="host")
    assert not updates(graph)
    assert {"w/fetch", "m/fetch"} <= graph.by_name.keys()


def test_an_old_value_is_fetched_before_the_update_though_there_are_two():
    """The first assign makes the value that is read then: of the fetch only another reader is left."""
    graph = parser.parse(
        """
        graph twice(%w, %rate, %grad) -> (%loss) after(%decay, %assign) {
          %w = Placeholder() {"held_bytes": [256]} : (resource[])
          %rate = Placeholder() : (float32[])
          %grad = Placeholder() : (float32[8,8])
          %read = ReadVariableOp!(%w) : (float32[8,8])
          %penalty = Tanh(%read) : (float32[8,8])
          %loss = L2Loss(%penalty) : (float32[])
          %less = Mul(%read, %rate) : (float32[8,8])
          %decay = AssignVariableOp!(%w, %less) after(%read) : ()
          %again = ReadVariableOp!(%w) after(%decay) : (float32[8,8])
          %new = Sub(%again, %grad) : (float32[8,8])
          %assign = AssignVariableOp!(%w, %new) after(%again) : ()
        }
        """
    )
    (update,) = updates(placed(graph, w="host"))
    assert update.control_inputs == ("w/fetch", "penalty")
    old = str(graph).replace("(%loss)", "(%read)")
    (update,) = updates(placed(parser.parse(old), w="host"))
    assert update.control_inputs == ("w/fetch", "penalty")


def test_what_would_wait_for_itself_keeps_nothing_else_from_its_update():
    """By how much a changes is reported, read of its old value: that has to be fetched before what it waits for."""
    graph = parser.parse(
        """
        graph report(%g, %a, %b) -> (%norm) after(%assign_a, %assign_b) {
          %g = Placeholder() : (float32[8,8])
          %a = Placeholder() {"held_bytes": [256]} : (resource[])
          %b = Placeholder() {"held_bytes": [256]} : (resource[])
          %read_a = ReadVariableOp!(%a) : (float32[8,8])
          %new_a = Sub(%read_a, %g) : (float32[8,8])
          %delta = Tanh(%new_a, %read_a) : (float32[8,8])
          %norm = L2Loss(%delta) : (float32[])
          %read_b = ReadVariableOp!(%b) : (float32[8,8])
          %new_b = Sub(%read_b, %g) : (float32[8,8])
          %assign_a = AssignVariableOp!(%a, %new_a) after(%delta) : ()
          %assign_b = AssignVariableOp!(%b, %new_b) : ()
        }
        """
    )
    graph = placed(graph, a="host", b="host")
    assert [node.name for node in updates(graph)] == ["b/update"]
    assert graph.by_name["assign_a/store"].inputs[0] == "new_a"


def test_what_folding_will_change_is_left_to_it():
    text = str(MOMENTUM).replace("%kept = Mul(%read_m, %rate)", '%kept = Mul(%read_m, %rate) {"is_folded": true}')
    graph = placed(parser.parse(text), w="host", m="host")
    assert graph.by_name["kept"].inputs == ("m/fetch", "rate")
    (update,) = updates(graph)  # of the weight alone: the slot's new value comes of what was left
    assert update.inputs == ("new_m", "rate", "w/store", "w/spare")
    assert graph.by_name["assign_m/store"].inputs[0] == "new_m"


def test_there_is_an_update_for_each_weight():
    graph = parser.parse(
        """
        graph two(%g, %a, %b) -> () after(%assign_a, %assign_b) {
          %g = Placeholder() : (float32[8,8])
          %a = Placeholder() {"held_bytes": [256]} : (resource[])
          %b = Placeholder() {"held_bytes": [256]} : (resource[])
          %read_a = ReadVariableOp!(%a) : (float32[8,8])
          %read_b = ReadVariableOp!(%b) : (float32[8,8])
          %less_a = Sub(%read_a, %g) : (float32[8,8])
          %less_b = Sub(%read_b, %g) : (float32[8,8])
          %assign_a = AssignVariableOp!(%a, %less_a) : ()
          %assign_b = AssignVariableOp!(%b, %less_b) : ()
        }
        """
    )
    assert [node.name for node in updates(placed(graph, a="host", b="host"))] == ["a/update", "b/update"]

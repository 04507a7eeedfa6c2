import pytest

from graphswap import ir, parser
from graphswap.variables import far_bytes, trips, unplaceable, values, worth_moving

STEP = parser.parse(
    """
    graph step(%x, %w, %m, %b) -> (%loss) after(%assign_m, %assign_w) {
      %x = Placeholder() : (float32[8,256])
      %w = Placeholder() {"held_bytes": [262144]} : (resource[])
      %m = Placeholder() {"held_bytes": [262144]} : (resource[])
      %b = Placeholder() {"held_bytes": [1024]} : (resource[])
      %read_w = ReadVariableOp!(%w) : (float32[256,256])
      %read_b = ReadVariableOp!(%b) : (float32[256])
      %y = MatMul(%x, %read_w) : (float32[8,256])
      %z = BiasAdd(%y, %read_b) : (float32[8,256])
      %loss = L2Loss(%z) : (float32[])
      %grad = MatMul(%x, %z) : (float32[256,256])
      %grad_x = MatMul(%z, %read_w) : (float32[8,256])
      %assign_m = AssignAddVariableOp!(%m, %grad) : ()
      %read_m = ReadVariableOp!(%m) after(%assign_m) : (float32[256,256])
      %assign_w = AssignSubVariableOp!(%w, %read_m) after(%read_w) : ()
    }
    """
)
SQUARE, ROW = ir.Value("float32", (256, 256)), ir.Value("float32", (256,))


def test_values_are_what_reads_and_assigns_say():
    assert values(STEP) == {"w": SQUARE, "m": SQUARE, "b": ROW}


def test_a_weight_travels_for_every_product_and_a_slot_for_its_update():
    assert trips(STEP) == {"w": 3, "m": 1, "b": 0}


def test_what_is_updated_takes_twice_its_bytes_outside_of_the_device():
    assert far_bytes(STEP) == {"w": 2 * SQUARE.nbytes, "m": 2 * SQUARE.nbytes, "b": ROW.nbytes}


def test_what_travels_least_is_moved_first_and_small_variables_stay():
    assert worth_moving(STEP, {"w", "m", "b"}) == ["m", "w"]
    assert worth_moving(STEP, {"w", "b"}) == ["w"]


@pytest.mark.parametrize(
    ("last_node", "reason"),
    [
        ("%late = Relu(%read_w) after(%assign_w) : (float32[256,256])", "'late' reads its old value after its update"),
        ("%branch = If!(%loss, %w) : (float32[256])", "'branch' (If) takes the variable itself"),
    ],
)
def test_some_variables_have_to_stay(last_node, reason):
    graph = parser.parse(f"{str(STEP).removesuffix('}')}  {last_node}\n}}")
    assert unplaceable(graph)["w"].startswith(reason)
    assert "m" not in unplaceable(graph)
    assert worth_moving(graph, {"w", "m"}) == ["m"]


def test_variables_of_open_size_have_to_stay():
    graph = parser.parse(
        """
        graph open(%v) -> (%read) {
          %v = Placeholder() : (resource[])
          %read = ReadVariableOp!(%v) : (float32[?])
        }
        """
    )
    assert unplaceable(graph) == {"v": "its size is open: float32[?]"}

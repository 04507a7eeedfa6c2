import pytest
import testing

from graphswap import ir, parser
from graphswap.cost_model import CostModel, DeviceSpec, Link
from graphswap.plan import Plan, Recompute
from graphswap.rewrites.host_update import host_update
from graphswap.simulator import simulate

PS = "/job:ps/replica:0/task:0/device:CPU:0"
HOME = f'"home": "{PS}"'
STEP = parser.parse(
    f"""
    graph step(%x, %w, %b, %buffer) -> (%loss) after(%gradient) {{
      %x = Placeholder() : (float32[256,256])
      %w = Placeholder() {{"held_bytes": [262144]}} @"{PS}" : (resource[])
      %b = Placeholder() {{"held_bytes": [1024]}} @"{PS}" : (resource[])
      %buffer = Placeholder() {{"held_bytes": [262144]}} @"{PS}" : (resource[])
      %read_w = ReadVariableOp!(%w) @"{PS}" : (float32[256,256])
      %read_b = ReadVariableOp!(%b) @"{PS}" : (float32[256])
      %read_w_again = ReadVariableOp!(%w) @"{PS}" : (float32[256,256])
      %y = MatMul(%x, %read_w) : (float32[256,256])
      %z = BiasAdd(%y, %read_b) : (float32[256,256])
      %loss = L2Loss(%z) : (float32[])
      %back = MatMul(%z, %read_w_again) : (float32[256,256])
      %gradient = AssignVariableOp!(%buffer, %back) @"{PS}" : ()
    }}
    """
)


def test_the_worker_keeps_its_part_fetches_what_it_reads_and_sends_what_servers_read():
    testing.assert_graph_text(
        ir.verify(host_update(STEP)),
        f"""
        graph step(%x, %w, %b, %buffer) -> (%loss) after(%back/send) {{
          %w = Placeholder() : (resource[])
          %b = Placeholder() : (resource[])
          %buffer = Placeholder() : (resource[])
          # Small: it comes at the start.
          %b/arrived = Placeholder() {{"handle": "b", {HOME}, "source": "read_b", "tier": "ps"}} : (float32[256])
          %x = Placeholder() : (float32[256,256])
          %w/fetch = Fetch(%w) {{"home": "{PS}", "source": "read_w", "tier": "ps"}} : (float32[256,256])
          %y = MatMul(%x, %w/fetch) : (float32[256,256])
          %z = BiasAdd(%y, %b/arrived) : (float32[256,256])
          %loss = L2Loss(%z) : (float32[])
          # Both reads are of the same value.
          %back = MatMul(%z, %w/fetch) : (float32[256,256])
          %back/send = Store!(%back) {{"home": "{PS}", "tier": "ps", "value": "back"}} : ()
        }}
        """,
    )


def test_a_step_without_parameter_servers_stays_the_same_object():
    graph = testing.chain(3)
    assert host_update(graph) is graph


def test_a_value_that_changes_meanwhile_is_fetched_again_after_what_changes_it():
    graph = parser.parse(
        f"""
        graph step(%w) -> (%sum) {{
          %w = Placeholder() @"{PS}" : (resource[])
          %before = ReadVariableOp!(%w) @"{PS}" : (float32[256,256])
          %double = Mul(%before, %before) : (float32[256,256])
          %assign = AssignVariableOp!(%w, %double) @"{PS}" : ()
          %after = ReadVariableOp!(%w) @"{PS}" after(%assign) : (float32[256,256])
          %sum = AddV2(%double, %after) after(%assign) : (float32[256,256])
        }}
        """
    )
    split = ir.verify(host_update(graph))
    assert [node.name for node in split.nodes] == ["w", "w/fetch", "double", "double/send", "w/fetch_1", "sum"]
    assert split.by_name["w/fetch_1"].control_inputs == ("double/send",)
    assert split.by_name["sum"].control_inputs == ("double/send",)


def test_what_is_not_a_variable_s_value_is_refused():
    graph = parser.parse(
        f"""
        graph step(%w) -> (%y) {{
          %w = Placeholder() @"{PS}" : (resource[])
          %read = ReadVariableOp!(%w) @"{PS}" : (float32[8])
          %sum = Sum(%read) @"{PS}" : (float32[])
          %y = Mul(%sum, %sum) : (float32[])
        }}
        """
    )
    with pytest.raises(ir.GraphError, match=r"read variables of parameter servers, received node 'y' \(Mul\), which"):
        host_update(graph)


def test_servers_take_none_of_the_worker_s_memory_and_a_weight_may_come_twice():
    cost_model = CostModel(DeviceSpec(links={"ps": Link(1e9, 1e9, 1e-3)}))
    graph = host_update(STEP)
    plain = simulate(graph, Plan(), cost_model)
    matrix = 256 << 10
    assert plain.peak_bytes == 4 * matrix + 1024 + 256  # x, w, z, back; b; loss
    twice = simulate(graph, Plan(decisions=(Recompute(("w/fetch",), "back"),)), cost_model)
    fetched = matrix / 1e9 + 1e-3
    assert twice.seconds == pytest.approx(plain.seconds + fetched)

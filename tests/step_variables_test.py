"""A step's variables are moved where a plan wants them, and get their values back if the step fails."""

import emulated
import numpy as np
import pytest
import tensorflow as tf

from graphswap import graphdef, placement, step_variables, tiers
from graphswap.cost_model import DeviceSpec
from graphswap.host_variable import adopt
from graphswap.plan import Place
from graphswap.step_variables import StepVariables


class Traced:
    """A step that reads one variable, updates another and captures a third for nothing, as it was traced."""

    def __init__(self, variables=None):
        read, updated, idle = (tf.Variable(tf.ones((4, 4)), name=name) for name in ("read", "updated", "idle"))

        def step():
            idle.handle  # noqa: B018 (the function captures what it touches)
            updated.assign_add(tf.matmul(read, updated) + tf.reduce_sum(idle) * 0.0)

        self.func_graph = tf.function(step, autograph=False).get_concrete_function().graph
        self.graph = graphdef.import_function(self.func_graph, [])
        self.variables = StepVariables(tiers.Tiers()) if variables is None else variables
        self.captured = self.variables.captured(self.func_graph)
        self.names = {variable.name.partition(":")[0]: name for name, variable in self.captured.items()}
        self.read, self.updated, self.idle = read, updated, idle

    def place(self, *places):
        places = [Place(self.names[name], tier) for name, tier in places]
        self.variables.place(self.func_graph, self.graph, self.captured, places, DeviceSpec(), [])


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_failed_step_leaves_what_lies_in_far_tiers(tier):
    step = Traced()
    step.place(("updated", tier))

    @tf.function(autograph=False)
    def run():
        step.updated.assign(tf.zeros((4, 4)))

    step.variables.prepare()
    run()
    assert not step.variables.restore()  # of those on the device nothing is kept where no bytes are counted
    np.testing.assert_array_equal(step.updated.numpy(), np.ones((4, 4)))
    step.variables.prepare()
    run()
    step.variables.done(1.0)
    step.variables.commit(None)
    step.variables.restore()
    np.testing.assert_array_equal(step.updated.numpy(), np.zeros((4, 4)))


def test_variables_move_to_their_places_and_the_others_to_the_device():
    step = Traced()
    adopt(step.read).move("host")
    step.place(("updated", "disk"))
    assert step_variables.away(step.captured) == [step.names["updated"]]
    assert adopt(step.read).tier == "device" and adopt(step.updated).tier == "disk"
    step.variables.move(step.captured, [Place(step.names["updated"], "host")])
    assert step_variables.hosted_bytes(step.captured) == {step.names["updated"]: 64}
    assert not step.variables.move(step.captured, [Place(step.names["updated"], "host")])


def test_traces_are_stale_once_a_variable_has_moved():
    step = Traced()
    step.place(("updated", "host"))
    assert not step.variables.is_stale()
    adopt(step.updated).move("device")
    assert step.variables.is_stale()
    step.variables.forget()
    assert not step.variables.is_stale()


def test_what_another_trace_has_placed_stays_there():
    step = Traced()
    adopt(step.read).move("host")
    assert step.variables.fixed(step.graph, step.captured) == []
    step.place(("read", "host"))
    fixed = [Place(step.names["read"], "host")]
    assert step.variables.fixed(step.graph, step.captured) == fixed
    assert step.variables.variant(tiers.Tiers()).fixed(step.graph, step.captured) == fixed
    assert StepVariables(tiers.Tiers()).fixed(step.graph, step.captured) == []
    nothing = step.graph.replace(nodes=[node for node in step.graph.nodes if node.op == "Placeholder"], outputs=())
    assert StepVariables(tiers.Tiers()).fixed(nothing, step.captured) == fixed


def test_a_state_takes_twice_what_does_not_lie_on_disk(tmp_path):
    step = Traced(StepVariables(tiers.Tiers(tmp_path)))
    places = [Place(step.names["read"], "host"), Place(step.names["updated"], "disk")]
    assert step.variables.state_bytes(step.captured, ()) == 0
    assert step.variables.state_bytes(step.captured, places) == 2 * 2 * 64
    assert Traced().variables.state_bytes(step.captured, places) == 0


def what_is_kept(is_compiled):
    """Of five steps of one plan: before which of them the variables on the device were kept."""
    step = Traced(StepVariables(tiers.Tiers(), is_compiled=is_compiled))
    step.variables.arrange(step.func_graph, step.captured, DeviceSpec(), [])
    kept = []
    for _ in range(5):
        step.variables.prepare()
        kept.append(step.variables.restore())
        step.variables.done(1.0)
    return kept


@pytest.mark.parametrize(("is_compiled", "kept"), [(False, [True] * 5), (True, [True] * 3 + [False] * 2)])
def test_a_compiled_step_that_has_run_is_not_kept_for(is_compiled, kept):
    assert emulated.call(64 << 20, __file__, "what_is_kept", is_compiled) == kept


def free_in_one_piece(count, side):
    """Places all but one of a step's large variables, and takes nearly all of the device's free memory at once."""
    biases = [tf.Variable(tf.zeros((side,))) for _ in range(count)]  # fill what holes there are in front
    fences = placement.leave_holes([16 << 10], "CPU:0", 64 << 10)  # the hole is for the variables' own handles
    weights = [tf.Variable(tf.fill((side, side), float(index))) for index in range(count)]

    def step(x):
        for weight, bias in zip(weights, biases, strict=True):
            weight.assign_add(tf.matmul(x, weight) + bias)

    x = np.ones((side, side), np.float32)
    func_graph = tf.function(step, autograph=False).get_concrete_function(x).graph
    graph = graphdef.import_function(func_graph, [x.shape])
    found, device = StepVariables(tiers.Tiers()), DeviceSpec(holes=4)
    captured = found.captured(func_graph)
    found.arrange(func_graph, captured, device, [x])
    large = [name for name, variable in captured.items() if len(variable.shape) == 2]
    places = [Place(name, "host") for name in large[1:]]
    found.place(func_graph, graph, captured, places, device, [x])
    sums = [float(tf.reduce_sum(weight)) for weight in weights]
    in_use = tf.config.experimental.get_memory_info("CPU:0")["current"]
    free = (64 << 20) - in_use - (1 << 20)
    is_free = tf.raw_ops.Empty(shape=[free], dtype=tf.uint8).shape == (free,)
    del fences
    return in_use, is_free, sums


def test_variables_that_leave_free_the_device_in_one_piece():
    count, side = 40, 512
    in_use, is_free, sums = emulated.call(64 << 20, __file__, "free_in_one_piece", count, side)
    assert 2 * side**2 * 4 <= in_use < 3 * side**2 * 4  # one variable and the batch
    assert is_free
    assert sums == [index * side**2 for index in range(count)]


if __name__ == "__main__":
    emulated.main(globals())

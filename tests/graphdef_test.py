"""From TensorFlow's graphs to ours and back: nothing is lost, nothing is added, the values stay."""

import functools
import gc
from typing import Any, cast

import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings

from graphswap import graphdef, ir, liveness, pipeline, profiler, rewrites, tiers
from graphswap.cost_model import CostModel, DeviceSpec
from graphswap.plan import Plan


def traced(function, *specs):
    """The graph of a function as the pipeline meets it: traced, and not optimised yet."""
    return tf.function(function, autograph=False).get_concrete_function(*specs).graph


def floats(*shape):
    return tf.TensorSpec(shape, tf.float32)


def ops(graph):
    return [node.op for node in graph.nodes]


def run(func_graph, graph, *arguments):
    """The results of `graph`, run as a function of its own."""
    function = graphdef.build_function(func_graph, graph, tiers.Tiers())
    captures = [external for external, _ in func_graph.captures]
    return function._call_flat([*map(tf.convert_to_tensor, arguments), *captures], [])


def training_step():
    """A step with everything that import has to mind: variables, dropout, state, control edges."""
    random = np.random.default_rng(0)
    weights = [tf.Variable(random.normal(0, 0.1, (64, 64)).astype("float32")) for _ in range(5)]
    count = tf.Variable(0)

    def step(x):
        count.assign_add(1)
        with tf.GradientTape() as tape:
            y = x
            for weight in weights:
                y = tf.nn.relu(y @ weight)
                y = tf.nn.experimental.stateless_dropout(y, 0.1, (count.read_value(), 0))
            loss = tf.reduce_mean(tf.square(y))
        for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(gradient)
        return loss, tf.identity(count)

    return step, [*weights, count]


# --- import -----------------------------------------------------------------------------------------------------


def test_copies_are_looked_through():
    def function(x):
        a, b = tf.identity_n([tf.identity(x + 1), x])
        return a * b

    graph = graphdef.import_function(traced(function, floats(2)))
    product = next(node for node in graph.nodes if node.op == "Mul")
    assert product.inputs == ("add", "x")


def test_copies_that_wait_for_something_stay():
    def function(x):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return tf.identity(x) * 2

    graph = graphdef.import_function(traced(function, floats(2)))
    product = next(node for node in graph.nodes if node.op == "Mul")
    assert graph.by_name[product.inputs[0]].op == "Identity"


def test_nodes_that_nothing_needs_are_left_out():
    def function(x):
        tf.exp(x)
        return x + 1

    assert "Exp" not in ops(graphdef.import_function(traced(function, floats(2))))


def test_state_changes_are_kept_though_nothing_reads_them():
    variable = tf.Variable(tf.zeros(2))

    def function(x):
        variable.assign(x)
        return x

    assert "AssignVariableOp" in ops(graphdef.import_function(traced(function, floats(2))))


def test_what_depends_on_constants_alone_is_a_constant():
    def function(x):
        return x + tf.exp(tf.fill((64, 64), 2.0)) + tf.random.uniform((64, 64))

    graph = graphdef.import_function(traced(function, floats(64, 64)))
    assert "Exp" not in ops(graph)
    assert "Fill" not in ops(graph)
    assert "RandomUniform" in ops(graph)


def test_large_constants_are_not_folded():
    def function(x):
        return x + tf.fill((1 << 22,), 2.0)  # 16 MiB; TensorFlow folds up to 10 MiB

    assert "Fill" in ops(graphdef.import_function(traced(function, floats(1 << 22))))


def test_open_sizes_are_resolved_for_the_batch():
    def function(x):
        flat = tf.reshape(tf.nn.relu(x), (-1, tf.shape(x)[1] * 3))
        return tf.concat([flat, flat], 0)

    func_graph = traced(function, floats(None, None, 3))
    graph = graphdef.import_function(func_graph, [(8, 5, 3)])
    shapes = {node.op: node.outputs[0].shape for node in graph.nodes}
    assert shapes["Relu"] == (8, 5, 3)
    assert shapes["Reshape"] == (8, 15)
    assert shapes["ConcatV2"] == (16, 15)
    with pytest.raises(graphdef.UnsupportedGraphError, match=r"from node 'x' \(Placeholder\)"):
        graphdef.import_function(func_graph)


def test_variables_hold_their_bytes():
    variable, table = tf.Variable(tf.zeros((100, 3))), tf.Variable(tf.zeros((7,), tf.float64))
    graph = graphdef.import_function(traced(lambda x: x + variable + tf.cast(table[0], "float32"), floats(100, 3)))
    handles = [node for node in graph.nodes if node.outputs[:1] == (ir.Value("resource"),)]
    held = [dict(node.attrs)["held_bytes"] for node in handles]
    assert sorted(held) == [(256,), (1280,)]  # in the allocator's units of 256


def test_captures_are_called_by_their_variables():
    weight, other, names = tf.Variable(tf.ones((4, 4)), name="layer/weight"), tf.Variable(1.0, name="Square"), set()
    constant = tf.range(100.0)

    def step(x):
        return tf.square(x @ weight) * other, constant + 1.0

    for _ in range(2):
        func_graph = traced(step, floats(4, 4))
        graph = graphdef.import_function(func_graph)
        names.add(graph.inputs)
        square, more = run(func_graph, graph, np.ones((4, 4), "float32"))
        assert square[0, 0] == 16 and more[1] == 2
    assert names == {("x", "layer/weight", "Square_1", "capture_2")}  # TensorFlow counts on from trace to trace


def test_a_variable_that_is_gone_has_no_name():
    def step(variable):
        return lambda x: x @ variable

    func_graph = traced(step(tf.Variable(tf.ones((4, 4)))), floats(4, 4))
    gc.collect()
    assert graphdef.import_function(func_graph).inputs == ("x", "capture_0")


def test_control_edges_survive():
    variable = tf.Variable(0.0)

    def function(x):
        variable.assign(x)
        before = variable.read_value()
        variable.assign(2 * x)
        return before

    graph = graphdef.import_function(traced(function, floats()))
    first, second = (node for node in graph.nodes if node.op == "AssignVariableOp")
    read = next(node for node in graph.nodes if node.op == "ReadVariableOp")
    assert first.name in read.control_inputs
    assert {first.name, read.name} & set(second.control_inputs)
    assert set(graph.control_outputs) >= {second.name}


def test_two_traces_have_one_fingerprint():
    step, _ = training_step()
    first, second = (graphdef.import_function(traced(step, floats(8, 64))) for _ in range(2))
    assert first.fingerprint == second.fingerprint


# --- export -----------------------------------------------------------------------------------------------------


def as_text(definition):
    """A GraphDef as text, control inputs sorted: their order means nothing."""
    for node in definition.node:
        controls = sorted(name for name in node.input if name.startswith("^"))
        node.input[:] = [name for name in node.input if not name.startswith("^")] + controls
    return str(definition)


def test_export_of_what_was_imported_computes_the_same_and_adds_nothing():
    step, _ = training_step()
    func_graph = traced(step, floats(8, 64))
    names = [operation.name for operation in func_graph.get_operations()]
    graph = graphdef.import_function(func_graph)
    graphdef.export_function(func_graph, graph, tiers.Tiers())
    assert [operation.name for operation in func_graph.get_operations()] == names
    assert graphdef.import_function(func_graph) == graph
    before = as_text(func_graph.as_graph_def())
    graphdef.export_function(func_graph, graph, tiers.Tiers())
    assert as_text(func_graph.as_graph_def()) == before


def test_a_built_function_equals_the_original():
    step, variables = training_step()
    concrete = tf.function(step, autograph=False).get_concrete_function(floats(8, 64))
    x = tf.random.stateless_normal((8, 64), (1, 2))
    before = [variable.numpy() for variable in variables]
    expected = concrete(x)
    after = [variable.numpy() for variable in variables]
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    received = run(concrete.graph, graphdef.import_function(concrete.graph), x)
    np.testing.assert_array_equal(received[0], expected[0])
    for variable, value in zip(variables, after, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def evicting_plan(graph) -> Plan:
    return trainings.EvictAll().plan(graph, CostModel(DeviceSpec()), 1)


def test_swaps_and_repeats_run_after_tensorflows_optimisers():
    step, variables = training_step()
    func_graph = traced(step, floats(512, 64))
    graph = graphdef.import_function(func_graph)
    plan = evicting_plan(graph)
    rewritten = rewrites.rewrite(graph, plan)
    inserted = [node for node in rewritten.nodes if node.name not in graph.by_name]
    repeated = [node.name for node in inserted if node.like]
    assert repeated
    assert plan.swaps
    function = graphdef.build_function(func_graph, rewritten, tiers.Tiers())
    x = tf.random.stateless_normal((512, 64), (1, 2))
    arguments = [x, *(external for external, _ in func_graph.captures)]
    with profiler.recording() as events:
        function._call_flat(arguments, [])
    executed = [name for _, _, name, _ in events]
    names = {name.rpartition(":")[0] for name in executed}
    assert set(repeated) <= names
    for node in inserted:
        kind = {ir.SWAP_OUT: "SerializeTensor", ir.SWAP_IN: "ParseTensor"}.get(node.op)
        assert kind is None or f"{node.name}/{kind}:{kind}" in executed, node


def test_the_planned_order_is_the_executed_order():
    step, variables = training_step()
    func_graph = traced(step, floats(512, 64))
    graph = graphdef.import_function(func_graph)
    rewritten = rewrites.rewrite(graph, evicting_plan(graph))
    function = graphdef.build_function(func_graph, rewritten, tiers.Tiers())
    arguments = [tf.ones((512, 64)), *(external for external, _ in func_graph.captures)]
    with profiler.recording() as events:
        function._call_flat(arguments, [])
    starts = {name.rpartition(":")[0]: start for start, _, name, _ in events}
    # Grappler drops a node if all its readers read a repeated one.
    times = [starts[node.name] for node in rewritten.nodes if node.op in ("MatMul", "Relu") and node.name in starts]
    assert len(times) > 15
    assert times == sorted(times)


# --- variables --------------------------------------------------------------------------------------------------


def test_variables_and_which_of_them_are_assigned():
    kernel, statistic = tf.Variable(tf.ones((4, 8))), tf.Variable(tf.ones(8))

    def step(x):
        y = tf.matmul(x, kernel)
        statistic.assign(tf.reduce_mean(y, 0))
        kernel.assign_sub(tf.matmul(x, y, transpose_a=True))
        return y

    found = graphdef.variables(traced(step, floats(2, 4)))
    assert {id(variable.handle): variable.is_assigned for variable in found} == {
        id(kernel.handle): False,
        id(statistic.handle): True,
    }
    assert all(variable.dtype == tf.float32 for variable in found)


# --- what TensorFlow's optimiser will do -------------------------------------------------------------------------


def folded(step, *specs):
    func_graph = traced(step, *specs)
    folding = graphdef.constant_folding(func_graph)
    assert folding is not None
    graphdef.regroup(func_graph, folding)
    return func_graph, graphdef.import_function(func_graph, folding=folding)


def test_products_are_regrouped_as_tensorflow_will_regroup_them():
    def step(x, y):
        return tf.nn.relu(2.0 * (x * y)), y

    func_graph, graph = folded(step, floats(8, 64), floats(8, 64))
    products = [node for node in graph.nodes if node.op == "Mul"]
    assert [node.name for node in products] == ["mul/regrouped", "mul_1/regrouped"]
    constant, inner = (graph.by_name[ir.producer(reference)] for reference in products[0].inputs)
    assert (constant.op, inner.name) == ("Const", "y")
    assert products[1].inputs == ("x", "mul/regrouped")
    again = graphdef.constant_folding(func_graph)
    assert again is not None
    assert [list(again[node.name].input) for node in products] == [["mul_1/x", "y"], ["x", "mul/regrouped"]]


def test_a_product_with_two_readers_stays():
    def step(x, y):
        product = x * y
        return tf.nn.relu(2.0 * product), product

    _, graph = folded(step, floats(8, 64), floats(8, 64))
    assert [node.name for node in graph.nodes if node.op == "Mul"] == ["mul", "mul_1"]


def test_a_regrouping_that_changes_a_shape_is_left_to_tensorflow():
    _, graph = folded(lambda x, y: tf.nn.relu(2.0 * (x * y)), floats(8, 64), floats(64))
    assert [node.name for node in graph.nodes if node.op == "Mul"] == ["mul", "mul_1"]


def test_what_folding_makes_another_op_of_is_marked():
    """A quotient by a constant becomes a product, and sums with two constants one; what has been regrouped stays."""

    def step(x, y):
        return x / 3.0, (x - 0.5) + 2.0, tf.nn.relu(2.0 * (x * y)), x + y

    _, graph = folded(step, floats(8, 64), floats(8, 64))
    arithmetic = {"Mul", "RealDiv", "AddV2", "Sub"}
    marked = {node.name: ir.IS_FOLDED in dict(node.attrs) for node in graph.nodes if node.op in arithmetic}
    assert marked == {
        "truediv": True,
        "sub": True,
        "add": True,
        "mul/regrouped": False,
        "mul_1/regrouped": False,
        "add_1": False,
    }


def test_constants_that_only_the_executor_folds_are_folded():
    def step(x):
        return x + tf.tile(tf.constant([[2.0]]), (256, 256))  # Grappler leaves those above 100 KiB

    func_graph, graph = folded(step, floats(256, 256))
    grappler = graphdef.constant_folding(func_graph)
    assert grappler is not None
    assert "Tile" in {node.op for node in grappler.values()}
    assert [node.op for node in graph.nodes] == ["Placeholder", "Const", "AddV2", "Identity"]


def test_many_zeros_are_made_in_each_step():
    variable = tf.Variable(tf.ones((256, 256)))

    def step(x):
        variable.assign(tf.zeros((256, 256)))
        return x + tf.zeros((8, 8)) + tf.fill((8, 8), -0.0)

    func_graph = traced(step, floats(8, 8))
    graph = graphdef.import_function(func_graph)
    (zeros,) = (node for node in graph.nodes if dict(node.attrs).get(ir.IS_ZEROS))
    assert (zeros.op, zeros.outputs) == ("Fill", (ir.Value("float32", (256, 256)),))
    built = graphdef.build_function(func_graph, graph, tiers.Tiers())
    assert [operation.outputs[0].shape for operation in built.graph.get_operations() if operation.type == "Empty"] == [
        (256, 256)
    ]
    graphdef.run_built(built, func_graph, [tf.ones((8, 8))])
    assert not variable.numpy().any()


def test_nothing_is_regrouped_where_constant_folding_is_off():
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"constant_folding": False})
    try:
        assert graphdef.constant_folding(traced(lambda x: 2.0 * x, floats(8))) is None
    finally:
        tf.config.optimizer.set_experimental_options({"constant_folding": True, **before})


def test_equal_constants_are_counted_once():
    def step(x):
        return x + tf.fill((64, 128), 2.0), x - tf.fill((64, 128), 2.0), x * tf.fill((64, 128), 3.0)

    graph = graphdef.import_function(traced(step, floats(64, 128)))
    sizes = [liveness.output_bytes(node)[0] for node in graph.nodes if node.outputs[0].nbytes == 1 << 15]
    assert sorted(sizes)[:2] == [0, 1 << 15]
    assert sizes.count(0) == 1


def test_a_sum_over_nothing_is_a_copy():
    graph = graphdef.import_function(traced(lambda x: tf.nn.relu(tf.reduce_sum(x, (), name="sum")), floats(8, 64)))
    assert liveness.roots(graph)["sum"] == "x"


def convolutional_step():
    """A step of a small network of convolutions, and its variables."""
    random = np.random.default_rng(0)
    filters = [tf.Variable(random.normal(0, 0.3, (3, 3, *channels)).astype("float32")) for channels in ((3, 8), (8, 8))]
    bias = tf.Variable(tf.zeros(8))

    def step(images):
        with tf.GradientTape() as tape:
            values = tf.nn.bias_add(tf.nn.conv2d(images, filters[0], 1, "SAME"), bias)
            mean, variance = tf.nn.moments(values, (0, 1, 2))
            values = tf.nn.relu((values - mean) * tf.math.rsqrt(variance + 1e-3))
            values = tf.nn.max_pool2d(tf.nn.conv2d(values, filters[1], 2, "SAME"), 2, 2, "VALID")
            loss = tf.reduce_mean(tf.square(values))
        weights = [*filters, bias]
        for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(gradient)
        return loss

    return step, [*filters, bias]


class Transposed:
    """A mark whose step gets the layout of a GPU."""

    def optimize(self, func_graph):
        graphdef.transpose_layout(func_graph, "9.0")


def test_convolutions_get_the_layout_that_they_will_have_on_a_gpu():
    step, _ = convolutional_step()
    func_graph = traced(step, floats(4, 16, 16, 3))
    plain = graphdef.import_function(func_graph)
    graphdef.transpose_layout(func_graph, "9.0")
    graph = graphdef.import_function(func_graph)
    transposes = [node for node in graph.nodes if node.op == "Transpose"]
    assert transposes
    assert {node.op for node in graph.nodes} >= {node.op for node in plain.nodes}
    convolution = next(node for node in graph.nodes if node.op == "Conv2D")
    assert convolution.name == "Conv2D/transposed"
    assert convolution.outputs == (ir.Value("float32", (4, 8, 16, 16)),)
    # In the place of the old one: a Transpose aside, the order stays.
    names = [node.name.removesuffix("/transposed") for node in graph.nodes if node.op != "Const"]
    in_both = set(names).intersection(node.name for node in plain.nodes)
    assert [n for n in names if n in in_both] == [node.name for node in plain.nodes if node.name in in_both]
    # Just before it is read: a value is in two layouts no longer than it must be.
    for node in transposes:
        readers = [reader for reader in graph.nodes if node.name in map(ir.producer, reader.inputs)]
        between = graph.nodes[graph.position[node.name] + 1 : graph.position[readers[0].name]]
        assert all(other.op in ("Const", "Transpose", "Reshape", "ReadVariableOp") for other in between)


def test_a_transposed_step_computes_the_same():
    """TensorFlow's kernels for CPUs know NHWC only; XLA's know both."""
    images = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype("float32")
    outcomes = []
    graphdef.on_traced(lambda func_graph, mark: mark.optimize(func_graph) if mark is not None else None)
    try:
        for mark in (None, Transposed()):
            step, variables = convolutional_step()

            def marked(images, step=step, mark=mark):
                graphdef.mark_current_graph(mark)
                return step(images)

            function = tf.function(marked, jit_compile=True)
            losses = [function(images).numpy() for _ in range(3)]
            outcomes.append((losses, [variable.numpy() for variable in variables]))
    finally:
        graphdef.off_traced()
    # XLA may sum in another order where the layout differs: the last bits of a float32.
    (plain_losses, plain_variables), (losses, variables) = outcomes
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    for variable, plain in zip(variables, plain_variables, strict=True):
        np.testing.assert_allclose(variable, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_planned", [False, True])
def test_nothing_is_left_for_tensorflow_to_transpose(is_planned):
    step, _ = convolutional_step()
    func_graph = traced(step, floats(16, 64, 64, 3))
    graphdef.transpose_layout(func_graph, "9.0")
    if is_planned:
        graph = graphdef.import_function(func_graph)
        plan = trainings.EvictAll().plan(graph, CostModel(), 0)
        assert plan.swaps and plan.recomputes
        graphdef.export_function(func_graph, rewrites.rewrite(graph, plan), tiers.Tiers())
    before = [operation.name for operation in func_graph.get_operations()]
    graphdef.transpose_layout(func_graph, "9.0")
    assert [operation.name for operation in func_graph.get_operations()] == before


def test_the_layout_stays_where_tensorflow_would_not_change_it():
    step, _ = convolutional_step()
    func_graph = traced(step, floats(4, 16, 16, 3))
    before = len(func_graph.get_operations())
    options = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"layout_optimizer": False})
    try:
        graphdef.transpose_layout(func_graph, "9.0")
    finally:
        tf.config.optimizer.set_experimental_options({"layout_optimizer": options.get("layout_optimizer", True)})
    assert len(func_graph.get_operations()) == before
    dense = traced(lambda x: tf.nn.relu(x @ x), floats(8, 8))
    graphdef.transpose_layout(dense, "9.0")
    assert [operation.type for operation in dense.get_operations()] == ["Placeholder", "MatMul", "Relu", "Identity"]


def test_the_layout_of_a_result_stays():
    def step(images):
        return tf.nn.relu(tf.nn.conv2d(images, tf.ones((3, 3, 3, 8)), 1, "SAME"))

    func_graph = traced(step, floats(4, 16, 16, 3))
    graphdef.transpose_layout(func_graph, "9.0")
    (result,) = func_graph.outputs
    assert result.shape == (4, 16, 16, 8)


# --- trace time -------------------------------------------------------------------------------------------------


def test_only_marked_functions_are_seen():
    seen = []
    graphdef.off_traced()
    graphdef.on_traced(lambda func_graph, mark: seen.append(mark))
    try:

        @tf.function
        def marked(x):
            assert graphdef.mark_current_graph("mine")
            return x + 1

        @tf.function
        def other(x):
            return marked(x) + 1

        other(tf.ones(2))
        tf.function(lambda x: x + 1)(tf.ones(2))
        assert seen == ["mine"]
    finally:
        graphdef.off_traced()
    assert not graphdef.mark_current_graph("eager")


def test_keras_layers_import():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.LSTM(8, return_sequences=True), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((6, 4)), *layers])

    def function(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    graph = ir.verify(graphdef.import_function(traced(function, floats(3, 6, 4))))
    loops = [node for node in graph.nodes if node.op.endswith("While")]
    forward, backward = (cast(dict[str, Any], dict(loop.attrs)) for loop in loops)
    assert sum(forward["held_bytes"]) > sum(backward["held_bytes"])
    assert set(forward["held_pieces"]) == {1, 6}  # lists have one element for each of the six steps


def test_the_trips_of_a_loop_run_in_turn():
    matrix = tf.random.stateless_normal((64, 64), (1, 2)) / 8

    def function(x):
        def body(trip, state, total):
            return trip + 1, tf.tanh(state @ matrix), total + tf.square(state @ x)

        return tf.while_loop(lambda trip, *_: trip < 20, body, (0, x, x), parallel_iterations=32)[1:]

    func_graph = traced(function, floats(64, 64))
    (loop,) = (operation for operation in func_graph.get_operations() if operation.type.endswith("While"))
    assert loop.get_attr("parallel_iterations") == 32
    graph = pipeline.imported(func_graph, [(64, 64)])
    assert loop.get_attr("parallel_iterations") == 1
    built = graphdef.build_function(func_graph, graph, tiers.Tiers())
    (copied,) = (node for node in built.function_def.node_def if node.op.endswith("While"))
    assert copied.attr["parallel_iterations"].i == 1
    x = tf.random.stateless_normal((64, 64), (3, 4))
    for received, expected in zip(run(func_graph, graph, x), tf.function(function)(x), strict=True):
        assert np.array_equal(received, expected)


def ops_that_run(function):
    function()
    with profiler.recording() as events:
        function()
    return {name.rpartition(":")[2] for *_, name, _ in events}


def test_sums_stay_sums_where_tensorflow_takes_memory_to_be_short():
    def total(x):
        return tf.reduce_sum(tf.add_n([tf.sin(x), tf.cos(x), tf.tan(x), tf.exp(x)]))

    with tf.device("CPU:0"):
        x = tf.zeros([1 << 24])  # 64 MiB
    with graphdef.without_memory_optimizer():
        assert "AddN" in ops_that_run(functools.partial(tf.function(total, autograph=False), x))
    assert "AddN" not in ops_that_run(functools.partial(tf.function(total, autograph=False), x))


@pytest.mark.parametrize(("shape", "sizes", "axis"), [((64,), [16, 48], 0), ((2, 4), [1, 3], 1), ((4, 16), [1, 3], 0)])
def test_a_sum_over_workers_is_split(shape, sizes, axis):
    def step(x):
        total = tf.raw_ops.CollectiveReduceV2(
            input=x, group_size=1, group_key=1, instance_key=shape[0], ordering_token=[], merge_op="Add", final_op="Id"
        )
        return tf.split(total, sizes, axis)

    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    func_graph = traced(step, floats(*shape))
    built = graphdef.build_function(func_graph, graphdef.import_function(func_graph), tiers.Tiers())
    parts = graphdef.run_built(built, func_graph, [tf.constant(x)])
    for part, expected in zip(parts, np.split(x, [sizes[0]], axis), strict=True):
        np.testing.assert_array_equal(part, expected)


# --- branches ---------------------------------------------------------------------------------------------------


def _step_with_a_branch(condition):
    """Counts its runs, and adds x to a variable in one of two ways."""
    counter, total = tf.Variable(0), tf.Variable(0.0)

    def step(x):
        tf.cond(condition(counter, x), lambda: total.assign_add(x), lambda: total.assign_sub(x))
        counter.assign_add(1)
        return total.read_value()

    return step, counter


def test_branches_are_known_where_variables_decide():
    step, counter = _step_with_a_branch(lambda counter, _: counter % 2 == 1)
    decide = graphdef.decidable_branches(traced(step, floats()))
    assert decide is not None
    assert decide() == (False,)
    counter.assign(3)
    assert decide() == (True,)


def test_branches_that_the_batch_decides_on_stay_however_deep_the_step():
    def condition(_, x):
        for _ in range(1500):
            x = x + x
        return x > 0

    step, _ = _step_with_a_branch(condition)
    assert graphdef.decidable_branches(traced(step, floats())) is None


@pytest.mark.parametrize("is_true", [True, False])
def test_the_branch_that_is_taken_becomes_a_part_of_the_step(is_true):
    step, _ = _step_with_a_branch(lambda counter, _: counter % 2 == 1)
    graph = traced(step, floats())
    graphdef.take_branches(graph, (is_true,))
    kinds = {operation.type for operation in graph.get_operations()}
    assert "If" not in kinds
    assert ("AssignSubVariableOp" in kinds) != is_true
    assert graphdef.decidable_branches(graph) is None


def _update_where(is_finite, total, count, x):
    """As of an optimizer that scales losses: leaves an update out, and counts in another way."""

    def update():
        total.assign_sub(tf.reduce_sum(x) * total)
        tf.cond(tf.equal(count, 1), lambda: count.assign(0), lambda: count.assign_add(1))
        return total + 1.0

    def leave_out():
        count.assign(5)
        return total * 2.0

    return tf.cond(is_finite, update, leave_out)


def test_branches_that_update_variables_are_joined():
    def run(mark):
        total, count = tf.Variable([-0.0, 3.0]), tf.Variable(0)

        def step(x):
            graphdef.mark_current_graph(mark)
            made = _update_where(tf.math.is_finite(tf.reduce_sum(x)), total, count, x)
            return made, total.read_value(), count.read_value()

        function = tf.function(step, autograph=False)
        numbers = (0.5, np.inf, 0.25, 0.125, -0.0, np.nan)
        outcomes = [[tensor.numpy().tobytes() for tensor in function(tf.constant([x, x]))] for x in numbers]
        kinds = {operation.type for operation in function.get_concrete_function(floats(2)).graph.get_operations()}
        return outcomes, not kinds.isdisjoint({"If", "StatelessIf"})

    graphdef.off_traced()
    graphdef.on_traced(lambda func_graph, mark: graphdef.join_branches(func_graph) if mark == "joined" else None)
    try:
        plain, joined = run("plain"), run("joined")
    finally:
        graphdef.off_traced()
    assert joined[0] == plain[0]
    assert (plain[1], joined[1]) == (True, False)


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(lambda total, x: tf.debugging.assert_positive(x), id="may fail"),
        pytest.param(lambda total, x: total.assign_add(tf.gather(x, [7])[0]), id="may be out of range"),
        pytest.param(lambda total, x: total.assign(tf.cast(7 // tf.cast(x[0], tf.int32), tf.float32)), id="divides"),
        pytest.param(lambda total, x: total.assign_add(tf.random.uniform([])), id="draws a number"),
        pytest.param(lambda total, x: tf.print(x), id="prints"),
        pytest.param(
            lambda total, x: total.assign(tf.while_loop(lambda n: n < x[0], lambda n: n + 1.0, [0.0])[0]), id="loops"
        ),
    ],
)
def test_a_branch_that_must_not_run_stays(update):
    total = tf.Variable(1.0)

    def step(x):
        def branch():
            update(total, x)
            total.assign_add(1.0)

        tf.cond(x[0] > 0.0, branch, lambda: None)

    graph = traced(step, floats(2))
    graphdef.join_branches(graph)
    assert "If" in {operation.type for operation in graph.get_operations()}

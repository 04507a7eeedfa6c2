import dataclasses

import pytest
import testing
import tiny_graphs
from hypothesis import given

from graphswap import ir, parser

MLP = parser.parse(tiny_graphs.MLP_STEP)


@pytest.mark.parametrize(
    ("value", "text", "nbytes", "is_resolved"),
    [
        (ir.Value("float32", (32, 96, 96, 3)), "float32[32,96,96,3]", 32 * 96 * 96 * 3 * 4, True),
        (ir.Value("bfloat16", (3,)), "bfloat16[3]", 6, True),
        (ir.Value("bool"), "bool[]", 1, True),
        (ir.Value("complex128", (2, 0)), "complex128[2,0]", 0, True),
        (ir.Value("float32", (None, 4)), "float32[?,4]", 0, False),
        (ir.Value("float32", None), "float32[*]", 0, False),
        (ir.Value("resource"), "resource[]", 0, True),
        (ir.Value("string", None), "string[*]", 0, True),
    ],
)
def test_value(value, text, nbytes, is_resolved):
    assert str(value) == text
    assert value.nbytes == nbytes
    assert value.is_resolved == is_resolved


@pytest.mark.parametrize(("reference", "name", "index"), [("a/b", "a/b", 0), ("a/b:2", "a/b", 2)])
def test_references(reference, name, index):
    assert ir.ref(name, index) == reference
    assert ir.split_ref(reference) == (name, index)
    assert ir.producer(reference) == name


def test_refs_of_a_node():
    assert ir.Node("n", "Op", outputs=(ir.Value("int8"),) * 3).refs() == ("n", "n:1", "n:2")
    assert ir.Node("n", "NoOp").refs() == ()


def test_a_printed_node():
    node = ir.Node(
        name="n",
        op="Op",
        inputs=("a", "b:1"),
        control_inputs=("c", "d"),
        outputs=(ir.Value("int8", (2,)), ir.Value("int8")),
        device='the "first"',
        stateful=True,
        attrs=(("shape", (1, 2)), ("tier", "host")),
        like="m",
    )
    assert str(node) == (
        '%n = Op!(%a, %b:1) {"shape": [1, 2], "tier": "host"} like(%m) @"the \\"first\\"" after(%c, %d) '
        ": (int8[2], int8[])"
    )
    assert str(ir.Node("n", "NoOp")) == "%n = NoOp() : ()"


def test_a_printed_graph():
    node = ir.Node("n", "Op", outputs=(ir.Value("int8"),))
    assert str(ir.Graph("g", (node,), ("n",), ("n",), ("n",))) == (
        "graph g(%n) -> (%n) after(%n) {\n  %n = Op() : (int8[])\n}"
    )
    assert str(ir.Graph("g", ())) == "graph g() -> () {\n}"


def test_a_graph_finds_its_parts():
    assert MLP.by_name["hidden"].op == "MatMul"
    assert MLP.position["x"] == 0
    assert MLP.position["update1"] == len(MLP.nodes) - 1
    assert MLP.value("hidden") == ir.Value("float32", (8, 16))
    assert MLP.consumers["relu"] == ("logits", "grad_w2", "grad_hidden")
    assert "loss" not in MLP.consumers


def test_a_consumer_that_reads_twice_counts_once():
    diamond = parser.parse(tiny_graphs.DIAMOND)
    assert diamond.consumers["x"] == ("top", "left")


def test_the_fingerprint_tells_graphs_apart():
    assert MLP.fingerprint == parser.parse(tiny_graphs.MLP_STEP).fingerprint
    assert MLP.fingerprint != MLP.replace(outputs=()).fingerprint


def test_graphs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLP.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


@given(testing.random_graphs())
def test_verify_returns_a_good_graph(graph):
    assert ir.verify(graph) is graph


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("graph g() -> () { %a = Op(%b) : () }", "graph g: node 'a' reads '%b', which does not stand before it."),
        ("graph g() -> () { %a = Op(%a) : () }", "graph g: node 'a' reads '%a', which does not stand before it."),
        (
            "graph g() -> () { %a = Op() : (int8[])  %b = Op(%a:1) : () }",
            "graph g: node 'b' reads '%a:1', but 'a' has 1 output(s).",
        ),
        (
            "graph g() -> () { %a = Op() after(%b) : ()  %b = Op() : () }",
            "graph g: node 'a' runs after 'b', which does not stand before it.",
        ),
        ("graph g() -> () { %a = Op() : ()  %a = Op() : () }", "graph g: there are two nodes called 'a'."),
        ("graph g(%a) -> () {}", "graph g: the signature names node 'a', which does not exist."),
        ("graph g() -> () after(%a) {}", "graph g: the signature names node 'a', which does not exist."),
        ("graph g() -> (%a) { %a = Op() : () }", "graph g: the result '%a' does not exist."),
    ],
)
def test_verify_names_the_broken_rule(text, message):
    with pytest.raises(ir.GraphError) as error:
        ir.verify(parser.parse(text))
    assert str(error.value).splitlines()[0] == message


def test_verify_shows_the_lines_around_the_fault():
    nodes = [ir.Node(f"n{i}", "NoOp") for i in range(20)]
    nodes[10] = ir.Node("n10", "Op", ("missing",))
    with pytest.raises(ir.GraphError) as error:
        ir.verify(ir.Graph("g", tuple(nodes)))
    _, *around = str(error.value).splitlines()
    assert around == [f"{'>' if i == 10 else ' '} {nodes[i]}" for i in range(5, 16)]


def test_origin_looks_through_swaps_and_repeats():
    graph = parser.parse("""
    graph g() -> () {
      %a = Op() : (int8[], int8[])
      %out = SwapOut(%a:1) : (variant[])
      %in = SwapIn(%out) : (int8[])
      %again = Op() like(%a) : (int8[], int8[])
      %out2 = SwapOut(%again) : (variant[])
    }
    """)
    assert ir.origin(graph) == {
        "a": "a",
        "a:1": "a:1",
        "out": "a:1",
        "in": "a:1",
        "again": "a",
        "again:1": "a:1",
        "out2": "a",
    }

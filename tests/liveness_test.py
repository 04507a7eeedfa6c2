import pytest
import testing
from hypothesis import given

from graphswap import ir, liveness, parser
from graphswap.liveness import Storage

GRAPH = parser.parse("""
graph g(%x, %w) -> (%result) {
  %x = Placeholder() : (float32[64])
  %w = Placeholder() {"held_bytes": [512]} : (resource[])
  %read = ReadVariableOp!(%w) : (float32[128])
  %a = Split(%x) : (float32[65], int64[1])
  %flat = Reshape(%a) : (float32[65])
  %b = AddV2(%flat, %a) : (float32[65])
  %both = IdentityN(%a:1, %b) : (int64[1], float32[65])
  %view = Identity(%both:1) : (float32[65])
  %c = AddV2(%b, %both:1) : (float32[65])
  %list = TensorListStack(%c) {"held_bytes": [1024]} : (variant[])
  %shape = Shape(%view) : (int32[0])
  %result = MatMul(%c, %list) : (float32[])
  %update = AssignSubVariableOp!(%w, %read) : ()
}
""")


@pytest.mark.parametrize(
    ("op", "index", "source"),
    [
        ("Identity", 0, 0),
        ("Reshape", 0, 0),
        ("ReadVariableOp", 0, 0),
        ("IdentityN", 0, 0),
        ("IdentityN", 2, 2),
        ("Relu", 0, None),
        ("Reshape", 1, None),
    ],
)
def test_alias_of(op, index, source):
    assert liveness.alias_of(ir.Node("n", op), index) == source


def test_roots_are_found_through_chains_of_aliases():
    roots = liveness.roots(GRAPH)
    aliases = {value: root for value, root in roots.items() if value != root}
    assert aliases == {"flat": "a", "read": "w", "both": "a:1", "both:1": "b", "view": "b"}
    assert roots.keys() == {reference for node in GRAPH.nodes for reference in node.refs()}


def test_storages():
    at = GRAPH.position
    assert liveness.storages(GRAPH) == (
        Storage("x", ("x",), 256, at["x"], (at["a"],), is_held=True),
        Storage("w", ("w", "read"), 512, at["w"], (at["read"], at["update"]), is_held=True),
        Storage("a", ("a", "flat"), 512, at["a"], (at["flat"], at["b"]), is_held=False),
        Storage("a:1", ("a:1", "both"), 256, at["a"], (at["both"],), is_held=False),
        Storage(
            "b", ("b", "both:1", "view"), 512, at["b"], (at["both"], at["view"], at["c"], at["shape"]), is_held=False
        ),
        Storage("c", ("c",), 512, at["c"], (at["list"], at["result"]), is_held=False),
        Storage("list", ("list",), 1024, at["list"], (at["result"],), is_held=False),
        Storage("result", ("result",), 256, at["result"], (), is_held=True),
    )


@pytest.mark.parametrize(
    ("results", "line", "is_held"),
    [
        ("", "%b = Identity(%a) : (int8[])", False),
        ("%b", "%b = Identity(%a) : (int8[])", True),
        ("", "%b = AssignVariableOp(%w, %a) : ()", True),
        ("", "%b = AssignSubVariableOp(%w, %a) : ()", False),
    ],
)
def test_what_outlives_the_step_is_held(results, line, is_held):
    graph = parser.parse(
        f"graph g(%w) -> ({results}) {{ %w = Placeholder() : (resource[])  %a = Op() : (int8[])  {line} }}"
    )
    (storage,) = liveness.storages(graph)
    assert (storage.root, storage.is_held) == ("a", is_held)


@pytest.mark.parametrize(
    ("node", "nbytes"),
    [
        (ir.Node("n", "Op", outputs=(ir.Value("int8"), ir.Value("float32", (65,)))), [256, 512]),
        (ir.Node("n", "Op", outputs=(ir.Value("float32", (None,)), ir.Value("variant"))), [0, 0]),
        (ir.Node("n", "Op", outputs=(ir.Value("variant"),), attrs=(("held_bytes", (4096,)),)), [4096]),
        (ir.Node("n", "NoOp"), []),
    ],
)
def test_output_bytes(node, nbytes):
    assert list(liveness.output_bytes(node)) == nbytes


@given(testing.random_graphs())
def test_every_value_lives_in_one_storage(graph):
    storages = liveness.storages(graph)
    homes = [value for storage in storages for value in storage.values]
    assert len(homes) == len(set(homes))
    assert set(homes) == {reference for node in graph.nodes for reference in node.refs()}
    for storage in storages:
        assert storage.values[0] == storage.root
        assert list(storage.uses) == sorted(set(storage.uses))
        assert all(use > storage.born for use in storage.uses)
